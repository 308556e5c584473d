"""What one peer sends to a registry, as much as it can: the registry's memory stays bounded, and others are served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.processes import Process, Spawn
from tests.registry.serving import ORDER, USER, eventually, instance
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

MB = 1 << 20

WITHIN = 5.0
"""How long a call of another client may take on a busy machine, while the flood goes on. Seconds."""

BOUND = 1024 * MB
"""All that the registry's process can have: with more, it fails."""

KEPT = 20 * MB
"""What a registry may keep of an attack that is over: pages of the allocator that are in use in part."""

# A window that doesn't grow with what the network could carry, so that it is soon full.
OPTIONS = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]


class Flooded:
    """A registry in a process of its own, and what a client that harms nobody sees of it."""

    def __init__(self, process: Process, address: str, stub: pb_grpc.RegistryAsyncStub) -> None:
        self.process = process
        self.address = address
        self.stub = stub

    @property
    def memory(self) -> int:
        """Resident bytes of the registry."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    async def fill(self, count: int, size: int) -> None:
        """Register instances of USER, each of about ``size`` bytes."""
        labels = {f"{n:02}": "x" * 1000 for n in range(size // 1000)}
        for n in range(count):
            request = pb.RegisterRequest(instance=instance(f"{n:04}", **labels), ttl=Duration(seconds=300))
            await self.stub.Register(request, timeout=WITHIN)

    @contextlib.asynccontextmanager
    async def unread_watches(self) -> AsyncIterator[None]:
        """400 watches of USER, whose client reads none of it and leaves at the end."""
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(self.address, options=OPTIONS))
                stub: pb_grpc.RegistryAsyncStub = pb_grpc.RegistryStub(channel)
                watches = [stub.Watch(pb.WatchRequest(service=USER)) for _ in range(100)]
                for watch in watches:
                    await watch.wait_for_connection()
                stack.callback(lambda watches: [watch.cancel() for watch in watches], watches)
            yield

    async def serves(self) -> None:
        """Another client registers and watches as ever."""
        await self.stub.Register(pb.RegisterRequest(instance=instance("other", ORDER)), timeout=WITHIN)
        call = self.stub.Watch(pb.WatchRequest(service=ORDER), timeout=WITHIN)
        step = await call.read()
        assert isinstance(step, pb.WatchResponse)
        assert [each.id for each in step.snapshot.instances] == ["other"]
        call.cancel()


@pytest.fixture
async def registry(spawn: Spawn, free_port: Callable[[], int]) -> AsyncIterator[Flooded]:
    address = f"127.0.0.1:{free_port()}"
    process = spawn.python("-m", "mesh.registry", "--listen", address)
    process.wait_for("serving on")
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (BOUND, BOUND))
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield Flooded(process, address, pb_grpc.RegistryStub(channel))


@pytest.mark.faults
async def test_watches_that_nobody_reads_cost_little_and_are_dropped(registry: Flooded) -> None:
    await registry.fill(48, 64_000)
    before = registry.memory
    async with registry.unread_watches():
        for _ in range(5):
            await registry.serves()
            # 3.1 MB each would be 1,240 MB.
            assert registry.memory - before < 150 * MB
        dropped = "read nothing for 10 s; dropped"
        await eventually(lambda: dropped in registry.process.said)
        await registry.serves()
    await eventually(lambda: registry.memory - before < KEPT)
    await registry.serves()


@pytest.mark.faults
async def test_attacks_in_a_row_leave_no_memory_behind(registry: Flooded) -> None:
    await registry.fill(48, 64_000)
    before = registry.memory
    for _ in range(3):
        async with registry.unread_watches():
            await eventually(lambda: registry.memory - before > KEPT)
            await registry.serves()
        await eventually(lambda: registry.memory - before < KEPT)


@pytest.mark.faults
async def test_unknown_fields_of_megabytes_are_not_kept(registry: Flooded) -> None:
    before = registry.memory
    junk = bytes([0x9A, 0x06]) + pb.Locality(region="x" * 3 * MB).SerializeToString()[1:]  # field 99
    for n in range(20):
        request = pb.RegisterRequest(instance=pb.Instance.FromString(instance(str(n)).SerializeToString() + junk))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await registry.stub.Register(request, timeout=WITHIN)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert registry.memory - before < 40 * MB
    await registry.serves()


@pytest.mark.faults
async def test_two_million_ids_in_a_keep_alive_are_refused(registry: Flooded) -> None:
    before = registry.memory
    stream = registry.stub.KeepAlive()
    serving = asyncio.create_task(registry.serves())
    await stream.write(pb.KeepAliveRequest(lease_ids=[""] * 2_000_000))
    assert await stream.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await serving
    assert registry.memory - before < 40 * MB


@pytest.mark.faults
async def test_ten_thousand_streams_on_one_connection_wait_in_their_client(registry: Flooded) -> None:
    before = registry.memory
    async with grpc.aio.insecure_channel(registry.address, options=OPTIONS) as channel:
        stub: pb_grpc.RegistryAsyncStub = pb_grpc.RegistryStub(channel)
        watches = [stub.Watch(pb.WatchRequest(service=USER)) for _ in range(10_000)]
        first = await watches[0].read()
        assert isinstance(first, pb.WatchResponse)
        for _ in range(5):
            await registry.serves()
        assert registry.memory - before < 100 * MB
        for watch in watches:
            watch.cancel()
    await registry.serves()


@pytest.mark.faults
async def test_connections_that_say_nothing_are_closed(registry: Flooded) -> None:
    host, _, port = registry.address.rpartition(":")
    silent = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _ in range(400)))
    await registry.serves()
    async with asyncio.timeout(20):
        for reader, _ in silent:
            with contextlib.suppress(ConnectionError):
                while await reader.read(4096):  # the registry's own SETTINGS, and then the end
                    pass
    for _, writer in silent:
        writer.close()
    await registry.serves()


@pytest.mark.faults
async def test_configs_of_every_size_are_bounded_and_keep_nobody_waiting(registry: Flooded) -> None:
    before = registry.memory
    methods = [{"name": [{"service": "a.B", "method": f"M{n}"}], "timeout": "1s"} for n in range(3_850)]
    large = json.dumps({"methodConfig": methods})
    assert 235_000 < len(large) <= 262_144

    async def configure(n: int, text: str) -> grpc.StatusCode:
        call = registry.stub.SetServiceConfig(
            pb.SetServiceConfigRequest(service=f"weft.S{n}", service_config=text), timeout=60
        )
        return await call.code()

    async def configure_all(numbers: Iterator[int]) -> list[grpc.StatusCode]:
        return [await configure(n, large) for n in numbers]

    numbers = iter(range(80))
    setting = asyncio.gather(*(configure_all(numbers) for _ in range(8)))
    while not setting.done():
        # A dozen of them would take longer than this, if others waited.
        await asyncio.wait_for(registry.serves(), 1.0)
    codes = [code for each in await setting for code in each]
    assert codes.count(grpc.StatusCode.OK) == 16_777_216 // len(large)
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    # Of a megabyte: none.
    assert set(await asyncio.gather(*(configure(n, " " * MB) for n in range(50)))) == {
        grpc.StatusCode.RESOURCE_EXHAUSTED
    }
    # And of those at once, some.
    many = await asyncio.gather(*(configure(n, large) for n in range(100)))
    assert set(many) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert registry.memory - before < 16_777_216 + 80 * MB


@pytest.mark.faults
async def test_listing_everything_costs_a_page_at_a_time(registry: Flooded) -> None:
    await registry.fill(100, 60_000)
    before = registry.memory

    async def everything() -> int:
        found, token = 0, ""
        while token or not found:
            page = await registry.stub.ListInstances(pb.ListInstancesRequest(page_token=token), timeout=WITHIN)
            found, token = found + len(page.instances), page.next_page_token
        return found

    listing = asyncio.gather(*(everything() for _ in range(20)))
    while not listing.done():
        await registry.serves()
    assert set(await listing) <= {100, 101}  # with the other client's
    assert registry.memory - before < 60 * MB
