"""``grpc.health.v1`` for a threaded server; for asyncio see ``mesh/health.py``.

grpcio's own servicer can deadlock: it sends while it holds a lock that a leaving client's watch takes, on the thread
that would complete the send. And it can't end a watch: one that a client keeps open would use up a drain's grace.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from mesh.health import HealthStatuses
from mesh.server.thread_pool import iterate_responses


class _Watch:
    """One client's watch. ``send`` blocks until the response has been sent."""

    def __init__(self, status: Callable[[], Any], send: Callable[[Any], object]) -> None:
        self.send = send
        self._status = status
        self._lock = threading.Lock()
        self._sent: Any = None

    def update(self) -> None:
        # Looked up under the lock, so that the last of several concurrent updates sends the current status.
        with self._lock:
            status = self._status()
            if status != self._sent:
                self._sent = status
                self.send(health_pb2.HealthCheckResponse(status=status))


class Health(HealthStatuses):
    """For a ``grpc.Server``. A watch holds a thread of its pool only if an interceptor wraps it; ``threads`` limits how
    many do."""

    def __init__(self, threads: threading.Semaphore) -> None:
        super().__init__()
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
        watch = _Watch(lambda: self._watched(request.service), send)
        self._watches.add(watch)

        def end() -> None:
            self._watches.discard(watch)
            watch.send(None)

        if context.add_callback(end):
            watch.update()
        else:
            end()
        return None

    Watch.experimental_non_blocking = True  # type: ignore[attr-defined]

    def end_watches(self) -> None:
        for watch in tuple(self._watches):
            watch.send(None)

    def _update_watches(self) -> None:
        for watch in tuple(self._watches):
            watch.update()
