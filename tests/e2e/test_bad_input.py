"""What a caller through the mesh is told when something is wrong, in both worlds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh
import mesh.aio
from tests.processes import HOST, Spawn
from weft.mesh.v1 import registry_pb2, registry_pb2_grpc

METHOD = "/weft.user.v1.UserService/GetUser"

OPENS: list[Callable[..., Any]] = [mesh.insecure_channel, mesh.aio.insecure_channel]
both = pytest.mark.parametrize("open_channel", OPENS, ids=["sync", "aio"])


def get(target: str, seconds: float) -> Any:
    """Make a call that blocks, with so many seconds to its deadline; returns its error."""
    with mesh.insecure_channel(target) as channel:
        call: Any = channel.unary_unary(METHOD)
        with pytest.raises(grpc.RpcError) as raised:
            call(b"", timeout=seconds)
    return raised.value


async def get_async(target: str, seconds: float) -> Any:
    """The same with asyncio."""
    async with mesh.aio.insecure_channel(target) as channel:
        call: Any = channel.unary_unary(METHOD)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(b"", timeout=seconds)
    return raised.value


@pytest.mark.slow
@pytest.mark.parametrize("get", [get, lambda *call: asyncio.run(get_async(*call))], ids=["sync", "aio"])
def test_a_registry_that_refuses_connections_fails_calls_and_is_named(
    get: Callable[[str, float], Any], free_port: Callable[[], int]
) -> None:
    registry = f"{HOST}:{free_port()}"
    error = get(f"mesh://{registry}/weft.user.v1.UserService", 10)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert f"registry {registry}: UNAVAILABLE" in error.details()
    assert error.explain().seconds < 5, "and not at the deadline, as with gRPC"
    assert not error.explain().attempts


@pytest.mark.slow
def test_a_call_made_before_the_registry_is_up_is_answered_once_it_is(
    spawn: Spawn, free_port: Callable[[], int]
) -> None:
    """The registry, which serves health too, stands in for a replica of a service."""
    registry = f"{HOST}:{free_port()}"
    with mesh.insecure_channel(f"mesh://{registry}/weft.mesh.v1.Registry") as channel:
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        call = check.future(b"", timeout=30, wait_for_ready=True)
        spawn.python("-m", "mesh.registry", "--listen", registry).wait_for("serving")
        with grpc.insecure_channel(registry) as plain:
            instance = registry_pb2.Instance(id="itself", service="weft.mesh.v1.Registry", address=registry)
            registry_pb2_grpc.RegistryStub(plain).Register(registry_pb2.RegisterRequest(instance=instance), timeout=10)
        assert call.result()


@both
@pytest.mark.parametrize(
    ("config", "path"),
    [
        ("{", "service config: not JSON"),
        ('{"methodConfig": [{"name": [{}], "timeout": "fast"}]}', "service config: methodConfig[0].timeout: "),
        ('{"methodConfig": [{"name": [{}], "retryPolicy": {}}]}', "service config: methodConfig[0].retryPolicy."),
        ('{"loadBalancingConfig": [{"luck": {}}]}', "service config: loadBalancingConfig: "),
    ],
)
def test_a_malformed_service_config_is_refused_with_the_fields_path_when_the_channel_is_made(
    open_channel: Callable[..., Any], config: str, path: str
) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is what is looked at
        open_channel(f"static:///{HOST}:1", options=[("grpc.service_config", config)])
    assert str(raised.value).startswith(path)


@both
def test_an_unknown_scheme_is_refused_with_those_that_are_known(open_channel: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"known.*mesh.*static.*dns"):
        open_channel("mess:///weft.user.v1.UserService")
