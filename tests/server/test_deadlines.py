"""A handler in both worlds and of all kinds: its deadline, its cancellation, a plain end to what goes wrong in it."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from contextvars import copy_context
from typing import Any

import grpc
import pytest

import mesh.context
from mesh.server.handlers.interceptors import AioServerInterceptor, ServerInterceptor
from mesh.server.handlers.wrap import wrap_aio, wrap_sync
from mesh.server.thread_pool import ThreadPool

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class One(grpc.GenericRpcHandler):
    """Serves every method with one handler; bytes in, bytes out."""

    def __init__(self, kind: str, behavior: Callable[..., Any]) -> None:
        self.handler = getattr(grpc, f"{kind}_rpc_method_handler")(behavior)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self.handler


@contextmanager
def threaded(kind: str, behavior: Callable[..., Any]) -> Iterator[grpc.Channel]:
    pool = ThreadPoolExecutor(4)
    server = grpc.server(pool, handlers=[One(kind, behavior)], interceptors=[ServerInterceptor()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        server.stop(None).wait(5)
        pool.shutdown()


@asynccontextmanager
async def asynchronous(kind: str, behavior: Callable[..., Any]) -> AsyncIterator[grpc.aio.Channel]:
    pool = ThreadPool(4)
    server = grpc.aio.server(handlers=[One(kind, behavior)], interceptors=[AioServerInterceptor(pool)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)
        pool.shutdown()
        await asyncio.get_running_loop().shutdown_default_executor()


def call(channel: grpc.Channel, kind: str, **kwargs: Any) -> list[bytes]:
    """Call with one request, or two on a stream; the responses."""
    request: Any = iter([b"a", b"b"]) if kind.startswith("stream") else b"a"
    answer = getattr(channel, kind)("/test/Method")(request, **{"timeout": 20, **kwargs})
    return list(answer) if kind.endswith("stream") else [answer]


async def acall(channel: grpc.aio.Channel, kind: str, **kwargs: Any) -> list[bytes]:
    request: Any = iter([b"a", b"b"]) if kind.startswith("stream") else b"a"
    answer: Any = getattr(channel, kind)("/test/Method")(request, **{"timeout": 20, **kwargs})
    return [response async for response in answer] if kind.endswith("stream") else [await answer]


def left() -> bytes:
    """What a handler sees of its deadline: "near" when it is the caller's 20 s."""
    remaining = mesh.context.remaining()
    return b"none" if remaining is None else b"near" if 10 < remaining <= 20.1 else str(remaining).encode()


# Handlers of every kind that answer with what they see, streams at each step.
def sync_handlers(kind: str) -> Callable[..., Any]:
    def unary_unary(request: bytes, context: Any) -> bytes:
        return left()

    def unary_stream(request: bytes, context: Any) -> Iterator[bytes]:
        for _ in range(2):
            yield left()

    def stream_unary(requests: Iterator[bytes], context: Any) -> bytes:
        return b",".join(left() for _ in requests)

    def stream_stream(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for _ in requests:
            yield left()

    handlers: dict[str, Callable[..., Any]] = {
        "unary_unary": unary_unary,
        "unary_stream": unary_stream,
        "stream_unary": stream_unary,
        "stream_stream": stream_stream,
    }
    return handlers[kind]


def async_handlers(kind: str) -> Callable[..., Any]:
    async def unary_unary(request: bytes, context: Any) -> bytes:
        await asyncio.sleep(0)
        return left()

    async def unary_stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(2):
            await asyncio.sleep(0)
            yield left()

    async def stream_unary(requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b",".join([left() async for _ in requests])

    async def stream_stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for _ in requests:
            yield left()

    handlers: dict[str, Callable[..., Any]] = {
        "unary_unary": unary_unary,
        "unary_stream": unary_stream,
        "stream_unary": stream_unary,
        "stream_stream": stream_stream,
    }
    return handlers[kind]


async def reading_and_writing(_: Any, context: Any) -> None:
    while await context.read() is not grpc.aio.EOF:
        await context.write(left())


def expected(kind: str, seen: bytes) -> list[bytes]:
    return {
        "unary_unary": [seen],
        "unary_stream": [seen, seen],
        "stream_unary": [seen + b"," + seen],
        "stream_stream": [seen, seen],
    }[kind]


class TestDeadline:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_threaded_handler_sees_what_remains_at_every_step(self, kind: str) -> None:
        with threaded(kind, sync_handlers(kind)) as channel:
            assert call(channel, kind) == expected(kind, b"near")
            assert call(channel, kind, timeout=None) == expected(kind, b"none")

    @pytest.mark.parametrize("kind", KINDS)
    async def test_an_async_handler_sees_what_remains_at_every_step(self, kind: str) -> None:
        async with asynchronous(kind, async_handlers(kind)) as channel:
            assert await acall(channel, kind) == expected(kind, b"near")
            assert await acall(channel, kind, timeout=None) == expected(kind, b"none")

    @pytest.mark.parametrize("kind", KINDS)
    async def test_a_handler_that_is_not_async_sees_it_on_an_aio_server(self, kind: str) -> None:
        async with asynchronous(kind, sync_handlers(kind)) as channel:
            assert await acall(channel, kind) == expected(kind, b"near")
            assert await acall(channel, kind, timeout=None) == expected(kind, b"none")

    async def test_a_handler_that_reads_and_writes_sees_it(self) -> None:
        async with asynchronous("stream_stream", reading_and_writing) as channel:
            assert await acall(channel, "stream_stream") == [b"near", b"near"]

    async def test_two_calls_at_once_have_a_deadline_each(self) -> None:
        both = asyncio.Barrier(2)

        async def handler(request: bytes, context: Any) -> bytes:
            await both.wait()
            return str(round((mesh.context.remaining() or 0) / 100)).encode()

        async with asynchronous("unary_unary", handler) as channel:
            called = method(channel, "unary_unary")
            assert list(await asyncio.gather(called(b"", timeout=100), called(b"", timeout=300))) == [b"1", b"3"]

    def test_no_scope_is_left_behind_in_the_thread(self) -> None:
        assert mesh.context.current() is None


class TestRetryMark:
    """A call made while handling an attempt that is itself a retry doesn't retry."""

    @pytest.mark.parametrize(
        ("metadata", "is_retry"),
        [
            ((), b"False"),
            ((("weft-attempt", "1"),), b"True"),
            ((("weft-attempt", "0"),), b"False"),
            ((("weft-attempt", "many"),), b"False"),
            ((("weft-attempt", "9" * 4301),), b"False"),
            ((("weft-attempt", "999999999"),), b"True"),
        ],
    )
    async def test_a_handler_knows_that_its_call_is_a_retry(self, metadata: Any, is_retry: bytes) -> None:
        def told(request: bytes, context: Any) -> bytes:
            scope = mesh.context.current()
            assert scope is not None
            return str(scope.is_retry).encode()

        async def atold(request: bytes, context: Any) -> bytes:
            return told(request, context)

        with threaded("unary_unary", told) as channel:
            assert call(channel, "unary_unary", metadata=metadata) == [is_retry]
        async with asynchronous("unary_unary", atold) as achannel:
            assert await acall(achannel, "unary_unary", metadata=metadata) == [is_retry]

    def test_gRPC_s_own_mark_counts(self) -> None:  # noqa: N802
        def told(request: bytes, context: Any) -> bytes:
            scope = mesh.context.current()
            assert scope is not None
            return str(scope.is_retry).encode()

        handler = wrap_sync(grpc.unary_unary_rpc_method_handler(told))

        class Context:
            def time_remaining(self) -> float:
                return 9.2e18

            def invocation_metadata(self) -> Any:
                return (("grpc-previous-rpc-attempts", "2"),)

            def add_callback(self, callback: Any) -> bool:
                return True

        try:
            assert handler.unary_unary(b"", Context()) == b"True"
        finally:
            mesh.context.enter(None)


# -- cancellation -----------------------------------------------------------------------------------------------------
def method(channel: Any, kind: str) -> Any:
    return getattr(channel, kind)("/test/Method")


class Child:
    """Stands for a call that a handler has made."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()

    def begin(self) -> None:
        scope = mesh.context.current()
        assert scope is not None
        scope.adopt(self, self.cancelled.set)
        self.begun.set()


class TestCancellation:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_cancelling_a_call_cancels_those_of_its_threaded_handler(self, streaming: bool) -> None:
        child = Child()

        def unary(request: bytes, context: Any) -> bytes:
            child.begin()
            child.cancelled.wait(10)
            return b""

        def stream(request: bytes, context: Any) -> Iterator[bytes]:
            yield unary(request, context)

        with threaded("unary_stream" if streaming else "unary_unary", stream if streaming else unary) as channel:
            running: Any = (
                method(channel, "unary_stream")(b"") if streaming else method(channel, "unary_unary").future(b"")
            )
            assert child.begun.wait(10)
            running.cancel()
            assert child.cancelled.wait(10)

    async def test_cancelling_a_call_cancels_those_of_its_async_handler(self) -> None:
        child = Child()
        unwound = asyncio.Event()

        async def handler(request: bytes, context: Any) -> bytes:
            child.begin()
            try:
                await asyncio.Event().wait()
            finally:
                unwound.set()
            return b""

        async with asynchronous("unary_unary", handler) as channel:
            running = method(channel, "unary_unary")(b"")
            assert await asyncio.to_thread(child.begun.wait, 10)
            running.cancel()
            await asyncio.wait_for(unwound.wait(), 10)
            assert await asyncio.to_thread(child.cancelled.wait, 10)

    async def test_cancelling_a_stream_closes_its_async_generator(self) -> None:
        child = Child()
        closed = asyncio.Event()

        async def handler(request: bytes, context: Any) -> AsyncIterator[bytes]:
            child.begin()
            try:
                yield b"one"
                await asyncio.Event().wait()
            finally:
                closed.set()

        async with asynchronous("unary_stream", handler) as channel:
            running: Any = method(channel, "unary_stream")(b"")
            assert await running.read() == b"one"
            running.cancel()
            await asyncio.wait_for(closed.wait(), 10)
            assert await asyncio.to_thread(child.cancelled.wait, 10)

    async def test_cancelling_a_call_cancels_those_of_a_handler_in_a_thread_of_an_aio_server(self) -> None:
        child = Child()

        def handler(request: bytes, context: Any) -> bytes:
            child.begin()
            child.cancelled.wait(10)
            return b""

        async with asynchronous("unary_unary", handler) as channel:
            running = method(channel, "unary_unary")(b"")
            assert await asyncio.to_thread(child.begun.wait, 10)
            running.cancel()
            assert await asyncio.to_thread(child.cancelled.wait, 10)

    async def test_a_handler_in_a_thread_that_asks_late_is_told_that_its_call_was_cancelled(self) -> None:
        child = Child()
        answers: list[bool] = []
        answered = threading.Event()

        def handler(request: bytes, context: Any) -> bytes:
            child.begin()
            child.cancelled.wait(10)
            answers.extend([context.is_active(), context.add_callback(answered.set)])
            answered.set()
            return b""

        async with asynchronous("unary_unary", handler) as channel:
            running = method(channel, "unary_unary")(b"")
            assert await asyncio.to_thread(child.begun.wait, 10)
            running.cancel()
            assert await asyncio.to_thread(answered.wait, 10)
        assert answers == [False, False]

    async def test_what_a_handler_leaves_running_is_not_cancelled_when_its_call_ends_well(self) -> None:
        scopes: list[mesh.context.Scope] = []
        child = Child()

        def handler(request: bytes, context: Any) -> bytes:
            scope = mesh.context.current()
            assert scope is not None
            child.begin()
            scopes.append(scope)
            return b"done"

        with threaded("unary_unary", handler) as channel:
            assert call(channel, "unary_unary") == [b"done"]
        # The server is down: whatever grpc tells of the end of a call, it has told.
        assert not child.cancelled.is_set()
        assert not scopes[0].cancelled


# -- exceptions -------------------------------------------------------------------------------------------------------
class SecretError(Exception):
    pass


def failing(kind: str, fail: Callable[[Any], None]) -> Callable[..., Any]:
    """A handler that isn't async, and fails; a streaming one after its first response, when its client has sent
    everything: to one that still writes, grpc.aio may report INTERNAL instead of the status."""

    def unary(request: Any, context: Any) -> bytes:
        fail(context)
        return b""

    def stream(request: Any, context: Any) -> Iterator[bytes]:
        yield b"one"
        if kind.startswith("stream"):
            list(request)
        fail(context)

    return stream if kind.endswith("stream") else unary


def afailing(kind: str, fail: Callable[[Any], Any]) -> Callable[..., Any]:
    async def unary(request: Any, context: Any) -> bytes:
        await fail(context)
        return b""

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"one"
        if kind.startswith("stream"):
            _ = [each async for each in request]
        await fail(context)

    return stream if kind.endswith("stream") else unary


def raises(context: Any) -> None:
    raise SecretError("the password is 123")


async def araises(context: Any) -> None:
    raise SecretError("the password is 123")


def assert_hidden(error: grpc.RpcError, caplog: pytest.LogCaptureFixture) -> None:
    assert error.code() is grpc.StatusCode.INTERNAL
    details = error.details()
    assert details is not None
    assert details.startswith("internal error, id ")
    assert "password" not in repr(error)
    (record,) = [record for record in caplog.records if record.name == "mesh.server"]
    assert details.removeprefix("internal error, ") in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is SecretError
    # Told once: grpc logs nothing of its own beside it.
    assert [record.name for record in caplog.records if record.levelno >= logging.ERROR] == ["mesh.server"]


class TestExceptions:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_caller_of_a_threaded_handler_is_told_an_id_and_nothing_else(
        self, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with threaded(kind, failing(kind, raises)) as channel, pytest.raises(grpc.RpcError) as caught:
            call(channel, kind)
        assert_hidden(caught.value, caplog)

    @pytest.mark.parametrize("kind", KINDS)
    async def test_the_caller_of_an_async_handler_is_told_an_id_and_nothing_else(
        self, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with asynchronous(kind, afailing(kind, araises)) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await acall(channel, kind)
        assert_hidden(caught.value, caplog)

    @pytest.mark.parametrize("kind", KINDS)
    async def test_and_so_is_that_of_a_handler_in_a_thread_of_an_aio_server(
        self, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with asynchronous(kind, failing(kind, raises)) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await acall(channel, kind)
        assert_hidden(caught.value, caplog)

    @pytest.mark.parametrize("kind", KINDS)
    async def test_what_a_handler_aborts_with_arrives(self, kind: str, caplog: pytest.LogCaptureFixture) -> None:
        def abort(context: Any) -> None:
            context.set_trailing_metadata((("k", "v"),))
            context.abort(grpc.StatusCode.NOT_FOUND, "no such user")

        async def aabort(context: Any) -> None:
            context.set_trailing_metadata((("k", "v"),))
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such user")

        errors = []
        with threaded(kind, failing(kind, abort)) as channel, pytest.raises(grpc.RpcError) as caught:
            call(channel, kind)
        errors.append(caught.value)
        for handler in (afailing(kind, aabort), failing(kind, abort)):
            async with asynchronous(kind, handler) as achannel:
                with pytest.raises(grpc.RpcError) as caught:
                    await acall(achannel, kind)
                errors.append(caught.value)
        for error in errors:
            assert error.code() is grpc.StatusCode.NOT_FOUND
            assert error.details() == "no such user"
            assert trailers(error) == [("k", "v")]
        assert not caplog.records

    async def test_a_code_that_the_handler_had_set_stands(self) -> None:
        def fail(context: Any) -> None:
            context.set_code(grpc.StatusCode.UNAVAILABLE)
            context.set_details("the disk is away")
            raise SecretError("/dev/sdb")

        async def afail(context: Any) -> None:
            fail(context)

        with threaded("unary_unary", failing("unary_unary", fail)) as channel, pytest.raises(grpc.RpcError) as caught:
            call(channel, "unary_unary")
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "the disk is away")
        async with asynchronous("unary_unary", afailing("unary_unary", afail)) as achannel:
            with pytest.raises(grpc.RpcError) as caught:
                await acall(achannel, "unary_unary")
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "the disk is away")

    async def test_the_server_lives_on(self) -> None:
        async with asynchronous("unary_unary", afailing("unary_unary", araises)) as channel:
            for _ in range(2):
                with pytest.raises(grpc.RpcError, match="internal error"):
                    await acall(channel, "unary_unary")


# -- chain stop -------------------------------------------------------------------------------------------------------
def exhaust() -> None:
    """As the channel does when a call that was allowed to retry has failed."""
    scope = mesh.context.current()
    assert scope is not None
    scope.exhausted = True


def trailers(error: Any) -> list[tuple[str, Any]]:
    return sorted(tuple(pair) for pair in error.trailing_metadata())


STOP = ("grpc-retry-pushback-ms", "-1")


class TestChainStop:
    """A call failed below, retried in vain: the caller above is told not to, beside the handler's own trailers."""

    @pytest.mark.parametrize("how", ["abort", "abort_with_status", "set_code", "raise"])
    @pytest.mark.parametrize("kind", ["unary_unary", "stream_stream"])
    async def test_a_failure_says_not_to_retry(self, kind: str, how: str) -> None:
        class Status(grpc.Status):
            code = grpc.StatusCode.UNAVAILABLE
            details = "down"
            trailing_metadata = (("k", "v"),)

        def fail(context: Any) -> Any:
            exhaust()
            if how == "abort_with_status":
                return context.abort_with_status(Status())
            context.set_trailing_metadata((("k", "v"),))
            if how == "abort":
                return context.abort(grpc.StatusCode.UNAVAILABLE, "down")
            context.set_code(grpc.StatusCode.UNAVAILABLE)
            if how == "raise":
                raise SecretError
            return None

        async def afail(context: Any) -> None:
            aborting = fail(context)
            if aborting is not None:
                await aborting

        with threaded(kind, failing(kind, fail)) as channel, pytest.raises(grpc.RpcError) as caught:
            call(channel, kind)
        assert trailers(caught.value) == [STOP, ("k", "v")]
        for handler in (afailing(kind, afail), failing(kind, fail)):
            async with asynchronous(kind, handler) as achannel:
                with pytest.raises(grpc.RpcError) as caught:
                    await acall(achannel, kind)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert trailers(caught.value) == [STOP, ("k", "v")]

    async def test_a_handler_that_recovers_marks_nothing(self) -> None:
        def recover(request: bytes, context: Any) -> bytes:
            exhaust()
            return b"from the cache"

        async def arecover(request: bytes, context: Any) -> bytes:
            return recover(request, context)

        with threaded("unary_unary", recover) as channel:
            response, done = method(channel, "unary_unary").with_call(b"")
            assert response == b"from the cache"
            assert trailers(done) == []
        async with asynchronous("unary_unary", arecover) as achannel:
            acalled = method(achannel, "unary_unary")(b"")
            assert await acalled == b"from the cache"
            assert list(await acalled.trailing_metadata()) == []

    async def test_a_handler_s_own_pushback_stands(self) -> None:
        async def fail(context: Any) -> None:
            exhaust()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "soon", (("grpc-retry-pushback-ms", "50"),))

        async with asynchronous("unary_unary", afailing("unary_unary", fail)) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await acall(channel, "unary_unary")
        assert trailers(caught.value) == [("grpc-retry-pushback-ms", "50")]


class TestWrapping:
    @pytest.mark.parametrize("kind", KINDS)
    def test_kind_and_serializers_are_kept(self, kind: str) -> None:
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        for wrap, behavior in ((wrap_sync, sync_handlers(kind)), (wrap_aio, async_handlers(kind))):
            handler = make(behavior, bytes.upper, bytes.lower)
            wrapped = wrap(handler)
            assert wrapped.request_streaming == handler.request_streaming
            assert wrapped.response_streaming == handler.response_streaming
            assert (wrapped.request_deserializer(b"a"), wrapped.response_serializer) == (b"A", bytes.lower)
            assert [getattr(wrapped, other) is not None for other in KINDS] == [other == kind for other in KINDS]

    def test_a_handler_of_the_callback_kind_is_left_alone(self) -> None:
        def watch(request: bytes, context: Any, send: Any) -> None:
            raise NotImplementedError

        watch.experimental_non_blocking = True  # type: ignore[attr-defined]
        handler: Any = wrap_sync(grpc.unary_stream_rpc_method_handler(watch))
        assert handler.unary_stream is watch

    def test_a_handler_s_own_pool_is_kept(self) -> None:
        def own(request: bytes, context: Any) -> bytes:
            raise NotImplementedError

        with ThreadPoolExecutor(1) as pool:
            own.experimental_thread_pool = pool  # type: ignore[attr-defined]
            handler: Any = wrap_sync(grpc.unary_unary_rpc_method_handler(own))
            assert handler.unary_unary.experimental_thread_pool is pool

    def test_a_method_is_wrapped_once(self) -> None:
        handler = One("unary_unary", sync_handlers("unary_unary")).handler
        interceptor = ServerInterceptor()
        details: Any = type("Details", (), {"method": "/test/Method", "invocation_metadata": ()})

        def found(handler: Any) -> Any:
            # In a context of its own, as each call has.
            return copy_context().run(interceptor.intercept_service, lambda _: handler, details)

        assert found(handler) is found(handler)
        assert found(None) is None
