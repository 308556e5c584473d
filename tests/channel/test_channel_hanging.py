"""One of three replicas deadlocks: it accepts calls and answers none. Few calls wait for it, in both worlds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh
import mesh.aio

METHOD, WATCH, STREAM = "/test.Hanging/Unary", "/test.Hanging/Watch", "/test.Hanging/Stream"
TIMEOUT = 0.2  # seconds
RETRIES = {
    "maxAttempts": 3,
    "initialBackoff": "0.001s",
    "maxBackoff": "0.001s",
    "backoffMultiplier": 1,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


class Replica(grpc.GenericRpcHandler):
    """A server of this process; a ``deadlocked`` one's handlers wait for a lock that is never free."""

    def __init__(self, *, deadlocked: bool) -> None:
        self.lock = threading.Lock()
        if deadlocked:
            self.lock.acquire()
        self.threads = futures.ThreadPoolExecutor(100)
        self.server = grpc.server(self.threads, handlers=[self])
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method == STREAM:
            return grpc.unary_stream_rpc_method_handler(self._stream)
        if handler_call_details.method == WATCH:
            return grpc.unary_stream_rpc_method_handler(self._watch)
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _watch(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield request
        over = threading.Event()
        if context.add_callback(over.set):
            over.wait(10)

    def _stream(self, request: bytes, _: grpc.ServicerContext) -> Iterator[bytes]:
        with self.lock:
            yield request
        time.sleep(2 * TIMEOUT)  # longer than a stream may take to begin
        yield request

    def _answer(self, request: bytes, _: grpc.ServicerContext) -> bytes:
        with self.lock:
            return request


@pytest.fixture
def target() -> Iterator[str]:
    replicas = [Replica(deadlocked=index == 0) for index in range(3)]
    yield "static:///" + ",".join(replica.address for replica in replicas)
    replicas[0].lock.release()
    for replica in replicas:
        replica.server.stop(None).wait()
        replica.threads.shutdown()


def config(**method: object) -> list[tuple[str, str]]:
    text = {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [{"name": [{}], **method}]}
    return [("grpc.service_config", json.dumps(text))]


def calls(world: str, target: str, options: Any, count: int, timeout: float) -> list[tuple[grpc.StatusCode, float]]:
    """How so many calls, one after the other, ended, and how long each took."""

    async def in_asyncio() -> list[tuple[grpc.StatusCode, float]]:
        ended = []
        async with mesh.aio.insecure_channel(target, options) as channel:
            await asyncio.wait_for(channel.channel_ready(), 10)
            call: Callable[..., Awaitable[bytes]] = channel.unary_unary(METHOD)
            for _ in range(count):
                begun, code = time.monotonic(), grpc.StatusCode.OK
                try:
                    await call(b"x", timeout=timeout)
                except grpc.aio.AioRpcError as error:
                    code = error.code()
                ended.append((code, time.monotonic() - begun))
        return ended

    if world == "aio":
        return asyncio.run(in_asyncio())
    ended = []
    with mesh.insecure_channel(target, options) as channel:
        grpc.channel_ready_future(channel).result(10)
        call: Any = channel.unary_unary(METHOD)
        for _ in range(count):
            begun, code = time.monotonic(), grpc.StatusCode.OK
            try:
                call(b"x", timeout=timeout)
            except grpc.RpcError as error:
                failure: Any = error
                code = failure.code()
            ended.append((code, time.monotonic() - begun))
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("world", ["sync", "aio"])
def test_three_calls_that_run_to_their_deadline_are_enough_to_leave_it(world: str, target: str) -> None:
    codes = [code for code, _ in calls(world, target, config(), 60, TIMEOUT)]
    # The background thread ejects it right after the third; one more call may have been picked by then.
    assert codes.count(grpc.StatusCode.DEADLINE_EXCEEDED) in (3, 4)
    assert set(codes[-40:]) == {grpc.StatusCode.OK}


@pytest.mark.slow
@pytest.mark.parametrize("world", ["sync", "aio"])
def test_with_an_attempt_timeout_and_retries_no_call_fails(world: str, target: str) -> None:
    options = config(attemptTimeout=f"{TIMEOUT}s", retryPolicy=RETRIES)
    ended = calls(world, target, options, 60, 10.0)
    assert {code for code, _ in ended} == {grpc.StatusCode.OK}
    waited = [took for _, took in ended if took >= TIMEOUT]
    assert len(waited) in (3, 4)
    assert max(waited) < 10 * TIMEOUT


@pytest.mark.slow
@pytest.mark.parametrize("world", ["sync", "aio"])
def test_watches_that_last_to_their_deadline_eject_nobody(world: str, target: str) -> None:
    async def in_asyncio() -> Any:
        async with mesh.aio.insecure_channel(target, config()) as channel:
            watch: Any = channel.unary_stream(WATCH)
            for _ in range(12):
                call = watch(b"x", timeout=0.2, wait_for_ready=True)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for _ in call:
                        pass
                assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            opened: Any = channel
            return opened.assembly.cluster

    if world == "aio":
        cluster = asyncio.run(in_asyncio())
    else:
        with mesh.insecure_channel(target, config()) as channel:
            watch: Any = channel.unary_stream(WATCH)
            for _ in range(12):
                call = watch(b"x", timeout=0.2, wait_for_ready=True)
                with contextlib.suppress(grpc.RpcError):
                    list(call)
                assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            opened: Any = channel
            cluster = opened.assembly.cluster
    assert dict(cluster.ejections.counts) == {}
    assert [node.failures for node in cluster.nodes.values()] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("world", ["sync", "aio"])
def test_streams_that_do_not_begin_in_time_are_taken_by_another_replica(world: str, target: str) -> None:
    options = config(retryPolicy={**RETRIES, "perAttemptRecvTimeout": f"{TIMEOUT}s"})

    async def in_asyncio() -> list[list[bytes]]:
        async with mesh.aio.insecure_channel(target, options) as channel:
            await asyncio.wait_for(channel.channel_ready(), 10)
            stream: Any = channel.unary_stream(STREAM)
            streams = [stream(b"x", timeout=10) for _ in range(6)]
            return [[response async for response in each] for each in streams]

    if world == "aio":
        responses = asyncio.run(in_asyncio())
    else:
        with mesh.insecure_channel(target, options) as channel:
            grpc.channel_ready_future(channel).result(10)
            stream: Any = channel.unary_stream(STREAM)
            # Those that are read last have begun long before.
            responses = [list(each) for each in [stream(b"x", timeout=10) for _ in range(6)]]
    assert responses == [[b"x", b"x"]] * 6
