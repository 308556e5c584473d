"""``grpc.health.v1``: the statuses of services, and the servicer of an asyncio server.

grpcio's own servicer writes a watch's responses instead of yielding them, which breaks interceptors that iterate over
responses (OpenTelemetry's and Sentry's). And it can't end a watch: one that a client keeps open would use up a drain's
grace.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthStatuses(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """What both kinds of server share: the statuses of services, and of the server as a whole."""

    def __init__(self) -> None:
        self._statuses: dict[str, Any] = {}

    def set(self, status: Any, services: Iterable[str]) -> None:
        """Set the status of ``services`` and of the server as a whole."""
        self._statuses.update(dict.fromkeys(("", *services), status))
        self._update_watches()

    def end_watches(self) -> None:
        """End the open watches."""
        raise NotImplementedError

    def _update_watches(self) -> None:
        """Have the open watches send what has changed."""
        raise NotImplementedError

    def _watched(self, service: str) -> Any:
        return self._statuses.get(service, SERVICE_UNKNOWN)


class AioHealth(HealthStatuses):
    """For a ``grpc.aio.Server``. Watches that start after ``end_watches`` end at once."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Event()  # each change replaces it
        self._ended = False

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.service not in self._statuses:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=self._statuses[request.service])

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        sent = None
        while not self._ended:
            changed = self._changed
            status = self._watched(request.service)
            if status == sent:
                await changed.wait()
            else:
                sent = status
                yield health_pb2.HealthCheckResponse(status=status)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")

    def end_watches(self) -> None:
        self._ended = True
        self._update_watches()

    def _update_watches(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
