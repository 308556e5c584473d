"""The drivers of a flow: they perform its steps and tell it what happened.

``run_blocking`` runs a flow in the caller's thread, over grpc's own blocking path. ``EventDriver`` runs one by
events, for futures, streams and asyncio; nothing in it blocks. The simulator is a driver too.

Rule 1: StopIteration is caught around ``next`` and ``send`` alone.
Rule 2: events come from any thread and at any time, also from within a step (grpc runs a callback inline when the
call is already over): they go through a queue that one thread at a time empties, the trampoline.
Rule 3: whatever happens the flow is closed, so that what is in flight is given back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from mesh.channel.replay import LIMIT
from mesh.channel.subchannels import NEVER_SENT_DETAILS, Pool
from mesh.model import (
    Attempt,
    CallSpec,
    Code,
    Commit,
    Elapsed,
    Ended,
    Headers,
    Outcome,
    Overflow,
    Step,
    Verdict,
    Wait,
    Wake,
)
from mesh.policy.flow import Flow

PREVIOUS_ATTEMPTS = "grpc-previous-rpc-attempts"
PUSHBACK = "grpc-retry-pushback-ms"

NEVER_SENT = Outcome(Code.UNAVAILABLE, "no connection to send it on", never_sent=True)
CANCELLED_DETAILS = "Locally cancelled by application!"  # grpc's words


def run_blocking(flow: Flow, perform: Callable[[Attempt], Outcome], pool: Pool) -> Verdict:
    """Run ``flow`` in this thread; ``perform`` makes an attempt and blocks until it has ended."""
    clock = time.monotonic
    try:
        step = next(flow)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    try:
        while True:
            wake: Wake
            if type(step) is Attempt:
                outcome = perform(step)
                wake = Ended(clock(), step.number, outcome)
            else:
                _wait(step, pool)
                wake = Elapsed(clock())
            try:
                step = flow.send(wake)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
    finally:
        flow.close()


def _wait(step: Step, pool: Pool) -> None:
    """Block until the step's time is over or its picker was replaced. (Nothing else runs beside a blocking attempt.)"""
    assert isinstance(step, Wait)
    happened = threading.Event()
    if step.picker is not None:
        pool.when_replaced(step.picker, happened.set)
    try:
        happened.wait(None if step.until is None else max(0.0, step.until - time.monotonic()))
    finally:
        pool.forget(happened.set)


class Timer(Protocol):
    """Something that will happen unless it is cancelled."""

    def cancel(self) -> object: ...


class EventDriver:
    """Runs a flow by events.

    A world gives it ``begin`` and ``call_later``, and hears of ``changed``. ``committed`` is the inner call that is
    the call now; ``verdict`` is set once, when the call is over.
    """

    def __init__(self, call: CallSpec, flow: Flow, pool: Pool) -> None:
        self.call = call
        self.pool = pool
        self.running: dict[int, Any] = {}  # the inner calls of the attempts that run, by number
        self.committed: Any = None
        self.verdict: Verdict | None = None
        self.finished_at = 0.0
        self._flow = flow
        self._wakes: deque[Wake | None] = deque()
        self._lock = threading.Lock()
        self._advancing = False
        self._timer: Timer | None = None

    # -- what a world gives

    def begin(self, attempt: Attempt) -> None:
        """Start ``attempt``: put its inner call into ``running``, or report at once how it ended. Doesn't block."""
        raise NotImplementedError

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` in ``delay`` seconds."""
        raise NotImplementedError

    def changed(self) -> None:
        """An attempt began or was committed, or the call is over: tell whoever waits for that."""
        raise NotImplementedError

    # -- events

    def start(self) -> None:
        """Run the flow's first step, in this thread."""
        self._send(_START)

    def ended(self, number: int, outcome: Outcome) -> None:
        """Attempt ``number`` has ended."""
        self._send(Ended(time.monotonic(), number, outcome))

    def headers(self, number: int) -> None:
        """The server has begun to answer attempt ``number``."""
        self._send(Headers(time.monotonic(), number))

    def overflow(self, number: int) -> None:
        """What attempt ``number`` has sent can't be sent again."""
        self._send(Overflow(time.monotonic(), number))

    def elapsed(self) -> None:
        """Time has passed, or the picker was replaced."""
        self._send(Elapsed(time.monotonic()))

    def cancel(self, details: str = CANCELLED_DETAILS) -> bool:
        """End the call here; False when it was over already."""
        if not self._conclude(Verdict(Outcome(Code.CANCELLED, details, cancelled=True))):
            return False
        self._send(None)
        return True

    def _send(self, wake: Wake | None) -> None:
        """Have the flow advanced with ``wake``: by this thread, or by the one that is at it already."""
        self._wakes.append(wake)
        with self._lock:
            if self._advancing:
                return
            self._advancing = True
        while True:
            try:
                while self._wakes:
                    self._advance(self._wakes.popleft())
            except BaseException as error:
                self._conclude(Verdict(Outcome(Code.INTERNAL, f"{type(error).__name__}: {error}")))
                self._clean_up()
                self._advancing = False
                raise
            with self._lock:
                if not self._wakes:
                    self._advancing = False
                    return

    # -- by one thread at a time

    def _advance(self, wake: Wake | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if isinstance(wake, Ended):
            self.running.pop(wake.number, None)
        if self.verdict is None:
            try:
                step = self._flow.send(None if wake is _START else wake)  # type: ignore[arg-type]
            except StopIteration as stop:
                self._conclude(stop.value)
            else:
                self._perform(step)
                return
        self._clean_up()

    def _perform(self, step: Step) -> None:
        if isinstance(step, Commit):
            self.committed = self.running.pop(step.number)
            self._cancel_running()
            self.running[step.number] = self.committed
            self.changed()
            return
        if isinstance(step, Attempt):
            self.begin(step)
            self.changed()
        elif step.picker is not None:
            self.pool.when_replaced(step.picker, self.elapsed)
        if step.until is not None:
            self._timer = self.call_later(max(0.0, step.until - time.monotonic()), self.elapsed)

    def _conclude(self, verdict: Verdict) -> bool:
        with self._lock:
            if self.verdict is not None:
                return False
            self.finished_at = time.monotonic()
            self.verdict = verdict
            return True

    def _clean_up(self) -> None:
        self._flow.close()
        self._cancel_running()
        self.pool.forget(self.elapsed)
        self.changed()

    def _cancel_running(self) -> None:
        while self.running:
            self.running.popitem()[1].cancel()


_START = Elapsed(0.0)

CODES = {code.value[0]: code for code in grpc.StatusCode}
STATES = {state.value[0]: state for state in grpc.ChannelConnectivity}


def pushback_of(trailing_metadata: Any) -> float | None:
    """The server's word on when to retry, in seconds; -1.0 (never) when it can't be read (A6)."""
    for key, value in trailing_metadata or ():
        if key == PUSHBACK:
            try:
                milliseconds = int(value)
            except ValueError:
                return -1.0
            return milliseconds / 1000 if milliseconds >= 0 else -1.0
    return None


def failed(
    code: int, details: str | None, initial: Any, trailing: Any, result: object, *, cancelled: bool = False
) -> Outcome:
    """The outcome of an attempt that core ended with a status other than OK."""
    details = details or ""
    return Outcome(
        code,
        details,
        pushback=pushback_of(trailing),
        committed=bool(initial),
        never_sent=code == Code.UNAVAILABLE and details.startswith(NEVER_SENT_DETAILS),
        cancelled=cancelled,
        result=result,
    )


def too_large(serializer: Callable[[Any], bytes] | None, request: Any) -> bool:
    """Whether a unary request is more than is kept for another attempt."""
    try:
        return len(serializer(request) if serializer else request) > LIMIT
    except Exception:  # it could not be serialised, which is how the attempt has failed
        return False


def retry_metadata(attempt: Attempt) -> Any:
    """The metadata to send: the call's own, and for a retry how many attempts came before (A6)."""
    if not attempt.previous:
        return attempt.metadata
    return (*(attempt.metadata or ()), (PREVIOUS_ATTEMPTS, str(attempt.previous)))
