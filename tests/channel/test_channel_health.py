"""Which endpoints get calls by what health checks say (gRFC A17), and what a connection that closes when idle means."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

import mesh
import mesh.aio
from mesh.model import Connectivity
from tests.processes import eventually

SERVICE = "test.Health"
METHOD = f"/{SERVICE}/Name"
WITHIN = 10.0
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
# A call may have been begun just as its endpoint stops serving: then it is retried.
RETRIED = {
    "maxAttempts": 3,
    "initialBackoff": "0.001s",
    "maxBackoff": "0.001s",
    "backoffMultiplier": 1,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": SERVICE},
    "methodConfig": [{"name": [{}], "retryPolicy": RETRIED}],
}
CHECKED = [("grpc.service_config", json.dumps(CONFIG))]


class Handlers(grpc.GenericRpcHandler):
    """Answer each call of ``METHOD`` with the server's address."""

    def __init__(self) -> None:
        self.address = b""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method == METHOD:
            return grpc.unary_unary_rpc_method_handler(lambda _request, _context: self.address)
        return None


class Served:
    """A server, with the health service unless told otherwise."""

    def __init__(self, *, checked: bool = True, options: Any = ()) -> None:
        handlers = Handlers()
        self.threads = futures.ThreadPoolExecutor(8)
        self.server = grpc.server(self.threads, handlers=[handlers], options=[("grpc.so_reuseport", 0), *options])
        self.health = health.HealthServicer()
        if checked:
            health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        handlers.address = self.address.encode()
        self.server.start()

    def stop(self) -> None:
        self.health.enter_graceful_shutdown()
        self.server.stop(None).wait()
        self.threads.shutdown()


Serve = Callable[..., Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers, which end with the test."""
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> Served:
            served = Served(**settings)
            stack.callback(served.stop)
            return served

        yield start


@pytest.fixture(params=["sync", "aio"])
def names(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Callable[[], set[str]]]]:
    """Makes a channel to a target, and a function that calls six times and gives the addresses of those that
    answered."""
    with contextlib.ExitStack() as stack:

        def sync(target: str) -> Callable[[], set[str]]:
            channel = stack.enter_context(mesh.insecure_channel(target, CHECKED))
            call: Any = channel.unary_unary(METHOD)
            return lambda: {call(b"", timeout=WITHIN).decode() for _ in range(6)}

        def aio(target: str) -> Callable[[], set[str]]:
            runner = stack.enter_context(asyncio.Runner())

            async def opened() -> Any:
                return mesh.aio.insecure_channel(target, CHECKED)

            channel = runner.run(opened())
            stack.callback(lambda: runner.run(channel.close()))
            call = channel.unary_unary(METHOD)

            async def called() -> set[str]:
                return {(await call(b"", timeout=WITHIN)).decode() for _ in range(6)}

            return lambda: runner.run(called())

        yield {"sync": sync, "aio": aio}[request.param]


def test_a_server_without_the_health_service_counts_as_healthy(names: Any, serve: Serve) -> None:
    served = serve(checked=False)
    assert names(f"static:///{served.address}")() == {served.address}


def test_calls_go_where_the_service_is_serving(names: Any, serve: Serve) -> None:
    first, second = serve(), serve()
    first.health.set(SERVICE, SERVING)
    second.health.set(SERVICE, NOT_SERVING)
    answered = names(f"static:///{first.address},{second.address}")
    assert answered() == {first.address}, "no call goes to an endpoint before it has said that it is serving"
    second.health.set(SERVICE, SERVING)
    eventually(lambda: answered() == {first.address, second.address}, WITHIN, "the second one has calls, too")
    first.health.set(SERVICE, NOT_SERVING)
    eventually(lambda: answered() == {second.address}, WITHIN, "the first one has no more calls")


def test_a_connection_that_the_server_closes_when_idle_is_no_failure(serve: Serve) -> None:
    # GOAWAY, after which core's channel is IDLE.
    served = serve(options=[("grpc.max_connection_idle_ms", 50)])
    channel: Any = mesh.insecure_channel(f"static:///{served.address}")
    with channel:
        call = channel.unary_unary(METHOD)
        call(b"", timeout=WITHIN)
        cluster = channel.assembly.cluster
        for _ in range(3):
            eventually(lambda: cluster.states[served.address] == Connectivity.IDLE, WITHIN, "the connection was closed")
            _, done = call.with_call(b"", timeout=WITHIN)
            assert len(done.explain().attempts) == 1
        assert cluster.nodes[served.address].failures == 0
