"""A server that is asked for more than it can do, in both worlds: what it refuses, how it says so, what it lets in."""

import asyncio
import contextlib
import re
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

import mesh.context
import mesh.server.aio
import mesh.server.sync
from mesh.criticality import Criticality
from mesh.orca import SERVICE, OrcaLoadReport, OrcaLoadReportRequest
from mesh.policy.server.admission import AdmissionConfig, Mode
from mesh.policy.server.reasons import Reason
from mesh.server.handlers.admission import AioServerAdmission, ServerAdmission, ThreadServerAdmission
from mesh.server.handlers.interceptors import AioServerInterceptor, ServerInterceptor
from mesh.server.settings import ServerSettings
from mesh.server.thread_pool import ThreadPool
from mesh.wire import ORCA_LOAD_REPORT, WEFT_LOAD_REPORT
from tests.processes import eventually

NAME = "test.Work"
BOUND = 15.0


class Work:
    """A service whose calls are held until they are let go; both worlds' handlers, on one count."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.ran: list[bytes] = []

    def hold(self, request: bytes, context: Any) -> bytes:
        self.ran.append(request)
        assert self.go.wait(BOUND)
        return b"done"

    async def ahold(self, request: bytes, context: Any) -> bytes:
        self.ran.append(request)
        async with asyncio.timeout(BOUND):
            while not self.go.is_set():  # noqa: ASYNC110 - shared with threads
                await asyncio.sleep(0.005)
        return b"done"

    def echo(self, request: bytes, context: Any) -> bytes:
        self.ran.append(request)
        scope = mesh.context.current()
        assert scope is not None
        return scope.criticality.encode()

    async def aecho(self, request: bytes, context: Any) -> bytes:
        return self.echo(request, context)

    def stream(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield b"one"
        assert self.go.wait(BOUND)

    async def astream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"one"
        async with asyncio.timeout(BOUND):
            while not self.go.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    def add(self, world: str, parse: Callable[[bytes], Any] | None = None) -> Callable[[Any, Any], None]:
        hold, echo, stream = (
            (self.ahold, self.aecho, self.astream) if world == "aio" else (self.hold, self.echo, self.stream)
        )

        def add_to_server(_: Any, server: Any) -> None:
            handlers: dict[str, Any] = {
                "Hold": grpc.unary_unary_rpc_method_handler(hold),
                "Echo": grpc.unary_unary_rpc_method_handler(echo),
                "Stream": grpc.unary_stream_rpc_method_handler(stream),
            }
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
            server.add_registered_method_handlers(NAME, handlers)

        return add_to_server


class Client:
    """Calls that service; also knows its server and what that admits."""

    def __init__(self, channel: grpc.aio.Channel, server: Any, work: Work) -> None:
        self.channel = channel
        self.server = server
        self.work = work
        self.load_reporter = server.admission.load_reporter
        self.admission = server.admission.policy
        self.hold: Any = channel.unary_unary(f"/{NAME}/Hold")
        self.echo: Any = channel.unary_unary(f"/{NAME}/Echo")
        self.stream: Any = channel.unary_stream(f"/{NAME}/Stream")

    async def holding(self, count: int) -> list[Any]:
        """Calls that hold permits, once all do."""
        before = len(self.work.ran)
        calls = [self.hold(b"held", timeout=BOUND) for _ in range(count)]
        await self.until(lambda: len(self.work.ran) >= before + count)
        return calls

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(BOUND):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@pytest.fixture(params=["aio", "sync"])
def world(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Client]]


@pytest.fixture
def serve(world: str) -> Serve:
    @asynccontextmanager
    async def serving(**settings: Any) -> AsyncIterator[Client]:
        work = Work()
        told = ServerSettings(**{"listen": "127.0.0.1:0", "drain_wait": 0, **settings})
        kind = mesh.server.aio.Server if world == "aio" else mesh.server.sync.Server
        server: Any = kind([(work.add(world), None)], told)
        await server.start() if world == "aio" else await asyncio.to_thread(server.start)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                yield Client(channel, server, work)
                work.go.set()
        finally:
            work.go.set()
            await server.drain() if world == "aio" else await asyncio.to_thread(server.drain)
            await asyncio.get_running_loop().shutdown_default_executor()

    return serving


async def refused(call: Any) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or "", dict([*caught.value.trailing_metadata()])


class TestOverload:
    async def test_what_is_too_much_waits_its_turn(self, serve: Serve) -> None:
        async with serve(max_concurrency=2) as client:
            held = await client.holding(2)
            waits = client.echo(b"waits", timeout=BOUND)
            await client.until(lambda: client.admission.waiting == 1)
            client.work.go.set()
            assert [await call for call in held] == [b"done"] * 2
            assert await waits == b""

    @pytest.mark.slow
    async def test_what_waits_is_not_refused_before_its_deadline_and_never_run_after(self, serve: Serve) -> None:
        async with serve(max_concurrency=2) as client:
            await client.holding(2)
            calls = [client.echo(b"too much", timeout=0.5) for _ in range(20)]
            assert [(await refused(call))[0] for call in calls] == [grpc.StatusCode.DEADLINE_EXCEEDED] * 20
            assert b"too much" not in client.work.ran
            assert Reason.DELAY not in {reason for reason, _ in client.admission.refusals}
            await client.until(lambda: client.admission.waiting == 0)

    @pytest.mark.slow
    async def test_when_calls_go_on_missing_their_deadlines_later_ones_are_refused_with_pushback(
        self, serve: Serve
    ) -> None:
        async with serve(max_concurrency=2) as client:
            await client.holding(2)
            answers: asyncio.Queue[tuple[grpc.StatusCode, str, dict[str, Any]]] = asyncio.Queue()

            async def ask() -> None:
                answers.put_nowait(await refused(client.echo(b"too much", timeout=0.4)))

            async with asyncio.timeout(BOUND), asyncio.TaskGroup() as group:
                code, details = grpc.StatusCode.OK, ""
                trailers: dict[str, Any] = {}
                while code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    group.create_task(ask())
                    with contextlib.suppress(TimeoutError):
                        code, details, trailers = await asyncio.wait_for(answers.get(), 0.02)
            assert re.fullmatch(
                r"overloaded: (calls miss their deadlines in the queue|[\w./]+ is limited to \d+ at a time)"
                r" and the call waited for [2-4]\d\d ms",
                details,
            )
            assert 50 <= int(trailers["grpc-retry-pushback-ms"]) <= 150
            assert b"too much" not in client.work.ran
            assert client.admission.refusals[Reason.DELAY, Criticality.CRITICAL] >= 1

    async def test_a_full_queue_sheds_the_least_important_first(self, serve: Serve) -> None:
        async with serve(max_concurrency=2, queue_size=1) as client:
            await client.holding(2)
            sheddable = client.echo(b"s", timeout=BOUND, metadata=(("weft-criticality", "SHEDDABLE"),))
            await client.until(lambda: client.admission.waiting == 1)
            client.echo(b"c", timeout=BOUND)
            code, details, _ = await refused(sheddable)
            assert (code, details) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "overloaded: the queue is full (MESH_QUEUE_SIZE=1)",
            )

    async def test_a_caller_that_gives_up_waiting_is_not_waited_for(self, serve: Serve) -> None:
        async with serve(max_concurrency=1) as client:
            (held,) = await client.holding(1)
            waits = client.echo(b"gone", timeout=BOUND, metadata=(("weft-criticality", "CRITICAL_PLUS"),))
            await client.until(lambda: client.admission.waiting == 1)
            waits.cancel()
            await client.until(lambda: client.admission.waiting == 0)
            client.work.go.set()
            assert await held == b"done"
            assert await client.echo(b"next", timeout=BOUND) == b""
            assert b"gone" not in client.work.ran
            await client.until(lambda: client.admission.in_flight == 0)

    async def test_health_is_answered_all_the_same(self, serve: Serve) -> None:
        async with serve(max_concurrency=1, queue_size=0) as client:
            await client.holding(1)
            stub = health_pb2_grpc.HealthStub(client.channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=BOUND)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    async def test_off_means_that_they_wait_for_as_long_as_they_like(self, serve: Serve) -> None:
        async with serve(max_concurrency=1, overload=Mode.OFF) as client:
            (held,) = await client.holding(1)
            waits = [client.echo(b"w", timeout=BOUND) for _ in range(20)]
            await client.until(lambda: client.admission.waiting == 20)
            client.work.go.set()
            await asyncio.gather(held, *waits)
            assert not client.admission.refusals

    async def test_criticality_reaches_the_handler_s_scope_for_the_calls_below(self, serve: Serve) -> None:
        async with serve() as client:
            for given, seen in (("SHEDDABLE", b"SHEDDABLE"), ("CRITICAL_PLUS", b"CRITICAL_PLUS"), ("nonsense", b"")):
                assert await client.echo(b"", timeout=BOUND, metadata=(("weft-criticality", given),)) == seen

    async def test_streams_have_a_limit_of_their_own_and_hold_up_no_calls(self, serve: Serve) -> None:
        async with serve(max_concurrency=2, max_streams=5) as client:
            streams = [client.stream(b"", timeout=BOUND) for _ in range(5)]
            assert [await stream.read() for stream in streams] == [b"one"] * 5
            assert await client.echo(b"", timeout=BOUND) == b""
            code, details, _ = await refused(client.stream(b"", timeout=BOUND).read())
            assert (code, details) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "too many streams are open (MESH_MAX_STREAMS=5)",
            )
            streams[0].cancel()
            client.work.go.set()
            await client.until(lambda: client.admission.streams == 0)


@pytest.mark.slow
class TestLate:
    @pytest.mark.parametrize("mode", [Mode.ON, Mode.DRY_RUN])
    async def test_a_call_that_cannot_finish_is_refused_when_others_were_lost_in_the_queue(
        self, serve: Serve, mode: Mode
    ) -> None:
        async with serve(max_concurrency=1, late=mode) as client:
            (held,) = await client.holding(1)
            asyncio.get_running_loop().call_later(1.0, client.work.go.set)  # what the method takes
            await held
            # Nobody was lost: it may try, little as its time is.
            assert await client.hold(b"quick", timeout=0.8) == b"done"
            client.work.go.clear()
            (held,) = await client.holding(1)
            assert (await refused(client.hold(b"lost", timeout=0.2)))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
            await client.until(lambda: client.admission.waiting == 0)
            late = client.hold(b"late", timeout=0.8)
            if mode is Mode.DRY_RUN:
                await client.until(lambda: client.admission.dry_run)
                client.work.go.set()
                assert await late == b"done"
                assert client.admission.dry_run[Reason.LATE, Criticality.CRITICAL] == 1
                return
            code, details, _ = await refused(late)
            assert (code, details) == (
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "overloaded: less time is left than the method takes",
            )
            assert b"late" not in client.work.ran


class TestRequests:
    """Bytes that don't parse are the caller's fault, and said to be."""

    @pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
    async def test_bytes_that_do_not_parse_are_an_invalid_argument(self, kind: str, world: str) -> None:
        def parse(request: bytes) -> bytes:
            if request == b"bad":
                raise ValueError("secret of the parser")
            return request

        def unary(request: Any, context: Any) -> bytes:
            return b"".join(request) if kind.startswith("stream") else request

        def responses(request: Any, context: Any) -> Iterator[bytes]:
            yield unary(request, context)

        async def aunary(request: Any, context: Any) -> bytes:
            return b"".join([part async for part in request]) if kind.startswith("stream") else request

        async def aresponses(request: Any, context: Any) -> AsyncIterator[bytes]:
            yield await aunary(request, context)

        streams = kind.endswith("stream")
        behavior: Any = (aresponses if streams else aunary) if world == "aio" else (responses if streams else unary)
        handler = getattr(grpc, f"{kind}_rpc_method_handler")(behavior, request_deserializer=parse)
        generic = grpc.method_handlers_generic_handler(NAME, {"M": handler})
        pool = ThreadPool(4)
        server: Any
        if world == "aio":
            server = grpc.aio.server(
                handlers=[generic], interceptors=[AioServerInterceptor(pool, AioServerAdmission())]
            )
        else:
            server = grpc.server(pool, handlers=[generic], interceptors=[ServerInterceptor(ThreadServerAdmission())])  # type: ignore[arg-type]
        port = server.add_insecure_port("127.0.0.1:0")
        starting = server.start()
        if starting is not None:
            await starting
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                method = getattr(channel, kind)(f"/{NAME}/M")
                for sent, code in (([b"good"], grpc.StatusCode.OK), ([b"bad"], grpc.StatusCode.INVALID_ARGUMENT)):
                    call = method(iter(sent) if kind.startswith("stream") else sent[0], timeout=BOUND)
                    try:
                        answer = [part async for part in call] if streams else [await call]
                        assert answer == sent
                    except grpc.aio.AioRpcError:
                        assert "secret" not in await call.details()
                    assert await call.code() is code
        finally:
            stopping = server.stop(None)
            if world == "aio":
                await stopping
            pool.shutdown()


@pytest.mark.slow
def test_calls_that_never_send_their_request_make_room_for_those_that_do() -> None:
    # All threads wait for requests that their clients don't send. What ends that is private to gRPC; this pins it.
    def echo(request: bytes, context: Any) -> bytes:
        return request

    handler: Any = grpc.unary_unary_rpc_method_handler(echo)
    generic = grpc.method_handlers_generic_handler(NAME, {"Echo": handler})
    pool = ThreadPool(2)
    server = grpc.server(pool, handlers=[generic], interceptors=[ServerInterceptor()])  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        sends: Any = channel.unary_unary(f"/{NAME}/Echo")
        stalls: Any = channel.stream_unary(f"/{NAME}/Echo")
        never = threading.Event()

        def nothing() -> Iterator[bytes]:
            never.wait(BOUND)
            yield from ()

        stalling = [stalls.future(nothing()) for _ in range(2)]
        eventually(lambda: len(pool._running) == 2, BOUND)
        assert sends(b"here", timeout=BOUND) == b"here"
        assert any(call.code() is grpc.StatusCode.CANCELLED for call in stalling)
        never.set()
    server.stop(None).wait()
    pool.shutdown()


class TestLoad:
    async def test_every_answer_tells_the_load(self, serve: Serve) -> None:
        async with serve(max_concurrency=2, queue_size=0) as client:
            call = client.echo(b"", timeout=BOUND)
            await call
            trailers = dict([*await call.trailing_metadata()])
            # endpoint-load-metrics-bin goes out too; gRPC's core keeps it from us.
            report = OrcaLoadReport.FromString(trailers["weft-load-bin"])
            assert 0 <= report.application_utilization <= 1
            await client.holding(2)
            _, _, trailers = await refused(client.echo(b"", timeout=BOUND))
            await client.until(lambda: client.load_reporter.report().application_utilization > 0.5)
            assert OrcaLoadReport.FromString(trailers["weft-load-bin"]).eps == 0.0

    async def test_or_not(self, serve: Serve) -> None:
        async with serve(load_reports=False) as client:
            call = client.echo(b"", timeout=BOUND)
            await call
            assert dict(await call.trailing_metadata()) == {}

    async def test_orca_s_service_reports_as_often_as_it_is_asked_to(self, serve: Serve) -> None:
        async with serve() as client:
            stream: Any = client.channel.unary_stream(
                f"/{SERVICE}/StreamCoreMetrics", OrcaLoadReportRequest.SerializeToString, OrcaLoadReport.FromString
            )
            request = OrcaLoadReportRequest(report_interval=timedelta(microseconds=1))
            reports = stream(request, timeout=BOUND)
            for _ in range(3):
                assert (await reports.read()).cpu_utilization >= 0
            reports.cancel()

    @pytest.mark.parametrize("seconds", [2**63 - 1, -(2**63), 10**12])
    async def test_an_interval_beyond_all_bounds_is_as_good_as_another(self, serve: Serve, seconds: int) -> None:
        async with serve() as client:
            stream: Any = client.channel.unary_stream(
                f"/{SERVICE}/StreamCoreMetrics", OrcaLoadReportRequest.SerializeToString, OrcaLoadReport.FromString
            )
            request = OrcaLoadReportRequest()
            request.report_interval.seconds = seconds
            reports = stream(request, timeout=0.2)
            assert (await reports.read()).cpu_utilization >= 0
            assert await reports.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    def test_the_report_is_orca_s_own_on_the_wire(self) -> None:
        report = OrcaLoadReport(cpu_utilization=0.5, rps_fractional=2.0, eps=3.0, application_utilization=4.0)
        expected = b"".join(
            bytes([number << 3 | 1]) + struct.pack("<d", value)
            for number, value in ((1, 0.5), (6, 2.0), (7, 3.0), (9, 4.0))
        )
        assert report.SerializeToString() == expected
        assert (ORCA_LOAD_REPORT, WEFT_LOAD_REPORT) == ("endpoint-load-metrics-bin", "weft-load-bin")

    def test_a_server_that_idles_still_has_a_report_to_send(self) -> None:
        admission = ThreadServerAdmission()
        reporter = admission.load_reporter
        assert all(value for _, value in reporter.trailers(reporter._updated_at))
        assert repr(admission) == "<ThreadServerAdmission <Admission 0/10000 in flight, 0 waiting>>"


class TestReadiness:
    async def test_it_serves_only_when_what_it_depends_on_is_there(self, serve: Serve) -> None:
        there = threading.Event()
        asked = threading.Event()

        def ready() -> bool:
            asked.set()
            if not there.is_set():
                raise ConnectionError("no database")
            return True

        async with serve(ready=ready) as client:
            stub = health_pb2_grpc.HealthStub(client.channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=BOUND)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            code, details, trailers = await refused(client.echo(b"early", timeout=BOUND))
            assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "not ready yet")
            assert int(trailers["grpc-retry-pushback-ms"]) > 0
            assert asked.is_set()
            there.set()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            assert await client.echo(b"", timeout=BOUND) == b""
            assert b"early" not in client.work.ran
            watch.cancel()

    async def test_an_async_hook_does_too_and_one_that_is_never_ready_is_drained(self, serve: Serve) -> None:
        async def ready() -> bool:
            return False

        async with serve(ready=ready) as client:
            code, _, _ = await refused(client.echo(b"", timeout=BOUND))
            assert code is grpc.StatusCode.UNAVAILABLE


class TestDrain:
    async def test_streams_end_so_that_their_clients_may_resume(self, serve: Serve) -> None:
        async with serve(grace=BOUND, stream_grace=0.1) as client:
            stream = client.stream(b"", timeout=BOUND)
            assert await stream.read() == b"one"
            server = client.server
            draining = asyncio.ensure_future(
                server.drain() if isinstance(server, mesh.server.aio.Server) else asyncio.to_thread(server.drain)
            )
            code, _, _ = await refused(stream.read())
            assert code is grpc.StatusCode.UNAVAILABLE
            client.work.go.set()
            async with asyncio.timeout(BOUND / 2):  # well within the grace
                await draining


@pytest.mark.parametrize("threaded", [False, True])
def test_the_limits_of_admission_control_come_from_the_settings(threaded: bool) -> None:
    settings = ServerSettings(
        min_concurrency=5, max_concurrency=50, overload_after=2.0, max_streams=500, queue_size=7, late=Mode.DRY_RUN
    )
    config = settings.admission(32 if threaded else None)
    assert config == AdmissionConfig(
        min_concurrency=5,
        max_concurrency=32 if threaded else 50,
        overload_after=2.0,
        max_streams=128 if threaded else 500,
        queue_size=7,
        late=Mode.DRY_RUN,
    )


@pytest.mark.parametrize("kind", [ThreadServerAdmission, AioServerAdmission])
def test_a_refusal_names_the_limit_that_the_method_has_and_how_long_the_call_waited(
    kind: type[ServerAdmission],
) -> None:
    admission = kind(AdmissionConfig())
    method = admission.policy.method("GetUser")
    method.limited, method.limiter.limit = True, 20
    code, details, _ = admission.refusal(Reason.DELAY, method, 0.25)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details == "overloaded: GetUser is limited to 20 at a time and the call waited for 250 ms"
