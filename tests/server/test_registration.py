"""A served process is known to the registry while it serves, whatever happens to the registry."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

import mesh.server.aio
import mesh.server.sync
from mesh.registry.book import Book
from mesh.registry.service import RegistryService
from mesh.server.registration import Leases, Registration
from mesh.server.settings import ServerSettings
from tests.server.serving import NAME, add_to_server, nap, sync_nap
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc


class Counting(RegistryService):
    """The real registry, which notes what it is asked. ``mute``: it never answers a deregistration."""

    def __init__(self, book: Book) -> None:
        super().__init__(book)
        self.streams = 0
        self.registered: list[str] = []
        self.mute = False
        self.deregistering = asyncio.Event()

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:  # noqa: N802
        self.registered.append(request.instance.service)
        return await super().Register(request, context)

    async def Deregister(self, request: pb.DeregisterRequest, context: Any) -> pb.DeregisterResponse:  # noqa: N802
        self.deregistering.set()
        if self.mute:
            await asyncio.Event().wait()
        return await super().Deregister(request, context)

    async def KeepAlive(self, requests: object, context: Any) -> AsyncIterator[pb.KeepAliveResponse]:  # noqa: N802
        self.streams += 1
        async for response in super().KeepAlive(requests, context):
            yield response


class TheRegistry:
    """A registry that can be away, and come back empty."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self.service = Counting(Book(epoch="none"))
        self._lives = 0
        self._server: grpc.aio.Server | None = None

    async def come(self) -> None:
        self._lives += 1
        self.service = Counting(Book(epoch=f"life {self._lives}"))
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_RegistryServicer_to_server(self.service, self._server)
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def go(self) -> None:
        if self._server is not None:
            self.service.close()
            await self._server.stop(None)
            self._server = None

    async def instances(self) -> list[pb.Instance]:
        async with grpc.aio.insecure_channel(self.address) as channel:
            listed = await pb_grpc.RegistryStub(channel).ListInstances(pb.ListInstancesRequest(), timeout=5)
        return list(listed.instances)

    async def register(self, service: str, ttl: int) -> None:
        async with grpc.aio.insecure_channel(self.address) as channel:
            request = pb.RegisterRequest(instance=an_instance(service), ttl=Duration(seconds=ttl))
            await pb_grpc.RegistryStub(channel).Register(request, timeout=5)

    async def forget(self, lease_id: str) -> None:
        async with grpc.aio.insecure_channel(self.address) as channel:
            await pb_grpc.RegistryStub(channel).Deregister(pb.DeregisterRequest(lease_id=lease_id), timeout=5)

    async def knows(self, *services: str) -> None:
        """Wait until it knows these and no others."""
        async with asyncio.timeout(15):
            while sorted(instance.service for instance in await self.instances()) != sorted(services):  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # between two looks


@pytest.fixture
async def registry(free_port: Callable[[], int]) -> AsyncIterator[TheRegistry]:
    registry = TheRegistry(free_port())
    await registry.come()
    yield registry
    await registry.go()


def settings_for(registry: TheRegistry, **more: Any) -> ServerSettings:
    return ServerSettings(
        **{"listen": "127.0.0.1:0", "registry": registry.address, "drain_wait": 0, "lease_ttl": 1, **more}
    )


@asynccontextmanager
async def served(world: str, settings: ServerSettings) -> AsyncIterator[Any]:
    if world == "aio":
        async with mesh.server.aio.Server([(add_to_server, nap)], settings) as server:
            yield server
        return
    threaded = mesh.server.sync.Server([(add_to_server, sync_nap)], settings)
    await asyncio.to_thread(threaded.start)
    try:
        yield threaded
    finally:
        await asyncio.to_thread(threaded.drain)
        await asyncio.get_running_loop().shutdown_default_executor()


async def rests(server: Any) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        call: Any = channel.unary_unary(f"/{NAME}/Nap")
        assert await call(b"0", timeout=10) == b"rested"


@pytest.mark.slow
@pytest.mark.parametrize("world", ["aio", "sync"])
class TestAServer:
    async def test_is_known_while_it_serves(self, world: str, registry: TheRegistry) -> None:
        settings = settings_for(registry, zone="a", weight=2, metadata={"version": "7"})
        async with served(world, settings) as server:
            await registry.knows(NAME)
            (instance,) = await registry.instances()
            assert instance.address == instance.id == f"127.0.0.1:{server.port}"
            assert (instance.locality.zone, instance.weight, dict(instance.metadata)) == ("a", 2, {"version": "7"})
            await rests(server)
        assert await registry.instances() == []

    async def test_serves_while_the_registry_is_away_and_is_known_when_it_comes(
        self, world: str, registry: TheRegistry
    ) -> None:
        await registry.go()
        async with served(world, settings_for(registry)) as server:
            await rests(server)
            await registry.come()
            await registry.knows(NAME)

    async def test_is_known_again_to_a_registry_that_came_back_empty(self, world: str, registry: TheRegistry) -> None:
        async with served(world, settings_for(registry)) as server:
            await registry.knows(NAME)
            await registry.go()
            await rests(server)
            await registry.come()
            await registry.knows(NAME)

    async def test_drains_in_bounded_time_when_the_registry_is_away(self, world: str, registry: TheRegistry) -> None:
        async with asyncio.timeout(15), served(world, settings_for(registry, deregister_timeout=0.2)):
            await registry.knows(NAME)
            await registry.go()


def an_instance(service: str) -> pb.Instance:
    return pb.Instance(id="me", service=service, address="127.0.0.1:1")


@pytest.mark.slow
class TestRegistration:
    async def test_one_stream_carries_all_leases(self, registry: TheRegistry) -> None:
        services = [f"test.S{number}" for number in range(5)]
        registration = Registration(registry.address, [an_instance(service) for service in services], 1)
        registration.start()
        await registry.knows(*services)
        # A lease that was granted later and isn't renewed has ended, and theirs have not.
        await registry.register("test.Later", ttl=1)
        await registry.knows(*services, "test.Later")
        await registry.knows(*services)
        assert registry.service.streams == 1
        assert sorted(registry.service.registered) == ["test.Later", *services]
        await registration.close(1)
        assert await registry.instances() == []

    async def test_a_lease_that_the_registry_lost_is_taken_again_and_the_others_kept(
        self, registry: TheRegistry
    ) -> None:
        registration = Registration(registry.address, [an_instance("test.A"), an_instance("test.B")], 1)
        registration.start()
        await registry.knows("test.A", "test.B")
        await registry.forget(registration.leases.held()[0])
        await registry.knows("test.A", "test.B")
        assert registry.service.registered == ["test.A", "test.B", "test.A"]
        assert registry.service.streams == 1
        await registration.close(1)

    async def test_the_end_of_the_registry_is_one_line_and_no_traceback(
        self, registry: TheRegistry, caplog: pytest.LogCaptureFixture
    ) -> None:
        # Renewed every 10 s: the registry ends between two keep-alives.
        registrations = [Registration(registry.address, [an_instance(f"test.S{number}")], 30) for number in range(6)]
        for registration in registrations:
            registration.start()
        await registry.knows(*(f"test.S{number}" for number in range(6)))
        async with asyncio.timeout(15):
            while registry.service.streams < 6:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            await registry.go()
            while len(said := [each for each in caplog.records if "failed; retrying" in each.message]) < 6:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            await registry.come()
            # At once, and not when the next keep-alive is due.
            await registry.knows(*(f"test.S{number}" for number in range(6)))
        assert {record.levelname for record in said} == {"WARNING"}
        assert not [record for record in caplog.records if record.exc_info]
        for registration in registrations:
            await registration.close(1)

    async def test_it_may_be_closed_before_it_was_started(self) -> None:
        await Registration("127.0.0.1:1", [], 1).close(1)


class TestLeases:
    def test_they_are_missing_until_granted_and_again_when_lost(self) -> None:
        one, two = an_instance("one"), an_instance("two")
        leases = Leases([one, two], ttl=10)
        assert leases.missing() == [one, two]
        leases.granted(one, "l1", 10)
        leases.granted(two, "l2", 10)
        assert (leases.missing(), leases.held()) == ([], ["l1", "l2"])
        assert repr(leases) == "<Leases 2/2 held, ttl=10s>"
        leases.forget(["l1", "somebody's"])
        assert (leases.missing(), leases.held()) == ([one], ["l2"])

    def test_they_are_renewed_before_a_third_of_the_time_that_was_granted(self) -> None:
        leases = Leases([an_instance("one")], ttl=30)
        leases.granted(an_instance("one"), "l", 6)
        delays = [leases.keep_alive_in(random.Random(seed)) for seed in range(100)]
        assert max(delays) <= 2.0
        assert min(delays) >= 1.6
        assert len(set(delays)) > 90  # not in step with other replicas
