"""Interceptors around servers: those of a program's own, in the settings, and those that instrumentation puts in. The
handlers that they are given are of the kind that was written, as on a plain gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # type: ignore[import-untyped]

import mesh.server.aio
import mesh.server.sync
from mesh.observe import ServerObserver
from mesh.orca import SERVICE, OrcaLoadReport, OrcaLoadReportRequest
from mesh.server.settings import ServerSettings
from mesh.server.thread_pool import SPARE_THREADS
from tests.instrumentation.calls import aio_calls, sync_calls
from tests.instrumentation.echo import add_aio, add_sync
from tests.processes import eventually

BOUND = 20.0

Wrap = Callable[[Any, bool], Any]


def rebuilt(handler: Any, wrap: Wrap) -> Any:
    """``handler`` with its behavior wrapped: a new one, as interceptors make them."""
    if handler is None:
        return None
    kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    wrapped = wrap(getattr(handler, kind), handler.response_streaming)
    return make(wrapped, handler.request_deserializer, handler.response_serializer)


def iterating(behavior: Any, response_streaming: bool) -> Any:
    """As OpenTelemetry's and Sentry's."""

    async def unary(request: Any, context: Any) -> Any:
        return await behavior(request, context)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        async for response in behavior(request, context):
            yield response

    return stream if response_streaming else unary


def looking(behavior: Any, response_streaming: bool) -> Any:
    """As grpc-interceptor's: takes either kind of streaming handler."""

    async def unary(request: Any, context: Any) -> Any:
        return await behavior(request, context)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        made = behavior(request, context)
        if hasattr(made, "__aiter__"):
            async for response in made:
                yield response
        else:
            await made

    return stream if response_streaming else unary


def awaiting(behavior: Any, response_streaming: bool) -> Any:
    """Chosen by the kind of function that it is given."""
    if inspect.isasyncgenfunction(behavior):
        return iterating(behavior, True)
    assert inspect.iscoroutinefunction(behavior) or not response_streaming

    async def handle(request: Any, context: Any) -> Any:
        return await behavior(request, context)

    return handle


class AioInterceptor(grpc.aio.ServerInterceptor):
    def __init__(self, wrap: Wrap) -> None:
        self._wrap = wrap

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        return rebuilt(await continuation(handler_call_details), self._wrap)


class Interceptor(grpc.ServerInterceptor):
    """Drops what grpc has not documented, as OpenTelemetry's does: the callback kind's attribute."""

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        def wrap(behavior: Any, response_streaming: bool) -> Any:
            def unary(request: Any, context: Any) -> Any:
                return behavior(request, context)

            def stream(request: Any, context: Any) -> Iterator[Any]:
                yield from behavior(request, context)

            return stream if response_streaming else unary

        return rebuilt(continuation(handler_call_details), wrap)


class Codes(ServerObserver):
    def __init__(self) -> None:
        self.codes: list[int] = []

    def handled(self, method: str, code: int, seconds: float) -> None:
        self.codes.append(code)


def settings(*interceptors: Any, observer: ServerObserver | None = None) -> ServerSettings:
    return ServerSettings(
        listen="127.0.0.1:0",
        registry="",
        drain_wait=0.0,
        reflection=True,
        interceptors=interceptors,
        observer=observer,
    )


def no_explanation(error: Any) -> Any:
    class NoExplanation:
        attempts = (None,)

    return NoExplanation


@contextlib.asynccontextmanager
async def aio_serving(kind: str, add: Any, interceptor: Any) -> AsyncIterator[int]:
    if kind == "mesh":
        async with mesh.server.aio.Server([(add, None)], settings(interceptor)) as served:
            yield served.port
        return
    server = grpc.aio.server(interceptors=[interceptor])
    add(None, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


def add_async_only(servicer: object, server: Any) -> None:
    """Handlers of both asynchronous kinds that stream."""

    async def generates(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield request
        yield request

    async def writes(request: bytes, context: Any) -> None:
        await context.write(request)
        await context.write(request)

    handlers: dict[str, Any] = {
        "Generates": grpc.unary_stream_rpc_method_handler(generates),
        "Writes": grpc.unary_stream_rpc_method_handler(writes),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Kinds", handlers),))


@pytest.mark.parametrize("kind", ["grpc", "mesh"])
@pytest.mark.parametrize(
    ("wrap", "works"),
    [(iterating, {"Generates"}), (looking, {"Generates", "Writes"}), (awaiting, {"Generates", "Writes"})],
)
async def test_interceptors_see_the_kind_of_handler_that_was_written(kind: str, wrap: Wrap, works: set[str]) -> None:
    async with (
        aio_serving(kind, add_async_only, AioInterceptor(wrap)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        for method in works:
            stream: Any = channel.unary_stream(f"/test.Kinds/{method}")
            assert [response async for response in stream(b"hello", timeout=BOUND)] == [b"hello", b"hello"], method


@pytest.mark.parametrize("wrap", [iterating, looking, awaiting])
async def test_handlers_of_all_kinds_work_under_interceptors_on_the_loop(wrap: Wrap) -> None:
    observer = Codes()
    both = settings(AioInterceptor(wrap), AioInterceptor(wrap), observer=observer)
    async with mesh.server.aio.Server([(add_aio("test.Echo"), None)], both) as server:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            flaky: Any = channel.unary_unary("/test.Echo/Flaky")
            with pytest.raises(grpc.aio.AioRpcError, match="once"):
                await flaky(b"hello", timeout=BOUND)
            seen = await aio_calls(channel, no_explanation)
        assert server.admission.policy.in_flight == 0
    assert seen["threaded"] == "hello hello"
    assert seen["both"] == "a b"
    assert seen["absent responses"] == "NOT_FOUND nothing more; 1 attempt"
    assert sorted(observer.codes) == [0, 0, 0, 0, 0, 0, 0, 5, 5, 14]


def test_handlers_of_all_kinds_work_under_interceptors_in_threads() -> None:
    observer = Codes()
    both = settings(Interceptor(), Interceptor(), observer=observer)
    with (
        mesh.server.sync.Server([(add_sync("test.Echo"), None)], both) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        flaky: Any = channel.unary_unary("/test.Echo/Flaky")
        with pytest.raises(grpc.RpcError, match="once"):
            flaky(b"hello", timeout=BOUND)
        seen = sync_calls(channel, no_explanation)
    assert seen["both"] == "a b"
    assert seen["absent responses"] == "NOT_FOUND nothing more; 1 attempt"
    assert sorted(observer.codes) == [0, 0, 0, 0, 0, 0, 0, 5, 5, 14]


def orca(channel: Any) -> Any:
    return channel.unary_stream(
        f"/{SERVICE}/StreamCoreMetrics", OrcaLoadReportRequest.SerializeToString, OrcaLoadReport.FromString
    )


async def test_the_services_that_every_server_has_work_under_interceptors_on_the_loop() -> None:
    server = mesh.server.aio.Server([(add_aio("test.Echo"), None)], settings(AioInterceptor(iterating)))
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="test.Echo")
        assert (await health.Check(request, timeout=BOUND)).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(request, timeout=BOUND)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        reports = orca(channel)(OrcaLoadReportRequest(), timeout=BOUND)
        assert (await reports.read()).IsInitialized()
        info = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=BOUND)
        await info.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = (await info.read()).list_services_response.service
        assert "test.Echo" in {service.name for service in listed}
        await info.done_writing()
        assert await info.read() is grpc.aio.EOF
        async with asyncio.timeout(server.settings.stream_grace):
            await server.drain()
        assert await reports.read() is grpc.aio.EOF
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
            await watch.read()


def test_the_services_that_every_server_has_work_under_interceptors_in_threads() -> None:
    server = mesh.server.sync.Server([(add_sync("test.Echo"), None)], settings(Interceptor()))
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="test.Echo")
        assert health.Check(request, timeout=BOUND).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(request, timeout=BOUND)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        reports = orca(channel)(OrcaLoadReportRequest(), timeout=BOUND)
        assert next(reports).IsInitialized()
        reports.cancel()
        server.drain()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert list(watch) == []


def test_watches_that_hold_threads_leave_enough_of_them_for_calls() -> None:
    """Under an interceptor each watch holds a thread. Beyond half of the spare ones a client gets UNIMPLEMENTED, and
    treats the server as healthy (A17)."""
    server = mesh.server.sync.Server([(add_sync("test.Echo"), None)], settings(Interceptor()))
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="test.Echo")
        watches = [health.Watch(request, timeout=BOUND) for _ in range(SPARE_THREADS // 2)]
        for watch in watches:
            next(watch)
        with pytest.raises(grpc.RpcError) as raised:
            next(health.Watch(request, timeout=BOUND))
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        unary: Any = channel.unary_unary("/test.Echo/Unary")
        assert unary(b"hello", timeout=BOUND) == b"hello"
        watches.pop().cancel()

        def another() -> bool:
            watches.append(health.Watch(request, timeout=BOUND))
            with contextlib.suppress(grpc.RpcError):
                return bool(next(watches[-1]).status == health_pb2.HealthCheckResponse.SERVING)
            return False

        eventually(another)
        server.drain()


def test_a_client_that_leaves_while_a_status_is_set_holds_nothing_up() -> None:
    """(grpcio's servicer sends under a lock that the leaving watch wants: both wait for ever.)"""
    server = mesh.server.sync.Server([(add_sync("test.Echo"), None)], settings())
    server.start()
    request = health_pb2.HealthCheckRequest(service="test.Echo")
    over = threading.Event()

    def flap() -> None:
        statuses = [health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING]
        while not over.is_set():
            for status in statuses:
                server._health.set(status, server.services)

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel, ThreadPoolExecutor(1) as pool:
        flapping = pool.submit(flap)
        health = health_pb2_grpc.HealthStub(channel)
        for _ in range(30):
            watches = [health.Watch(request, timeout=BOUND) for _ in range(5)]
            for watch in watches:
                next(watch)
            for watch in watches:
                watch.cancel()
        over.set()
        flapping.result(BOUND)
        server.drain()


async def test_a_stream_that_is_sending_ends_with_the_drain() -> None:
    async def endless(request: bytes, context: Any) -> AsyncIterator[bytes]:
        while True:
            yield bytes(1000)

    def add(servicer: object, server: Any) -> None:
        handlers: dict[str, Any] = {"Endless": grpc.unary_stream_rpc_method_handler(endless)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Endless", handlers),))

    ending = ServerSettings(listen="127.0.0.1:0", registry="", drain_wait=0.0, stream_grace=0.0)
    server = mesh.server.aio.Server([(add, None)], ending)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stream: Any = channel.unary_stream("/test.Endless/Endless")
        call = stream(b"", timeout=BOUND)
        await call.read()

        async def read_on() -> grpc.StatusCode:
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
            code: grpc.StatusCode = await call.code()
            return code

        reading = asyncio.create_task(read_on())
        await server.drain()
        assert await reading is grpc.StatusCode.UNAVAILABLE
    assert server.admission.policy.in_flight == 0
