"""What a server's health service says of a service that it doesn't serve (gRFC A17)."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

import mesh.server.aio
import mesh.server.sync
from mesh import ServerSettings

BOUND = 10.0
SETTINGS = ServerSettings(listen="127.0.0.1:0", drain_wait=0.0)
UNKNOWN = health_pb2.HealthCheckRequest(service="test.Unknown")
WHOLE = health_pb2.HealthCheckRequest()
SERVING, SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def test_a_threaded_server_answers_a_check_with_not_found_and_a_watch_with_service_unknown() -> None:
    with mesh.server.sync.Server([], SETTINGS) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(WHOLE, timeout=BOUND).status == SERVING
        with pytest.raises(grpc.RpcError) as raised:
            health.Check(UNKNOWN, timeout=BOUND)
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(UNKNOWN, timeout=BOUND)
        assert next(watch).status == SERVICE_UNKNOWN
        watch.cancel()


async def test_an_asyncio_server_answers_a_check_with_not_found_and_a_watch_with_service_unknown() -> None:
    async with (
        mesh.server.aio.Server([], SETTINGS) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(WHOLE, timeout=BOUND)).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await health.Check(UNKNOWN, timeout=BOUND)
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(UNKNOWN, timeout=BOUND)
        assert (await watch.read()).status == SERVICE_UNKNOWN
        watch.cancel()
