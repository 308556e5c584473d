"""What a server's observer is told: of each call once, handled or refused, in both worlds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import grpc
import pytest

import mesh.server.aio
import mesh.server.sync
from mesh.observe import ServerObserver
from mesh.policy.server.reasons import Reason
from mesh.server.settings import ServerSettings

NAME = "test.Observed"
BOUND = 15.0
CANCELLED, INVALID, LATE, NOT_FOUND, INTERNAL, UNAVAILABLE = 1, 3, 4, 5, 13, 14


class Telling(ServerObserver):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, int]] = []
        self.refusals: list[tuple[str, str]] = []
        self.seconds: list[float] = []

    def handled(self, method: str, code: int, seconds: float) -> None:
        self.ended.append((method.rpartition("/")[2], code))
        self.seconds.append(seconds)

    def refused(self, method: str, reason: str) -> None:
        self.refusals.append((method.rpartition("/")[2], reason))


class Raising(ServerObserver):
    """Fails at whatever it is told."""

    def handled(self, method: str, code: int, seconds: float) -> None:
        raise RuntimeError("handled")

    def refused(self, method: str, reason: str) -> None:
        raise RuntimeError("refused")


class Handlers:
    """A service that does what the request says; Stream answers twice, whatever becomes of it after."""

    def __init__(self) -> None:
        self.running = threading.Event()

    def unary(self, request: bytes, context: Any) -> bytes:
        match request:
            case b"abort":
                context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
            case b"raise":
                raise ZeroDivisionError
            case b"set":
                context.set_code(grpc.StatusCode.NOT_FOUND)
            case b"hold":
                gone = threading.Event()
                assert context.add_callback(gone.set)
                self.running.set()
                assert gone.wait(BOUND)
        return b"done"

    async def aunary(self, request: bytes, context: Any) -> bytes:
        if request == b"abort":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        if request == b"hold":
            self.running.set()
            await asyncio.Event().wait()
        return self.unary(request, context)

    def stream(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield b"one"
        yield self.unary(request, context)
        while request == b"endless":
            yield b"more"

    async def astream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"one"
        yield await self.aunary(request, context)
        while request == b"endless":
            yield b"more"
            await asyncio.sleep(0)

    def upload(self, requests: Iterator[bytes], context: Any) -> bytes:
        return b"".join(requests)

    async def aupload(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([request async for request in requests])

    def add(self, world: str, server: Any) -> None:
        is_aio = world == "aio"
        handlers: dict[str, Any] = {
            "Unary": grpc.unary_unary_rpc_method_handler(
                self.aunary if is_aio else self.unary, request_deserializer=parsed
            ),
            "Stream": grpc.unary_stream_rpc_method_handler(self.astream if is_aio else self.stream),
            "Upload": grpc.stream_unary_rpc_method_handler(self.aupload if is_aio else self.upload),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
        server.add_registered_method_handlers(NAME, handlers)


def parsed(request: bytes) -> bytes:
    if request == b"garbage":
        raise ValueError(request)
    return request


class Client:
    def __init__(self, channel: grpc.aio.Channel, server: Any, handlers: Handlers) -> None:
        self.server = server
        self.handlers = handlers
        self.unary: Any = channel.unary_unary(f"/{NAME}/Unary")
        self.stream: Any = channel.unary_stream(f"/{NAME}/Stream")
        self.upload: Any = channel.stream_unary(f"/{NAME}/Upload")

    async def fails(self, call: Any) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return caught.value.code()


Serve = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture(params=["aio", "sync"])
def world(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def serve(world: str) -> Serve:
    @asynccontextmanager
    async def serving(observer: ServerObserver, **settings: Any) -> AsyncIterator[Client]:
        handlers = Handlers()
        told = ServerSettings(listen="127.0.0.1:0", drain_wait=0, observer=observer, **settings)
        kind = mesh.server.aio.Server if world == "aio" else mesh.server.sync.Server
        server: Any = kind([(lambda _, server: handlers.add(world, server), None)], told)
        await server.start() if world == "aio" else await asyncio.to_thread(server.start)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                yield Client(channel, server, handlers)
        finally:
            await server.drain() if world == "aio" else await asyncio.to_thread(server.drain)
            await asyncio.get_running_loop().shutdown_default_executor()

    return serving


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(BOUND):
        while not condition():  # noqa: ASYNC110 - what is told on a thread wakes no loop
            await asyncio.sleep(0.005)


async def test_each_call_is_told_of_once_with_the_status_that_its_client_got(serve: Serve) -> None:
    observer = Telling()
    async with serve(observer) as client:
        assert await client.unary(b"fine", timeout=BOUND) == b"done"
        for request in (b"abort", b"raise", b"set", b"garbage"):
            await client.fails(client.unary(request, timeout=BOUND))
        await until(lambda: len(observer.ended) == 5)
    assert observer.ended == [("Unary", code) for code in (0, NOT_FOUND, INTERNAL, NOT_FOUND, INVALID)]
    assert not observer.refusals
    assert min(observer.seconds) >= 0


async def test_streams_are_told_of_when_they_have_ended(serve: Serve) -> None:
    observer = Telling()
    async with serve(observer) as client:
        call = client.stream(b"fine", timeout=BOUND)
        assert [message async for message in call] == [b"one", b"done"]
        for request in (b"abort", b"raise"):
            failing = client.stream(request, timeout=BOUND)
            with pytest.raises(grpc.aio.AioRpcError):
                [message async for message in failing]
        assert await client.upload(iter([b"a", b"b"]), timeout=BOUND) == b"ab"
        await until(lambda: len(observer.ended) == 4)
    assert observer.ended == [("Stream", 0), ("Stream", NOT_FOUND), ("Stream", INTERNAL), ("Upload", 0)]


async def test_a_caller_that_is_gone_is_told_of_as_cancelled_or_as_late(serve: Serve) -> None:
    observer = Telling()
    async with serve(observer) as client:
        call = client.unary(b"hold", timeout=BOUND)
        await until(client.handlers.running.is_set)
        call.cancel()
        await until(lambda: observer.ended)
        assert await client.fails(client.unary(b"hold", timeout=0.1)) is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: len(observer.ended) == 2)
    # The server's deadline is the later one by the request's way to it: what comes first then is the client's cancel.
    assert observer.ended[0] == ("Unary", CANCELLED)
    assert observer.ended[1] in (("Unary", CANCELLED), ("Unary", LATE))


async def test_a_refused_call_is_told_of_as_refused_and_not_as_handled(serve: Serve) -> None:
    observer = Telling()
    async with serve(observer) as client:
        client.server.admission.policy.close(Reason.STARTING)
        await client.fails(client.unary(b"fine", timeout=BOUND))
        with pytest.raises(grpc.aio.AioRpcError):
            [message async for message in client.stream(b"fine", timeout=BOUND)]
        client.server.admission.policy.open()
        assert await client.unary(b"fine", timeout=BOUND) == b"done"
        await until(lambda: observer.ended and len(observer.refusals) == 2)
    assert observer.refusals == [("Unary", "starting"), ("Stream", "starting")]
    assert observer.ended == [("Unary", 0)]


async def test_a_stream_that_a_drain_cuts_was_handled_and_ended_unavailable(serve: Serve, world: str) -> None:
    observer = Telling()
    async with serve(observer, stream_grace=0, grace=5) as client:
        call = client.stream(b"endless", timeout=BOUND)
        messages = aiter(call)
        assert await anext(messages) == b"one"
        drained = asyncio.ensure_future(
            client.server.drain() if world == "aio" else asyncio.to_thread(client.server.drain)
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [message async for message in messages]
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await drained
    assert (observer.ended, observer.refusals) == ([("Stream", UNAVAILABLE)], [])


async def test_an_observer_that_raises_is_logged_and_harms_nobody(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(Raising()) as client:
        assert await client.unary(b"fine", timeout=BOUND) == b"done"
        assert await client.fails(client.unary(b"abort", timeout=BOUND)) is grpc.StatusCode.NOT_FOUND
        assert [message async for message in client.stream(b"fine", timeout=BOUND)] == [b"one", b"done"]
        client.server.admission.policy.close(Reason.STARTING)
        assert await client.fails(client.unary(b"fine", timeout=BOUND)) is grpc.StatusCode.UNAVAILABLE
        client.server.admission.policy.open()
        assert await client.unary(b"fine", timeout=BOUND) == b"done"
    told = [record for record in caplog.records if "the observer failed" in record.message]
    assert len(told) == 5
    assert all(record.name == "mesh.server" for record in told)
