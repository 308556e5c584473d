"""When an asyncio call ends, and which event loop a channel belongs to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh
import mesh.aio
from tests.channel.suite import BOTH, REQUESTS, RESPONSES, UNARY, Server
from tests.processes import free_ports

TIMEOUT = 3

OPEN: dict[str, Callable[[str], Any]] = {
    "grpc": grpc.aio.insecure_channel,
    "mesh": lambda address: mesh.aio.insecure_channel(f"static:///{address}"),
}


@pytest.fixture
def dead() -> str:
    """An address that nothing listens on."""
    return f"127.0.0.1:{free_ports(1)[0]}"


CALLS: dict[str, Callable[[Any], Any]] = {
    "unary_unary": lambda channel: channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT),
    "unary_stream": lambda channel: channel.unary_stream(RESPONSES)(b"ok", timeout=TIMEOUT),
    "stream_unary": lambda channel: channel.stream_unary(REQUESTS)(timeout=TIMEOUT),
    "stream_stream": lambda channel: channel.stream_stream(BOTH)(timeout=TIMEOUT),
}


async def failing(library: str, channel: Any) -> None:
    """Have ``channel`` fail its calls at once, where it does that."""
    with pytest.raises(grpc.aio.AioRpcError):
        await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT)
    if library == "mesh":
        assert not channel.assembly.cluster.picker.queue


async def raised(awaitable: Any) -> Any:
    try:
        return await awaitable
    except Exception as error:
        return type(error).__mro__[-4:], error.code() if isinstance(error, grpc.aio.AioRpcError) else str(error)


# -- a call that fails at once


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("library", OPEN)
async def test_a_call_is_not_over_before_its_creator_has_it(library: str, kind: str, dead: str) -> None:
    async with OPEN[library](dead) as channel:
        await failing(library, channel)
        call = CALLS[kind](channel)
        assert not call.done()
        assert not call.cancelled()
        told: list[Any] = []
        call.add_done_callback(told.append)
        assert told == []
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert told == [call]
        call.add_done_callback(told.append)  # at once, as it is over
        assert told == [call, call]
        assert call.done()


@pytest.mark.parametrize("kind", ["stream_unary", "stream_stream"])
@pytest.mark.parametrize("library", OPEN)
async def test_a_write_to_a_call_that_fails_at_once_raises_its_status(library: str, kind: str, dead: str) -> None:
    async with OPEN[library](dead) as channel:
        await failing(library, channel)
        call = CALLS[kind](channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.write(b"ok")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(asyncio.InvalidStateError, match="RPC already finished"):
            await call.write(b"ok")  # it is known to be over by now
        await call.done_writing()


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("library", OPEN)
async def test_waiting_for_the_connection_of_a_call_that_fails_at_once_raises_its_status(
    library: str, kind: str, dead: str
) -> None:
    async with OPEN[library](dead) as channel:
        await failing(library, channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await CALLS[kind](channel).wait_for_connection()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("library", OPEN)
async def test_a_call_that_would_fail_at_once_can_be_cancelled_before(library: str, kind: str, dead: str) -> None:
    async with OPEN[library](dead) as channel:
        await failing(library, channel)
        call = CALLS[kind](channel)
        told: list[Any] = []
        call.add_done_callback(told.append)
        assert call.cancel()
        assert told == [call]
        assert await call.code() is grpc.StatusCode.CANCELLED
        assert call.cancelled()
        await asyncio.sleep(0)  # the turn in which it would have failed
        assert told == [call]


async def test_metadata_that_cannot_be_sent_fails_a_call_when_its_creator_has_it(server: Server) -> None:
    async with OPEN["mesh"](server.address) as channel:
        await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT, wait_for_ready=True)
        call = channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT, metadata=(("X-Upper", "1"),))
        assert not call.done()
        with pytest.raises(grpc.aio.AioRpcError, match="Invalid metadata"):
            await call


# -- event loops


@pytest.mark.parametrize("library", OPEN)
async def test_a_channel_shows_its_loop(library: str, server: Server) -> None:
    async with OPEN[library](server.address) as channel:
        assert channel._loop is asyncio.get_running_loop()
        await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT, wait_for_ready=True)
        assert channel._loop is asyncio.get_running_loop()


USES: dict[str, Callable[[Any], Any]] = {
    "unary_unary": lambda channel: channel.unary_unary(UNARY)(b"ok"),
    "unary_stream": lambda channel: channel.unary_stream(RESPONSES)(b"ok").read(),
    "stream_unary": lambda channel: channel.stream_unary(REQUESTS)(iter([b"ok"])),
    "stream_stream": lambda channel: channel.stream_stream(BOTH)().write(b"ok"),
    "get_state": lambda channel: channel.get_state(try_to_connect=True),
    "channel_ready": lambda channel: channel.channel_ready(),
    "wait_for_state_change": lambda channel: channel.wait_for_state_change(channel.get_state()),
}


async def _use(channel: Any, use: Callable[[Any], Any]) -> Any:
    result = use(channel)
    return await result if hasattr(result, "__await__") else result


@pytest.mark.parametrize("target", ["static:///", ""])
@pytest.mark.parametrize("use", USES)
def test_a_channel_that_is_used_from_a_second_loop_says_at_once_which_it_belongs_to(
    use: str, target: str, server: Server
) -> None:
    channel: Any = mesh.aio.insecure_channel(f"{target}{server.address}")

    async def first() -> int:
        assert await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT, wait_for_ready=True) == b"ok"
        return id(asyncio.get_running_loop())

    async def second() -> None:
        with pytest.raises(RuntimeError, match=f"belongs to another event loop, .*closed=True.* at {loop:#x}"):
            await asyncio.wait_for(_use(channel, USES[use]), 1)
        await channel.close()
        await channel.close()
        assert channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN

    loop = asyncio.run(first())
    asyncio.run(second())


def test_a_channel_whose_loop_runs_in_another_thread_is_neither_used_nor_closed_from_here(server: Server) -> None:
    channel: Any = mesh.aio.insecure_channel(f"static:///{server.address}")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def there(awaitable: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(awaitable, loop).result(TIMEOUT)

    async def call() -> bytes:
        return await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT, wait_for_ready=True)  # type: ignore[no-any-return]

    async def here() -> None:
        for wrong in (call(), channel.close()):
            with pytest.raises(RuntimeError, match=f"belongs to another event loop, .*running=True.* at {id(loop):#x}"):
                await wrong

    assert there(call()) == b"ok"
    asyncio.run(here())
    assert there(call()) == b"ok"  # it is as it was
    there(channel.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _through_an_interceptor(server: Server, channel: Any) -> None:
    with pytest.raises(RuntimeError, match="belongs to another event loop"):
        await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT)


class Passing(grpc.aio.UnaryUnaryClientInterceptor):
    """Does nothing."""

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(client_call_details, request)


def test_a_channel_with_interceptors_says_at_once_which_loop_it_belongs_to(server: Server) -> None:
    channel: Any = mesh.aio.insecure_channel(f"static:///{server.address}", interceptors=[Passing()])

    async def first() -> None:
        assert await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT, wait_for_ready=True) == b"ok"

    asyncio.run(first())
    asyncio.run(_through_an_interceptor(server, channel))
    asyncio.run(channel.close())


def test_a_blocking_channel_belongs_to_no_loop(server: Server) -> None:
    with mesh.insecure_channel(f"static:///{server.address}") as channel:
        unary: Any = channel.unary_unary(UNARY)

        async def call() -> bytes:
            return unary(b"ok", timeout=TIMEOUT, wait_for_ready=True)  # type: ignore[no-any-return]

        assert asyncio.run(call()) == asyncio.run(call()) == unary(b"ok", timeout=TIMEOUT) == b"ok"
