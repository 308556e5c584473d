"""``grpc.health.v1`` for a threaded server; for asyncio see ``mesh/health.py``.

grpcio's own servicer can deadlock: it sends while it holds a lock that a leaving client's watch takes, on the thread
that would complete the send. And it can't end a watch: one that a client keeps open would use up a drain's grace.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from mesh.health import SERVICE_UNKNOWN
from mesh.server.thread_pool import iterate_responses


class _Watch:
    """One client's watch. ``send`` blocks until the response has been sent."""

    def __init__(self, service: str, send: Callable[[Any], object]) -> None:
        self.send = send
        self._service = service
        self._lock = threading.Lock()
        self._sent: Any = None

    def update(self, statuses: dict[str, Any]) -> None:
        # Looked up under the lock, so that the last of several concurrent updates sends the current status.
        with self._lock:
            status = statuses.get(self._service, SERVICE_UNKNOWN)
            if status != self._sent:
                self._sent = status
                self.send(health_pb2.HealthCheckResponse(status=status))


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """For a ``grpc.Server``. A watch holds a thread of its pool only if an interceptor wraps it; ``threads`` limits how
    many do."""

    def __init__(self, threads: threading.Semaphore) -> None:
        self._statuses: dict[str, Any] = {}
        self._watches: set[_Watch] = set()
        self._threads = threads

    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        status = self._statuses.get(request.service)
        if status is None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details(f"unknown service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=status)

    def Watch(self, request: Any, context: Any, send: Callable[[Any], object] | None = None) -> Any:  # noqa: N802
        if send is None:
            return iterate_responses(self.Watch, self._threads, request, context)
        watch = _Watch(request.service, send)
        self._watches.add(watch)

        def end() -> None:
            self._watches.discard(watch)
            watch.send(None)

        if context.add_callback(end):
            watch.update(self._statuses)
        else:
            end()
        return None

    Watch.experimental_non_blocking = True  # type: ignore[attr-defined]

    def set(self, status: Any, services: Iterable[str]) -> None:
        """Set the status of ``services`` and of the server as a whole."""
        self._statuses.update(dict.fromkeys(("", *services), status))
        for watch in tuple(self._watches):
            watch.update(self._statuses)

    def end_watches(self) -> None:
        """End the open watches."""
        for watch in tuple(self._watches):
            watch.send(None)
