"""``python -m mesh.registry``, as an operator meets it."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # type: ignore[import-untyped]

from tests.processes import Spawn
from tests.registry.serving import USER, instance
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_ends_well_when_told_to(
    spawn: Spawn, free_port: Callable[[], int], number: signal.Signals
) -> None:
    address = f"127.0.0.1:{free_port()}"
    registry = spawn.python("-m", "mesh.registry", environment={"MESH_REGISTRY_LISTEN": address})
    registry.wait_for(f"serving on {address}")
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "weft.mesh.v1.Registry"):
            check = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert check.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        listed = next(iter(reflection.ServerReflectionInfo(asked, timeout=5))).list_services_response.service
        assert "weft.mesh.v1.Registry" in {service.name for service in listed}

        stub = pb_grpc.RegistryStub(channel)
        stub.Register(pb.RegisterRequest(instance=instance("a")), timeout=5)
        watch = stub.Watch(pb.WatchRequest(service=USER), timeout=30)
        assert [each.id for each in next(watch).snapshot.instances] == ["a"]

        assert registry.end(number) == 0
        with pytest.raises(grpc.RpcError) as raised:
            next(watch)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert raised.value.details() == "the registry is shutting down"


@pytest.mark.slow
def test_a_port_in_use_is_one_line_and_exit_code_2(spawn: Spawn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        registry = spawn.python("-m", "mesh.registry", "--listen", address)
        assert registry.wait() == 2
    assert registry.said == f"mesh.registry: can't listen on {address}: Address already in use\n"


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["50050", "localhost:", "localhost:99999", "http://localhost:50050"])
def test_a_bad_setting_is_one_line_and_exit_code_2(spawn: Spawn, setting: str) -> None:
    registry = spawn.python("-m", "mesh.registry", environment={"MESH_REGISTRY_LISTEN": setting})
    assert registry.wait() == 2
    assert registry.said.startswith(
        f"mesh.registry: MESH_REGISTRY_LISTEN or --listen must be HOST:PORT, not {setting!r}: "
    )
    assert registry.said.count("\n") == 1
