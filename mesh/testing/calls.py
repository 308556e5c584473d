"""The calls that the replicas of a test mesh received, for assertions."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, overload

from mesh.testing.methods import Methods
from mesh.testing.recording import CallRecorder, RecordedCall

if TYPE_CHECKING:
    from mesh.testing.base import BaseReplica

WAIT = 10.0
"""The default timeout of ``wait``. Seconds."""


class CallLog(Sequence[RecordedCall]):
    """The calls that the replicas of a test mesh received, in order of arrival. A sequence: ``len(calls)``,
    ``calls[-1].request``, ``for call in calls``. Without health checks and reflection."""

    def __init__(self, methods: Methods, recorder: CallRecorder) -> None:
        self._methods = methods
        self._recorder = recorder

    def of(
        self, method: str | None = None, *, replica: BaseReplica | str | None = None, ended: bool = False
    ) -> tuple[RecordedCall, ...]:
        """The calls of ``method`` ("Method", or "package.Service/Method") at ``replica`` (or its name); ``ended``: only
        those that have ended. Raises ValueError for a method that no replica serves."""
        wanted = self._methods.matching(method)
        name = None if replica is None else str(replica)
        return tuple(
            call
            for call in self
            if wanted(call.method) and name in (None, call.replica) and not (ended and call.code is None)
        )

    def clear(self) -> None:
        """Forget all calls."""
        self._recorder.calls.clear()

    @overload
    def __getitem__(self, index: int) -> RecordedCall: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RecordedCall]: ...
    def __getitem__(self, index: int | slice) -> RecordedCall | Sequence[RecordedCall]:
        return self._recorder.calls[index]

    def __iter__(self) -> Iterator[RecordedCall]:
        return iter(tuple(self._recorder.calls))

    def __len__(self) -> int:
        return len(self._recorder.calls)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self)}>"

    def _missing(self, count: int, timeout: float, method: str | None, found: int) -> TimeoutError:
        """What ``wait`` raises."""
        of = f" of {method}" if method else ""
        received = "".join(f"\n  {call}" for call in self) or " none"
        return TimeoutError(f"{found} of {count} calls{of} arrived within {timeout:g} s; all calls:{received}")


class Calls(CallLog):
    """The calls that the replicas of a test mesh received, in order of arrival. A sequence: ``len(calls)``,
    ``calls[-1].request``, ``for call in calls``. Without health checks and reflection."""

    def wait(
        self,
        count: int = 1,
        method: str | None = None,
        *,
        replica: BaseReplica | str | None = None,
        ended: bool = False,
        timeout: float = WAIT,
    ) -> tuple[RecordedCall, ...]:
        """Wait until ``count`` calls have arrived, including earlier ones, and return them; other arguments as in
        ``of``. Raises TimeoutError, which lists the calls that did arrive, after ``timeout`` seconds."""
        happened = threading.Event()
        stop = self._recorder.watch(happened.set)
        end = time.monotonic() + timeout
        try:
            while True:
                happened.clear()
                found = self.of(method, replica=replica, ended=ended)
                if len(found) >= count:
                    return found
                if not happened.wait(max(0.0, end - time.monotonic())):
                    raise self._missing(count, timeout, method, len(found))
        finally:
            stop()
