"""Records of the calls that replicas receive, kept up to date until the calls end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc


@dataclass(eq=False, slots=True)
class RecordedCall:
    """A call that reached a replica. Each attempt is one, so a retried call is recorded more than once.

    ``method``: "/package.Service/Method". ``replica``: the name of the replica. ``metadata``: what the client sent, in
    pairs. ``timeout``: seconds until its deadline when it arrived; None without one. ``requests``: its
    messages; those of a stream as they are read.

    ``code`` is None until it has ended; ``details`` go with it. A call whose client gave up ends with CANCELLED
    or DEADLINE_EXCEEDED. ``error``: the exception that the servicer raised, if any. ``injected``: whether a fault ended
    it, so that it never reached the servicer.
    """

    method: str
    replica: str
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    timeout: float | None = None
    requests: list[Any] = field(default_factory=list)
    code: grpc.StatusCode | None = None
    details: str = ""
    error: BaseException | None = None
    injected: bool = False

    @property
    def request(self) -> Any:
        """The request, or the first one of a stream. Raises IndexError if none was read."""
        return self.requests[0]

    def __str__(self) -> str:
        details = f": {self.details}" if self.details else ""
        return f"{self.method} at {self.replica}: {self.code.name if self.code else 'RUNNING'}{details}"

    def __repr__(self) -> str:
        return f"<RecordedCall {self}>"


class CallRecorder:
    """The calls received, in order of arrival. Safe from any thread."""

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []
        self._lock = threading.Lock()
        self._watchers: list[Callable[[], object]] = []

    def add(self, call: RecordedCall) -> None:
        """A call has arrived."""
        self.calls.append(call)
        self.changed()

    def changed(self) -> None:
        """A call has arrived or ended."""
        with self._lock:
            watchers = tuple(self._watchers)
        for watcher in watchers:
            watcher()

    def watch(self, watcher: Callable[[], object]) -> Callable[[], None]:
        """Call ``watcher``, from any thread, whenever a call arrives or ends. Returns a function that stops this."""
        with self._lock:
            self._watchers.append(watcher)

        def stop() -> None:
            with self._lock:
                self._watchers.remove(watcher)

        return stop

    def __repr__(self) -> str:
        return f"<CallRecorder {len(self.calls)}>"
