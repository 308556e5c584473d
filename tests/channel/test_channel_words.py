"""What a person reads when calls fail or endpoints change: which endpoint, in which state, why; in both worlds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

import mesh
import mesh.aio
from mesh.channel.endpoint_log import EndpointLog
from mesh.channel.sync.channel import Channel
from mesh.codes import Code
from mesh.config.settings import OutlierDetectionConfig, ServiceConfig
from mesh.discovery.resolver import Update
from mesh.errors import AioRpcError, CallError, RpcError, short_details
from mesh.model import Endpoint
from tests.policy.driving import Driven, cluster_of
from tests.processes import eventually

SERVICE = "test.Words"
OK, ABORT = f"/{SERVICE}/Ok", f"/{SERVICE}/Abort"
WITHIN = 10.0
ALL = "connections to all backends failing; last error: "
CONNECT = "Failed to connect to remote host: "


class Handlers(grpc.GenericRpcHandler):
    """``Ok`` echoes, as a stream too; ``Abort`` ends with NOT_FOUND."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        match handler_call_details.method:
            case "/test.Words/Ok":
                return grpc.unary_unary_rpc_method_handler(lambda request, _: request)
            case "/test.Words/Abort":
                return grpc.unary_unary_rpc_method_handler(self._abort)
            case "/test.Words/AbortStream":
                return grpc.stream_stream_rpc_method_handler(self._abort)
        return None

    def _abort(self, _: object, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")


class Served:
    """A server with health."""

    def __init__(self, address: str = "127.0.0.1:0") -> None:
        self.threads = futures.ThreadPoolExecutor(8)
        self.server = grpc.server(self.threads, handlers=[Handlers()], options=[("grpc.so_reuseport", 0)])
        self.health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(address)}"
        self.server.start()

    def stop(self) -> None:
        self.health.enter_graceful_shutdown()
        self.server.stop(None).wait()
        self.threads.shutdown()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.stop()


def watching(health_service: str) -> list[tuple[str, str]]:
    return [("grpc.service_config", json.dumps({"healthCheckConfig": {"serviceName": health_service}}))]


Fail = Callable[..., Any]


@pytest.fixture(params=["blocking", "future", "stream", "aio"])
def fail(request: pytest.FixtureRequest) -> Fail:
    """Makes a call that fails, on a new channel, and gives its error."""
    kind = request.param

    async def call_aio(target: str, options: Any, method: str, within: float) -> None:
        channel: Any
        async with mesh.aio.insecure_channel(target, options) as channel:
            await channel.unary_unary(method)(b"", timeout=within)

    def call(target: str, options: Any, method: str, within: float) -> None:
        if kind == "aio":
            asyncio.run(call_aio(target, options, method, within))
            return
        channel: Any
        with mesh.insecure_channel(target, options) as channel:
            if kind == "blocking":
                channel.unary_unary(method)(b"", timeout=within)
            elif kind == "future":
                channel.unary_unary(method).future(b"", timeout=within).result()
            else:
                next(channel.stream_stream(f"{method}Stream")(iter([b""]), timeout=within))

    def fail(target: str, options: Any = None, method: str = OK, within: float = WITHIN) -> Any:
        with pytest.raises(grpc.RpcError) as raised:
            call(target, options, method, within)
        return raised.value

    return fail


def test_a_refused_connection_is_named(fail: Fail, free_port: Callable[[], int]) -> None:
    address = f"127.0.0.1:{free_port()}"
    error = fail(f"static:///{address}")
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == f"static:///{address}: {address}: connection refused"
    assert isinstance(error, RpcError)
    assert error.details() == error.explain().details


@pytest.mark.parametrize("status", ["UNKNOWN", "NOT_SERVING"])
def test_the_answer_of_a_health_check_is_named(fail: Fail, served: Served, status: str) -> None:
    served.health.set(SERVICE, health_pb2.HealthCheckResponse.ServingStatus.Value(status))
    error = fail(f"static:///{served.address}", watching(SERVICE))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert f"{served.address}: health check of {SERVICE!r} returned {status}" in str(error)


def test_a_service_without_health_is_named(fail: Fail, served: Served) -> None:
    error = fail(f"static:///{served.address}", watching("test.Missing"))
    assert f"{served.address}: health check failed: NOT_FOUND" in str(error)


def test_three_endpoints_of_many_are_named(fail: Fail, free_port: Callable[[], int]) -> None:
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(5)]
    details = fail(f"static:///{','.join(addresses)}").details()
    assert "0 of 5 endpoints connected: " in details
    assert details.count(": connection refused") == 3
    assert details.endswith("and 2 more")


@pytest.mark.slow
def test_who_is_waited_for_is_named_with_its_state_and_since_when(fail: Fail, free_port: Callable[[], int]) -> None:
    with socket.socket() as silent:  # accepts and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address, dead = f"127.0.0.1:{silent.getsockname()[1]}", f"127.0.0.1:{free_port()}"
        error = fail(f"static:///{address},{dead}", within=0.5)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert f"0 of 2 endpoints connected after 0.5 s: {dead}: connection refused, {address} CONNECTING for 0." in str(
        error
    )


def test_an_error_names_its_endpoint_and_keeps_the_servers_words(fail: Fail, served: Served) -> None:
    error = fail(f"static:///{served.address}", method=ABORT)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details() == "no such thing"
    assert str(error).endswith(f"\n> The call went to endpoint {served.address}.")
    assert isinstance(error, RpcError)
    assert error.explain().endpoint == served.address


def test_an_error_names_an_endpoint_once(fail: Fail, free_port: Callable[[], int]) -> None:
    error = fail(f"127.0.0.1:{free_port()}")
    assert "The call went to" not in str(error)


@pytest.mark.slow
def test_a_registry_that_says_nothing_is_named_with_how_long_it_was_waited_for(fail: Fail) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        registry = f"127.0.0.1:{silent.getsockname()[1]}"
        error = fail(f"mesh://{registry}/{SERVICE}", within=0.5)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.details() == f"mesh://{registry}/{SERVICE}: registry {registry} has not answered for 0.5 s"


def test_a_long_static_target_is_shortened_to_two_addresses(fail: Fail, free_port: Callable[[], int]) -> None:
    one, two, three, four = (f"127.0.0.1:{free_port()}" for _ in range(4))
    error = fail(f"static:///{one},{two},{three},{four}")
    assert error.details().startswith(f"static:///{one},{two} (+2 more): 0 of 4 endpoints connected: ")
    assert error.explain().target == f"static:///{one},{two},{three},{four}"


def test_every_error_is_what_grpc_raises_and_an_error_of_the_mesh(fail: Fail, served: Served) -> None:
    error = fail(f"static:///{served.address}", method=ABORT)
    for kind in (RpcError, grpc.RpcError):
        assert isinstance(error, kind)
    grpcs: tuple[type, ...] = (grpc.Call, grpc.Future)
    assert isinstance(error, grpc.aio.AioRpcError) or all(isinstance(error, kind) for kind in grpcs)
    assert issubclass(CallError, RpcError)
    assert issubclass(AioRpcError, RpcError)


@pytest.mark.parametrize(
    ("details", "short"),
    [
        # core 1.72's, and 1.85's
        (f"{ALL}UNKNOWN: ipv4:127.0.0.1:1: {CONNECT}connect: Connection refused (111)", "connection refused"),
        (f"{ALL}UNKNOWN: ipv6:%5B::1%5D:1: {CONNECT}Connection refused", "connection refused"),
        (f"{ALL}UNKNOWN: ipv4:127.0.0.1:1: Tls handshake failed (X): Y", "tls handshake failed (X): Y"),
        ("", ""),
        ("DNS resolution failed", "DNS resolution failed"),
        ("x" * 300, "x" * 200 + "..."),
    ],
)
def test_cores_account_is_made_short(details: str, short: str) -> None:
    assert short_details(details) == short


def logged(caplog: pytest.LogCaptureFixture, line: str) -> None:
    """Wait for it: of one kind a line a second is logged at most, and the tests before have logged some."""
    eventually(lambda: any(message.startswith(line) for message in caplog.messages), what=line)


def test_lines_say_when_endpoints_come_fail_and_return(
    served: Served, free_port: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mesh")
    port = free_port()
    other = Served(f"127.0.0.1:{port}")
    target = f"static:///{served.address},{other.address}"
    with mesh.insecure_channel(target) as channel:
        assert isinstance(channel, Channel)
        ready = channel.assembly.cluster.states
        call: Any = channel.unary_unary(OK)
        call(b"", timeout=WITHIN)
        logged(caplog, f"{target}: 2 endpoints added: {served.address}, {other.address}")
        eventually(lambda: all(state == 2 for state in ready.values()), what="both were ready")
        other.stop()
        lost = f"{target}: endpoint lost: {other.address}: connection refused"

        def called(line: str) -> bool:
            with contextlib.suppress(grpc.RpcError):  # a call may be under way when its endpoint stops
                call(b"", timeout=WITHIN)
            return any(message.startswith(line) for message in caplog.messages)

        eventually(lambda: called(lost), what="its loss was logged")
        other = Served(other.address)
        eventually(lambda: called(f"{target}: endpoint returned: {other.address} after "), what="its return was logged")
        other.stop()
    assert {record.name for record in caplog.records} == {"mesh.channel"}


def test_an_ejection_and_its_end_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mesh")
    cluster = cluster_of(3, ServiceConfig(outlier_detection=OutlierDetectionConfig(consecutive_failures=1)))
    events, node = EndpointLog(cluster), cluster.nodes["e1"]
    node.breaker.record_failure(0.0, Code.UNAVAILABLE)
    cluster.ejections.on_breaker_event(node)
    cluster.sweep(1.0)
    events.on_sweep()
    events.on_sweep()
    logged(caplog, "test: endpoint ejected: e1: consecutive failures; for 3")
    cluster.sweep(1000.0)
    Driven(cluster=cluster, now=1000.0).succeeds(1, at=1000.5)
    cluster.sweep(1001.0)
    events.on_sweep()
    logged(caplog, "test: endpoint returned: e1 from ejection")
    assert sum("ejected" in message for message in caplog.messages) == 1


def test_a_resolver_that_fails_and_works_again_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mesh")
    events = EndpointLog(cluster_of(1))
    events.on_resolver_update(Update((Endpoint("e0"),)))
    events.on_resolver_update(Update(None, "registry r:1: UNAVAILABLE: gone"))
    events.on_resolver_update(Update((Endpoint("e0"),)))
    logged(caplog, "test: registry r:1: UNAVAILABLE: gone; keeping 1 known endpoint")
    logged(caplog, "test: discovery works again; endpoints: 1")
