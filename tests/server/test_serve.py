"""A served process, as whoever starts and stops it sees it; the same with asyncio and with threads."""

import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # type: ignore[import-untyped]

from tests.processes import Process, Spawn

SERVING = Path(__file__).with_name("serving.py")
WORLDS = ("aio", "sync")


class Service:
    def __init__(self, process: Process, port: int) -> None:
        self.process = process
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.nap: Any = self.channel.unary_unary("/test.Sleeper/Nap")
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def napping(self) -> bool:
        return "napping" in self.process.said


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(world: str, spawn: Spawn, free_port: Callable[[], int]) -> Iterator[Callable[..., Service]]:
    services = []

    def started(**environment: str) -> Service:
        port = free_port()
        process = spawn.python(
            SERVING, world, environment={"MESH_LISTEN": f"127.0.0.1:{port}", "MESH_DRAIN_WAIT": "0.1", **environment}
        )
        process.wait_for("serving test.Sleeper")
        services.append(Service(process, port))
        return services[-1]

    yield started
    for service in services:
        service.channel.close()


@pytest.mark.slow
class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_lets_calls_in_flight_finish_and_exits_0(
        self, start: Callable[..., Service], number: signal.Signals
    ) -> None:
        service = start()
        call = service.nap.future(b"700", timeout=20)
        service.process.wait_until(service.napping)
        service.process.send(number)
        assert call.result() == b"rested"
        assert service.process.wait() == 0
        assert "Traceback" not in service.process.said

    def test_what_does_not_finish_in_the_grace_is_ended(self, start: Callable[..., Service]) -> None:
        service = start(MESH_GRACE="0.2")
        call = service.nap.future(b"60000", timeout=20)
        service.process.wait_until(service.napping)
        service.process.send(signal.SIGTERM)
        assert call.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        assert service.process.wait() == 0

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_a_second_signal_ends_it_at_once_and_the_exit_code_says_so(
        self, start: Callable[..., Service], number: signal.Signals, code: int
    ) -> None:
        service = start(MESH_GRACE="60")
        call = service.nap.future(b"60000", timeout=20)
        service.process.wait_until(service.napping)
        watch = service.health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        service.process.send(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        service.process.send(number)
        assert service.process.wait() == code
        assert call.code() is not grpc.StatusCode.OK

    def test_every_health_watch_hears_of_the_drain_and_none_holds_it_up(self, start: Callable[..., Service]) -> None:
        service = start(MESH_GRACE="60")
        watches = [
            service.health.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", "test.Sleeper", "other")
        ]
        statuses = health_pb2.HealthCheckResponse
        assert [next(watch).status for watch in watches] == [
            statuses.SERVING,
            statuses.SERVING,
            statuses.SERVICE_UNKNOWN,
        ]
        service.process.send(signal.SIGTERM)
        assert [next(watch).status for watch in watches[:2]] == [statuses.NOT_SERVING] * 2
        assert service.process.wait(within=20) == 0
        for watch in watches:
            watch.cancel()


@pytest.mark.slow
class TestBadStart:
    def test_a_port_in_use_is_one_line_and_exit_code_2(self, world: str, spawn: Spawn) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            listen = f"127.0.0.1:{taken.getsockname()[1]}"
            process = spawn.python(SERVING, world, environment={"MESH_LISTEN": listen})
            assert process.wait() == 2
        assert process.said.splitlines() == [f"can't listen on {listen}: Address already in use", "exit code 2"]

    def test_so_is_a_bad_setting(self, world: str, spawn: Spawn) -> None:
        process = spawn.python(SERVING, world, environment={"MESH_GRACE": "soon"})
        assert process.wait() == 2
        assert process.said.splitlines() == ["MESH_GRACE='soon': expected seconds from 0 to 3600", "exit code 2"]

    def test_and_a_host_that_is_not_ours(self, world: str, spawn: Spawn) -> None:
        process = spawn.python(SERVING, world, environment={"MESH_LISTEN": "nosuch.invalid:5000"})
        assert process.wait() == 2
        (line, _) = process.said.splitlines()
        assert line.startswith("can't listen on nosuch.invalid:5000: ")


@pytest.mark.slow
def test_a_client_that_vanishes_in_a_call_is_noticed(start: Callable[..., Service]) -> None:
    service = start(MESH_GRACE="60")
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(service.nap, b"60000", timeout=30)
        service.process.wait_until(service.napping)
        service.channel.close()
        with pytest.raises((grpc.RpcError, ValueError)):
            done.result(20)
    # With nothing in flight, the drain needs none of its minute.
    assert service.process.end() == 0


@pytest.mark.slow
def test_reflection_is_a_switch(start: Callable[..., Service]) -> None:
    with_it, without = start(MESH_REFLECTION="on"), start()
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection_pb2_grpc.ServerReflectionStub(with_it.channel).ServerReflectionInfo(iter([ask]), timeout=10)
    assert {service.name for service in answer.list_services_response.service} == {
        "test.Sleeper",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    with pytest.raises(grpc.RpcError) as caught:
        list(reflection_pb2_grpc.ServerReflectionStub(without.channel).ServerReflectionInfo(iter([ask]), timeout=10))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
