"""What the replicas of a test mesh were called with, and how each call ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import grpc

from mesh.testing.methods import Methods

WAIT = 10.0
"""How long ``wait`` waits unless told otherwise. Seconds."""


@dataclass(eq=False, slots=True)
class RecordedCall:
    """A call that reached a replica: an attempt of a client's call, so a call that was retried is here more than once.

    ``method``: "/package.Service/Method". ``replica``: the name of the replica. ``metadata``: what the client sent, in
    pairs. ``timeout``: seconds that were left of its deadline when it came; None without one. ``requests``: its
    messages; those of a stream as they are read.

    ``code`` is None until it has ended; ``details`` go with it. A call that its client gave up ends CANCELLED, or
    DEADLINE_EXCEEDED. ``error``: what the servicer raised, if it raised anything. ``injected``: whether a fault ended
    it, so that no servicer saw it.
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
        """The request of a call that has one; the first one of a stream. Raises IndexError when none was read."""
        return self.requests[0]

    def __str__(self) -> str:
        details = f": {self.details}" if self.details else ""
        return f"{self.method} at {self.replica}: {self.code.name if self.code else 'RUNNING'}{details}"

    def __repr__(self) -> str:
        return f"<RecordedCall {self}>"


class CallLog(Sequence[RecordedCall]):
    """The calls that came to the replicas of a test mesh, in the order in which they came. A sequence: ``len(calls)``,
    ``calls[-1].request``, ``for call in calls``. Health checks and reflection are not in it."""

    def __init__(self, methods: Methods) -> None:
        self._methods = methods
        self._calls: list[RecordedCall] = []
        self._lock = threading.Lock()
        self._watchers: list[Callable[[], object]] = []

    def of(self, method: str | None = None, *, replica: object = None, ended: bool = False) -> tuple[RecordedCall, ...]:
        """The calls of ``method`` ("Method", or "package.Service/Method") at ``replica`` (or its name); ``ended``: of
        those only the ones that have ended. Raises ValueError for a method that nobody serves."""
        return tuple(filter(self._filter(method, replica, ended), tuple(self._calls)))

    def clear(self) -> None:
        """Forget all calls."""
        with self._lock:
            self._calls.clear()

    @overload
    def __getitem__(self, index: int) -> RecordedCall: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RecordedCall]: ...
    def __getitem__(self, index: int | slice) -> RecordedCall | Sequence[RecordedCall]:
        return self._calls[index]

    def __iter__(self) -> Iterator[RecordedCall]:
        return iter(tuple(self._calls))

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self)}>"

    # -- for the handlers that record, and for who waits

    def add(self, call: RecordedCall) -> None:
        """A call has come."""
        with self._lock:
            self._calls.append(call)
        self.changed()

    def changed(self) -> None:
        """A call has come or ended."""
        with self._lock:
            watchers = tuple(self._watchers)
        for watcher in watchers:
            watcher()

    def watch(self, watcher: Callable[[], object]) -> Callable[[], None]:
        """Have ``watcher`` called, from any thread, when a call comes or ends; until what is returned is called."""
        with self._lock:
            self._watchers.append(watcher)

        def stop() -> None:
            with self._lock:
                self._watchers.remove(watcher)

        return stop

    def _filter(self, method: str | None, replica: object, ended: bool) -> Callable[[RecordedCall], bool]:
        wanted = self._methods.matching(method)
        name = None if replica is None else str(replica)

        def matches(call: RecordedCall) -> bool:
            return wanted(call.method) and name in (None, call.replica) and not (ended and call.code is None)

        return matches

    def missing(self, count: int, timeout: float, method: str | None, found: Iterable[RecordedCall]) -> TimeoutError:
        """What ``wait`` raises."""
        of, came = f" of {method}" if method else "", tuple(found)
        all_calls = "".join(f"\n  {call}" for call in self) or " none"
        return TimeoutError(f"{len(came)} of {count} calls{of} came within {timeout:g} s; all calls:{all_calls}")


class Calls(CallLog):
    """As ``CallLog``, for a test with blocking calls."""

    def wait(
        self,
        count: int = 1,
        method: str | None = None,
        *,
        replica: object = None,
        ended: bool = False,
        timeout: float = WAIT,
    ) -> tuple[RecordedCall, ...]:
        """Wait until so many calls came, and return those that did; arguments as in ``of``. Calls that came before
        count. Raises TimeoutError, which lists the calls that came, after ``timeout`` seconds."""
        happened = threading.Event()
        stop = self.watch(happened.set)
        end = time.monotonic() + timeout
        try:
            while True:
                happened.clear()
                found = self.of(method, replica=replica, ended=ended)
                if len(found) >= count:
                    return found
                if not happened.wait(max(0.0, end - time.monotonic())):
                    raise self.missing(count, timeout, method, found)
        finally:
            stop()
