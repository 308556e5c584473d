"""What goes wrong inside a channel is told to the calls that it affects, and goes no further."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh
import mesh.aio
from mesh import background
from mesh.discovery.resolver import Resolver, Update
from mesh.model import Endpoint
from tests.channel.suite import RESPONSES, UNARY, Server
from tests.processes import eventually

Failure: Any = grpc.RpcError
CODE = grpc.StatusCode

blocking: Any = mesh.insecure_channel
asynchronous: Any = mesh.aio.insecure_channel


# -- background tasks


class Flaky(Resolver):
    """Raises before its answers number ``fails``, then gives ``address``."""

    def __init__(self, address: str, *fails: int) -> None:
        self.runs = 0
        self.failed = threading.Event()
        self.later = asyncio.Event()
        self._address = address
        self._fails = fails

    async def updates(self) -> AsyncGenerator[Update, None]:
        self.runs += 1
        if self.runs in self._fails:
            self.failed.set()
            raise ValueError("boom")
        yield Update((Endpoint(self._address),))
        if self.runs + 1 in self._fails:
            await self.later.wait()
            self.failed.set()
            raise ValueError("later")
        await asyncio.get_running_loop().create_future()


def flaky(make: Callable[[str], Any], resolver: Resolver) -> Any:
    channel = make("static:///127.0.0.1:1")
    channel.assembly.pool._resolver = resolver
    return channel


def test_a_call_learns_why_discovery_failed(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    resolver = Flaky(server.address, 1, 2)
    with flaky(blocking, resolver) as channel:
        unary = channel.unary_unary(UNARY)
        begun = time.monotonic()
        with pytest.raises(Failure) as caught:
            unary(b"ok", timeout=10)
        assert time.monotonic() - begun < 5
        assert caught.value.code() is CODE.UNAVAILABLE
        assert "discovery failed: ValueError: boom; retrying in 0." in caught.value.details()
        assert unary(b"ok", timeout=10, wait_for_ready=True) == b"ok"  # it was restarted
        assert resolver.runs == 3
    assert sum("discovery failed: ValueError: boom" in record.getMessage() for record in caplog.records) == 1


async def test_an_aio_call_learns_why_discovery_failed(server: Server) -> None:
    resolver = Flaky(server.address, 1, 2)
    async with flaky(asynchronous, resolver) as channel:
        unary = channel.unary_unary(UNARY)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(b"ok", timeout=10)
        assert caught.value.code() is CODE.UNAVAILABLE
        assert "discovery failed: ValueError: boom; retrying in 0." in str(caught.value.details())
        assert await unary(b"ok", timeout=10, wait_for_ready=True) == b"ok"


def test_calls_go_on_with_the_last_endpoints_when_discovery_fails(server: Server) -> None:
    resolver = Flaky(server.address, 2, 3, 4, 5, 6, 7, 8)
    with flaky(blocking, resolver) as channel:
        unary = channel.unary_unary(UNARY)
        assert unary(b"ok", timeout=10) == b"ok"
        background.call(resolver.later.set)
        assert resolver.failed.wait(10)
        for _ in range(20):
            assert unary(b"ok", timeout=10) == b"ok"


def test_a_resolver_that_ends_without_an_answer_fails_calls(server: Server) -> None:
    class Ends(Resolver):
        async def updates(self) -> AsyncGenerator[Update, None]:
            return
            yield

    with flaky(blocking, Ends()) as channel, pytest.raises(Failure, match="ended without an update"):
        channel.unary_unary(UNARY)(b"ok", timeout=10)


@pytest.mark.parametrize("world", ["sync", "aio"])
def test_a_call_learns_why_connecting_failed(world: str, server: Server) -> None:
    """An option of a type that core doesn't take, which it says when an endpoint's channel is made."""

    class Odd:
        def __int__(self) -> int:
            raise ValueError("no number")

    options = [("grpc.odd", Odd())]
    if world == "sync":
        with blocking(f"static:///{server.address}", options) as channel, pytest.raises(Failure) as caught:
            channel.unary_unary(UNARY)(b"ok", timeout=10)
    else:

        async def call() -> None:
            async with asynchronous(f"static:///{server.address}", options) as channel:
                await channel.unary_unary(UNARY)(b"ok", timeout=10)

        with pytest.raises(Failure) as caught:
            asyncio.run(call())
    assert caught.value.code() is CODE.UNAVAILABLE
    assert "connecting failed: " in caught.value.details()


# -- users' code


def test_a_callback_that_blocks_stops_no_other_channel(server: Server, free_port: Callable[[], int]) -> None:
    """Of a future that fails while it waits, of one at its deadline, of a stream that fails."""
    blocked, release = threading.Semaphore(0), threading.Event()

    def block(*_: object) -> None:
        blocked.release()
        release.wait(30)

    silent = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{silent.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        stack.callback(silent.close)
        stack.callback(release.set)
        refusing: Any = stack.enter_context(blocking(f"static:///127.0.0.1:{free_port()}"))
        waiting: Any = stack.enter_context(blocking(f"static:///{address}"))
        failing: Any = stack.enter_context(blocking(f"static:///{server.address}"))
        calls = [
            refusing.unary_unary(UNARY).future(b"ok", timeout=10),
            waiting.unary_unary(UNARY).future(b"ok", timeout=0.05),
            failing.unary_stream(RESPONSES)(b"abort NOT_FOUND it", timeout=10),
        ]
        for call in calls:
            call.add_done_callback(block)
        for _ in calls:
            assert blocked.acquire(timeout=10)
        # Timers, discovery and states of other channels go on.
        with blocking(f"static:///{server.address}") as channel:
            assert channel.unary_unary(UNARY)(b"ok", timeout=5) == b"ok"
            late: Any = channel.unary_unary(UNARY).future(b"hang", timeout=0.1)
            assert late.code() is CODE.DEADLINE_EXCEEDED
        # And so do other calls of the same channel.
        assert failing.unary_unary(UNARY)(b"ok", timeout=5) == b"ok"
        assert waiting.unary_unary(UNARY).future(b"ok", timeout=0.05).code() is CODE.DEADLINE_EXCEEDED


def test_a_serializer_that_blocks_stops_no_other_channel(server: Server) -> None:
    """It is called when an endpoint is found, long after the call was made."""
    blocked, release = threading.Event(), threading.Event()

    def serialize(request: bytes) -> bytes:
        if threading.current_thread() is not threading.main_thread():
            blocked.set()
            release.wait(30)
        return request

    with blocking(f"static:///{server.address}") as channel:
        future: Any = channel.unary_unary(UNARY, request_serializer=serialize).future(b"ok", timeout=20)
        assert blocked.wait(10)
        with blocking(f"static:///{server.address}") as other:
            assert other.unary_unary(UNARY)(b"ok", timeout=5) == b"ok"
        release.set()
        assert future.result() == b"ok"


def test_callbacks_of_a_cancelled_call_run_on_another_thread(server: Server) -> None:
    """As with grpc: whoever cancels may hold a lock that the callback takes."""
    lock, done = threading.Lock(), threading.Event()

    def callback(_: object) -> None:
        with lock:
            done.set()

    plain: Any = grpc.insecure_channel
    for make, target in ((plain, server.address), (blocking, f"static:///{server.address}")):
        done.clear()
        with make(target) as channel:
            future: Any = channel.unary_unary(UNARY).future(b"hang", timeout=20)
            future.add_done_callback(callback)
            with lock:
                future.cancel()
            assert done.wait(10)


def test_a_callback_that_raises_is_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def callback(_: object) -> None:
        raise RuntimeError("in a callback")

    ran = threading.Event()
    with blocking(f"static:///{server.address}") as channel:
        future: Any = channel.unary_unary(UNARY).future(b"hang", timeout=20)
        future.add_done_callback(callback)
        future.add_done_callback(lambda _: ran.set())
        future.cancel()
        assert ran.wait(10)
    assert "in a callback" in caplog.text


def test_an_interrupt_in_a_callback_ends_no_thread_that_others_need(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(*_: object) -> None:
        raise SystemExit(3)

    ran = threading.Event()
    with blocking(f"static:///{server.address}") as channel:
        future: Any = channel.unary_unary(UNARY).future(b"hang", timeout=20)
        future.add_done_callback(leave)
        future.add_done_callback(lambda _: ran.set())
        future.cancel()
        assert ran.wait(10)
        background.call(leave)
        assert channel.unary_unary(UNARY).future(b"hang", timeout=0.05).code() is CODE.DEADLINE_EXCEEDED
    assert "the background thread was interrupted" in caplog.text


async def test_an_aio_callback_that_raises_keeps_no_other_from_running(server: Server) -> None:
    def callback(_: object) -> None:
        raise RuntimeError("in a callback")

    ran = asyncio.Event()
    async with asynchronous(f"static:///{server.address}") as channel:
        call = channel.unary_unary(UNARY)(b"ok", timeout=10)
        call.add_done_callback(callback)
        call.add_done_callback(lambda _: ran.set())
        assert await call == b"ok"
        await asyncio.wait_for(ran.wait(), 5)


# -- finalizers


class Cycle:
    """Garbage that only the collector frees."""

    def __init__(self, *holds: object) -> None:
        self.holds = holds
        self.itself = self


def collect(pool: Any) -> None:
    """Have garbage collected while the pool's lock is held."""
    pool._update_cluster(gc.collect)


def background_lives() -> None:
    done = threading.Event()
    background.call(done.set)
    assert done.wait(5), "the background thread hangs"


@pytest.mark.slow
def test_garbage_is_collected_while_a_lock_is_held(server: Server, silent: str) -> None:
    """Calls that wait, that run and that stream, and a channel: in the background thread, and in any other."""
    gc.disable()
    try:
        with blocking(f"static:///{silent}") as waiting, blocking(f"static:///{server.address}") as channel:
            Cycle(waiting.unary_unary(UNARY).future(b"ok", timeout=60))
            Cycle(channel.unary_unary(UNARY).future(b"hang", timeout=60))
            Cycle(channel.unary_stream(RESPONSES)(b"hang", timeout=60))
            server.wait_until_busy(2)
            background.call(functools.partial(collect, waiting.assembly.pool))
            server.wait_until_idle()  # the calls were cancelled
            background_lives()
            Cycle(waiting.unary_unary(UNARY).future(b"ok", timeout=60))
            with waiting.assembly.pool._lock:
                gc.collect()
        dropped = blocking(f"static:///{silent}")
        assert dropped.unary_unary(UNARY).future(b"ok", timeout=0.05).code() is CODE.DEADLINE_EXCEEDED
        pool = dropped.assembly.pool
        Cycle(dropped)
        del dropped
        background.call(functools.partial(collect, pool))
        eventually(lambda: pool.closed)
        eventually(lambda: not pool._subchannels)
        background_lives()
    finally:
        gc.enable()


@pytest.mark.slow
async def test_garbage_is_collected_while_a_lock_is_held_in_asyncio(server: Server, silent: str) -> None:
    gc.disable()
    try:
        async with asynchronous(f"static:///{server.address}") as channel:
            unary = channel.unary_unary(UNARY)
            assert await unary(b"ok", timeout=5) == b"ok"
            async with asynchronous(f"static:///{silent}") as waiting:
                Cycle(waiting.unary_unary(UNARY)(b"ok", timeout=60))
                Cycle(unary(b"hang", timeout=60))
                await asyncio.to_thread(server.wait_until_busy)
                collect(channel.assembly.pool)
                await asyncio.to_thread(server.wait_until_idle)
                assert await unary(b"ok", timeout=5) == b"ok"
                pool = waiting.assembly.pool
                Cycle(waiting.unary_unary(UNARY)(b"ok", timeout=60))
                with pool._lock:
                    gc.collect()
                # In another thread than the loop's.
                call = unary(b"hang", timeout=60)
                await asyncio.to_thread(server.wait_until_busy)
                Cycle(call)
                del call
                await asyncio.to_thread(gc.collect)
                await asyncio.to_thread(server.wait_until_idle)
    finally:
        gc.enable()


# -- endpoints that accept and say nothing


@pytest.fixture
def silent() -> Iterator[str]:
    """A host that accepts connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("world", ["sync", "aio"])
def test_endpoints_that_say_nothing_hold_up_no_healthy_one(world: str, server: Server) -> None:
    with contextlib.ExitStack() as stack:
        mute = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(20)]
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in mute]
        target = f"static:///{','.join([*addresses, server.address])}"
        begun = time.monotonic()
        if world == "sync":
            with blocking(target) as channel:
                assert channel.unary_unary(UNARY)(b"ok", timeout=30) == b"ok"
                took = time.monotonic() - begun
        else:

            async def call() -> float:
                async with asynchronous(target) as channel:
                    assert await channel.unary_unary(UNARY)(b"ok", timeout=30) == b"ok"
                    return time.monotonic() - begun

            took = asyncio.run(call())
        assert took < 2
