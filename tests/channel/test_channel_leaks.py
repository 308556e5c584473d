"""What calls, stubs and channels leave when they are over: nothing. (All of it together, for longer: tests/faults.)"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh
import mesh.aio
from mesh import background
from mesh.channel.subchannel import Method
from mesh.server.handlers.registrar import HandlerCache
from tests.channel.suite import BOTH, REQUESTS, RESPONSES, UNARY, Server
from tests.processes import eventually

DEADLINE = 600.0  # of calls that are over long before


def _timers(loop: Any) -> int:
    return sum(not timer.cancelled() for timer in loop._scheduled)


def _count(kind: type) -> int:
    gc.collect()
    return sum(isinstance(each, kind) for each in gc.get_objects())


@pytest.fixture(params=["static", "plain"])
def target(request: pytest.FixtureRequest, server: Server) -> str:
    return f"static:///{server.address}" if request.param == "static" else server.address


async def test_a_call_that_waited_for_its_endpoint_leaves_no_timer(server: Server) -> None:
    loop = asyncio.get_running_loop()
    channel: Any = mesh.aio.insecure_channel(f"static:///{server.address}")
    async with channel:
        calls = [channel.unary_unary(UNARY)(b"ok", timeout=DEADLINE) for _ in range(10)]  # nothing is connected yet
        assert await asyncio.gather(*calls) == [b"ok"] * 10
        assert _timers(loop) <= 1  # the pool's tick


def test_a_future_that_waited_for_its_endpoint_leaves_no_timer(server: Server) -> None:
    channel: Any = mesh.insecure_channel(f"static:///{server.address}")
    with channel:
        futures = [channel.unary_unary(UNARY).future(b"ok", timeout=DEADLINE) for _ in range(10)]
        assert [future.result() for future in futures] == [b"ok"] * 10
        due: Any = background.loop()
        eventually(
            lambda: not any("Timer._run" in repr(timer) for timer in list(due._scheduled) if not timer.cancelled())
        )


async def test_messages_that_were_written_leave_nothing_behind(server: Server) -> None:
    channel: Any = mesh.aio.insecure_channel(f"static:///{server.address}")
    async with channel:
        stream = channel.stream_stream(BOTH)(timeout=DEADLINE)
        for _ in range(50):
            await stream.write(b"ok")
            assert await stream.read() == b"ok"
        assert len(stream._driver._waiting) <= 1
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF


async def test_waits_that_were_given_up_leave_nothing_behind(server: Server) -> None:
    channel: Any = mesh.aio.insecure_channel(f"static:///{server.address}")
    async with channel:
        call = channel.unary_unary(UNARY)(b"hang", timeout=DEADLINE)
        for _ in range(20):
            waiting = asyncio.ensure_future(call.code())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert not call._driver._waiting
        call.cancel()


@pytest.mark.parametrize("retried", [False, True])
def test_a_stub_for_each_call_leaves_nothing_in_the_channel(retried: bool, target: str) -> None:
    retry = {"maxAttempts": 2, "initialBackoff": "0.001s", "maxBackoff": "0.001s", "backoffMultiplier": 1,
             "retryableStatusCodes": ["ABORTED"]}  # fmt: skip
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": retry}]})
    before = _count(Method)
    channel: Any = mesh.insecure_channel(target, options=[("grpc.service_config", config)])
    with channel:
        for _ in range(20):
            stub = channel.unary_unary(UNARY, lambda message: message, lambda message: message)
            if retried:
                with pytest.raises(grpc.RpcError):
                    stub(b"abort ABORTED no", timeout=5)
            else:
                assert stub(b"ok", timeout=5) == b"ok"
        del stub
        eventually(lambda: _count(Method) <= before)
        assert not channel.assembly._methods


def test_a_stub_that_outlives_its_endpoints_channel_keeps_none_of_its_calls(server: Server) -> None:
    channel: Any = mesh.insecure_channel(f"static:///{server.address}")
    with channel:
        stub = channel.unary_unary(UNARY)
        assert stub(b"ok", timeout=5) == b"ok"
        assert len(stub._method.calls) == 1
    eventually(lambda: not stub._method.calls)


@pytest.mark.slow
async def test_channels_that_waited_and_were_closed_or_dropped_leave_no_descriptor(server: Server) -> None:
    async def use(close: bool) -> None:
        channel: Any = mesh.aio.insecure_channel(f"static:///{server.address}")
        assert await channel.unary_unary(UNARY)(b"ok", timeout=DEADLINE) == b"ok"
        early = channel.unary_stream(RESPONSES)(b"count 1 hang", timeout=DEADLINE)
        assert await early.read() == b"0"
        if close:
            await channel.close()

    def held() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    async def at_base(base: int, tasks: int) -> bool:
        for _ in range(500):
            gc.collect()
            if held() <= base and len(asyncio.all_tasks()) <= tasks:
                return True
            await asyncio.sleep(0.01)  # between two looks
        return False

    async with grpc.aio.insecure_channel(server.address):  # grpc.aio's own, in use throughout
        await use(close=True)
        base, tasks = held() + 2, len(asyncio.all_tasks())
        for close in (True, False):
            for _ in range(20):
                await use(close)
            assert await at_base(base, tasks), (held(), base, len(asyncio.all_tasks()), tasks)


@pytest.mark.slow
def test_blocking_channels_that_were_dropped_leave_no_descriptor_and_no_thread(server: Server) -> None:
    def use() -> None:
        channel: Any = mesh.insecure_channel(f"static:///{server.address}")
        assert channel.unary_unary(UNARY)(b"ok", timeout=DEADLINE) == b"ok"
        channel.unary_unary(UNARY).future(b"hang", timeout=DEADLINE)

    def held() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    use()
    eventually(lambda: held() and threading.active_count())
    base = held() + 2
    for _ in range(20):
        use()
    eventually(lambda: held() <= base, what="all but a few descriptors closed")


def test_a_server_keeps_no_more_wrapped_handlers_than_it_has_methods() -> None:
    cache = HandlerCache(lambda handler, _: handler)
    handlers: list[Any] = [grpc.unary_unary_rpc_method_handler(_echo(number)) for number in range(1001)]
    for number, handler in enumerate(handlers):
        assert cache(f"/any.Any{number}/Method", handler) is handler
    assert len(cache._known) == 1000


def _echo(number: int) -> Callable[[bytes, Any], bytes]:
    return lambda request, context: request


@pytest.mark.parametrize("make", [grpc.aio.insecure_channel, mesh.aio.insecure_channel], ids=["grpc", "mesh"])
async def test_the_callers_requests_end_with_the_call_though_the_call_object_is_kept(make: Any, server: Server) -> None:
    ended = asyncio.Event()

    async def forever() -> AsyncIterator[bytes]:
        try:
            yield b"abort ABORTED enough"
            while True:
                yield b"."
                await asyncio.sleep(0)
        finally:
            ended.set()

    async with make(server.address) as channel:
        call = channel.stream_unary(REQUESTS)(forever(), timeout=5)
        assert await call.code() is not grpc.StatusCode.OK
        await asyncio.wait_for(ended.wait(), 5)
        assert call.done()
