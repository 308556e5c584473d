"""The resolvers: what a channel learns of its endpoints, and when."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc
import pytest

from mesh.discovery.cache import Cache
from mesh.discovery.dns import DnsResolver
from mesh.discovery.registry import RegistryResolver
from mesh.discovery.resolver import Resolver, Update
from mesh.discovery.static import StaticResolver
from mesh.model import Endpoint
from tests.registry.serving import BOUND, ORDER, USER, instance, serving
from weft.mesh.v1 import registry_pb2 as pb

Context = grpc.aio.ServicerContext[bytes, bytes]


class Updates:
    """What a resolver yields, one at a time, for as long as the block lasts."""

    def __init__(self, updates: AsyncIterator[Update]) -> None:
        self._updates = updates

    async def next(self) -> Update:
        async with asyncio.timeout(BOUND):
            return await anext(self._updates)

    async def until(self, addresses: str) -> list[Update]:
        """The updates up to the one whose endpoints have these addresses."""
        seen = [await self.next()]
        while seen[-1].endpoints is None or of(seen[-1]) != addresses:
            seen.append(await self.next())
        return seen

    async def until_error(self, text: str) -> list[Update]:
        """The updates up to the one whose error has this text."""
        seen = [await self.next()]
        while text not in seen[-1].error:
            seen.append(await self.next())
        return seen


def of(update: Update) -> str:
    assert update.endpoints is not None, update.error
    return " ".join(endpoint.address.removesuffix(":1") for endpoint in update.endpoints)


@contextlib.asynccontextmanager
async def watching(resolver: Resolver) -> AsyncIterator[Updates]:
    async with contextlib.aclosing(resolver.updates()) as updates:
        yield Updates(updates)


async def idle(updates: Updates) -> None:
    """Pass when the resolver has nothing more to say by itself; to be the last thing asked of it."""
    waiting = asyncio.ensure_future(updates.next())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()
    await asyncio.wait({waiting})


# static


async def test_static_endpoints_are_told_once_each_in_their_order() -> None:
    async with watching(StaticResolver(["b:1", "a:1", "b:1"])) as updates:
        assert await updates.next() == Update((Endpoint("b:1"), Endpoint("a:1")))
        await idle(updates)


# dns


class NameServer:
    """Gives its answers one after the other, the last for ever. ``asked``: how often it was asked."""

    def __init__(self, *answers: Iterable[str] | Exception) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def __call__(self, host: str, port: int) -> Iterable[str]:
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


NO_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
TRY_AGAIN = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def polling(
    server: NameServer, period: float = 0.002, min_interval: float = 0.001, probation: float = 0.0
) -> DnsResolver:
    return DnsResolver(
        "users", 1, period=period, min_interval=min_interval, probation=probation, rng=random.Random(1), lookup=server
    )


async def test_a_name_is_asked_for_again_and_only_changes_are_told() -> None:
    server = NameServer(["10.0.0.2", "10.0.0.1", "10.0.0.1"], ["10.0.0.1", "10.0.0.2"], ["10.0.0.3", "::1"])
    async with watching(polling(server)) as updates:
        assert of(await updates.next()) == "10.0.0.1 10.0.0.2"
        assert of(await updates.next()) == "10.0.0.3 [::1]"
    assert server.asked == 3


async def test_what_was_known_holds_while_the_name_server_fails() -> None:
    server = NameServer(["10.0.0.1"], TRY_AGAIN, TRY_AGAIN, NO_NAME, OSError("no network"), ["10.0.0.1"])
    async with watching(polling(server)) as updates:
        assert of(await updates.next()) == "10.0.0.1"
        assert await updates.next() == Update(None, "dns: users: Temporary failure in name resolution")
        assert await updates.next() == Update(None, "dns: users: Name or service not known")
        assert await updates.next() == Update(None, "dns: users: no network")
        assert of(await updates.next()) == "10.0.0.1", "all is well again"


@pytest.mark.parametrize("error", [NO_NAME, UnicodeError("label too long")])
async def test_a_name_that_never_was_fails_calls_at_once_until_it_is(error: Exception) -> None:
    async with watching(polling(NameServer(error, ["10.0.0.1"]))) as updates:
        update = await updates.next()
        assert update.final
        assert "users" in update.error
        assert of(await updates.next()) == "10.0.0.1"


async def test_a_name_server_that_fails_at_first_is_not_the_end() -> None:
    async with watching(polling(NameServer(TRY_AGAIN, ["10.0.0.1"]), period=1e6)) as updates:
        assert not (await updates.next()).final
        assert of(await updates.next()) == "10.0.0.1", "asked again soon, as nothing is known"


async def test_a_failing_endpoint_has_the_name_looked_up_without_waiting_for_the_next_turn() -> None:
    resolver = polling(NameServer(["10.0.0.1"], ["10.0.0.2"]), period=1e6)
    async with watching(resolver) as updates:
        await updates.next()
        resolver.resolve_now()
        resolver.resolve_now()
        assert of(await updates.next()) == "10.0.0.2"


async def test_failing_endpoints_do_not_make_lookups_pile_up() -> None:
    server = NameServer(["10.0.0.1"], ["10.0.0.2"])
    resolver = polling(server, period=1e6, min_interval=1e6)
    async with watching(resolver) as updates:
        await updates.next()
        resolver.resolve_now()
        await idle(updates)
    assert server.asked == 1


async def test_a_numeric_address_is_not_looked_up() -> None:
    for host, address in (("10.0.0.1", "10.0.0.1"), ("::1", "[::1]")):
        server = NameServer(OSError("asked"))
        async with watching(DnsResolver(host, 1, lookup=server)) as updates:
            assert of(await updates.next()) == address
            await idle(updates)
        assert not server.asked


async def test_the_systems_own_resolver_knows_localhost() -> None:
    async with watching(DnsResolver("localhost", 1)) as updates:
        assert "127.0.0.1" in of(await updates.next()).split()
    await asyncio.get_running_loop().shutdown_default_executor()


# registry


def eager(
    address: str,
    hold: float = 30.0,
    first_response_timeout: float = BOUND,
    probation: float = 0.0,
    cache: Cache | None = None,
) -> RegistryResolver:
    return RegistryResolver(
        address,
        USER,
        hold=hold,
        first_response_timeout=first_response_timeout,
        probation=probation,
        cache=cache,
        rng=random.Random(1),
    )


def user(id: str) -> pb.Instance:
    return instance(id, address=f"{id}:1")


async def test_instances_come_and_go_as_the_registry_learns_of_them() -> None:
    async with serving() as registry, watching(eager(registry.address)) as updates:
        error = f"registry {registry.address} has no instances of {USER!r}; known services: none"
        assert await updates.next() == Update((), error, service_config="")
        lease = await registry.register(user("a"))
        await updates.until("a")
        await registry.register(user("b"))
        await registry.register(instance("c", ORDER))
        await updates.until("a b")
        await registry.stub.Deregister(pb.DeregisterRequest(lease_id=lease))
        await updates.until("b")


async def test_the_services_config_comes_with_its_instances() -> None:
    async with serving() as registry, watching(eager(registry.address)) as updates:
        await updates.next()
        for text in ('{"loadBalancingConfig":[{"round_robin":{}}]}', ""):
            await registry.stub.SetServiceConfig(pb.SetServiceConfigRequest(service=USER, service_config=text))
            assert (await updates.next()).service_config == text


@pytest.mark.slow
async def test_a_service_of_megabytes_comes_whole_and_at_once() -> None:
    labels = {f"{n:02}": "x" * 1000 for n in range(64)}
    async with serving() as registry:
        addresses = [f"users{n:02}" for n in range(70)]
        for each in addresses:
            await registry.register(pb.Instance(id=each, service=USER, address=f"{each}:1", metadata=labels))
        async with watching(eager(registry.address)) as updates:
            assert of(await updates.next()) == " ".join(addresses)
            await registry.register(user("new"))
            assert of(await updates.next()) == " ".join(["new", *addresses])


@pytest.mark.slow
async def test_a_registry_that_is_away_is_named_and_found_when_it_comes(free_port: Callable[[], int]) -> None:
    port = free_port()
    async with watching(eager(f"127.0.0.1:{port}")) as updates:
        update = await updates.next()
        assert update.endpoints is None
        assert update.error.startswith(f"registry 127.0.0.1:{port}: UNAVAILABLE: ")
        assert update.final, "calls fail rather than wait for it, unless they wait for ready"
        async with serving(port) as registry:
            await registry.register(user("a"))
            await updates.until("a")


@pytest.mark.slow
async def test_a_registry_that_restarts_empty_evicts_nobody() -> None:
    async with serving() as registry:
        port = registry.port
        for each in "abc":
            await registry.register(user(each))
        resolver = eager(registry.address)
        closing = contextlib.AsyncExitStack()
        updates = await closing.enter_async_context(watching(resolver))
        await updates.until("a b c")
    async with closing:
        assert [u.endpoints for u in await updates.until_error("UNAVAILABLE")] == [None]
        async with serving(port) as restarted:
            seen = await updates.until("a b c")
            await restarted.register(user("b"))
            await restarted.register(user("d"))
            seen += await updates.until("a b c d")
            assert {of(update) for update in seen if update.endpoints is not None} == {"a b c", "a b c d"}


@pytest.mark.slow
async def test_what_does_not_register_again_is_let_go_in_the_end() -> None:
    async with serving() as registry:
        port = registry.port
        for each in "ab":
            await registry.register(user(each))
        closing = contextlib.AsyncExitStack()
        updates = await closing.enter_async_context(watching(eager(registry.address, hold=0.05)))
        await updates.until("a b")
    async with closing, serving(port) as restarted:
        await restarted.register(user("b"))
        await updates.until("b")


async def test_a_watch_that_is_cut_resumes_without_a_snapshot() -> None:
    positions: list[tuple[str, int]] = []

    async def watch(raw: bytes, context: Context) -> None:
        request = pb.WatchRequest.FromString(raw)
        positions.append((request.epoch, request.revision))
        step = pb.WatchResponse(epoch="e", revision=len(positions))
        if request.epoch:
            step.delta.upserted.append(user("b"))
        else:
            step.snapshot.instances.append(user("a"))
        await context.write(step.SerializeToString())
        await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    async with odd_registry(watch) as address, watching(eager(address)) as updates:
        await updates.until("a")
        await updates.until_error(f"registry {address}: UNAVAILABLE: cut")
        await updates.until("a b")
    assert positions[:2] == [("", 0), ("e", 1)]


GARBAGE = [
    (pb.WatchResponse().SerializeToString(), "it sent a message without a snapshot or delta"),
    (b"\xff\xff\xff", "it sent an invalid message"),
    (
        pb.WatchResponse(epoch="e", revision=1, delta=pb.Delta(upserted=[user("a")])).SerializeToString(),
        "it sent a delta to e/1 that doesn't follow /0",
    ),
    (
        pb.WatchResponse(epoch="e", snapshot=pb.Snapshot(instances=[instance("o", ORDER)])).SerializeToString(),
        f"it sent instance 'o' of service '{ORDER}', not '{USER}'",
    ),
    (None, "it ended the watch"),
]


@pytest.mark.parametrize(("garbage", "complaint"), GARBAGE)
async def test_garbage_from_a_registry_is_named_and_outlived(garbage: bytes | None, complaint: str) -> None:
    good = pb.WatchResponse(epoch="e", revision=1, snapshot=pb.Snapshot(instances=[user("a")])).SerializeToString()
    answers = iter([garbage, good])

    async def watch(_: bytes, context: Context) -> None:
        answer = next(answers, good)
        if answer is not None:
            await context.write(answer)
            await asyncio.get_running_loop().create_future()

    async with odd_registry(watch) as address, watching(eager(address)) as updates:
        update = await updates.next()
        assert update.endpoints is None
        assert update.error.startswith(f"registry {address}: {complaint}")
        assert of(await updates.next()) == "a"


async def test_the_sound_part_of_an_answer_is_used_beside_the_complaint() -> None:
    mixed = pb.WatchResponse(epoch="e", snapshot=pb.Snapshot(instances=[user("a"), instance("b", address=" ")]))

    async def watch(_: bytes, context: Context) -> None:
        await context.write(mixed.SerializeToString())
        await asyncio.get_running_loop().create_future()

    async with odd_registry(watch) as address, watching(eager(address)) as updates:
        assert (await updates.next()).error == f"registry {address}: it sent instance 'b' with address ' '"
        assert of(await updates.next()) == "a"


async def test_a_registry_that_answers_nothing_is_not_waited_for_without_end() -> None:
    async def watch(_: bytes, context: Context) -> None:
        await asyncio.get_running_loop().create_future()

    async with odd_registry(watch) as address, watching(eager(address, first_response_timeout=0.05)) as updates:
        update = await updates.next()
        assert update.error == f"registry {address}: no response within 0.05 s"
        assert not update.final, "calls wait for it until their deadline"


async def test_a_server_that_is_no_registry_says_so() -> None:
    async with odd_registry(None) as address, watching(eager(address)) as updates:
        assert (await updates.next()).error.startswith(f"registry {address}: UNIMPLEMENTED")


@contextlib.asynccontextmanager
async def odd_registry(watch: Callable[[bytes, Context], Awaitable[None]] | None) -> AsyncIterator[str]:
    """A server that does something else on Watch than a registry should; yields its address."""
    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Watch": grpc.unary_stream_rpc_method_handler(watch)} if watch else {}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("weft.mesh.v1.Registry", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
