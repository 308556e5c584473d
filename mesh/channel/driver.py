"""Drivers run a call's flow: they perform its steps and send it wake-ups.

``run_blocking`` runs a flow in the caller's thread, over grpc's own blocking path. ``EventDriver`` runs one by
events, for futures, streams and asyncio; nothing in it blocks.

Rule 1: StopIteration is caught around ``next`` and ``send`` alone.
Rule 2: events come from any thread at any time, even from within a step (grpc runs a callback inline when the call has
already ended). They are queued, and one thread at a time processes the queue.
Rule 3: the flow is always closed, so that in-flight counts are released.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from mesh import context
from mesh.channel.assemble import Assembly
from mesh.channel.outcome import CANCELLED_DETAILS, CLOSED_DETAILS, FORKED_DETAILS, exceeds_replay_limit
from mesh.channel.pool import Pool
from mesh.channel.replay import Buffer
from mesh.channel.subchannel import Method
from mesh.codes import Code
from mesh.model import (
    Attempt,
    CallSpec,
    Cancel,
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
from mesh.observe import Explanation, explain
from mesh.policy.call.flow import Flow


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
            if pool.closed:
                return Verdict(Outcome(Code.CANCELLED, CLOSED_DETAILS, cancelled=True))
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
    """Block until the step's time is up or the picker changes. (No attempt is running.)"""
    assert isinstance(step, Wait)
    woken = threading.Event()
    if step.picker is not None:
        pool.exit_idle()
    # Also during backoff, to notice that the channel closes.
    pool.on_picker_change(step.picker or pool.cluster.picker, woken.set)
    try:
        woken.wait(until(step.until))
    finally:
        pool.forget(woken.set)


class TimerFired(Elapsed):
    """The timer set by ``set_timer`` has fired."""

    __slots__ = ()


class Owner(Protocol):
    """What a call needs from its channel."""

    assembly: Assembly


class EventDriver:
    """Runs a flow by events, all in one thread (asyncio's). ``LockedDriver`` takes events from any thread.

    It holds all of a call's state; the call object is what the user holds. Subclasses implement
    ``start_attempt``, ``set_timer`` and ``changed``. ``running``: the core calls of the running attempts, by number.
    ``committed``: the core call of the attempt that the call is committed to. ``verdict`` is set once, when the call is
    over. ``hedged``: several attempts may run at a time.
    """

    replay: Buffer | None = None  # of a stream of requests
    _inherited: object = None  # in a forked child: the parent's core calls, kept but never touched

    def __init__(
        self,
        channel: Owner,
        method: Method,
        call: CallSpec,
        flow: Flow,
        requests: Any,
        serializer: Any,
        credentials: grpc.CallCredentials | None,
        compression: grpc.Compression | None,
    ) -> None:
        assembly = channel.assembly
        self.call = call
        self.pool: Pool = assembly.pool
        self.running: dict[int, Any] = {}
        self.committed: Any = None
        self.verdict: Verdict | None = None
        self.finished_at = 0.0
        self.hedged = False  # known with the first attempt
        self._assembly = assembly
        self._method = method
        self._request = None if method.kind.startswith("stream") else requests
        self._serializer = serializer
        self._credentials = credentials
        self._compression = compression
        self._scope = context.current()
        self._flow = flow
        self._wakes: deque[Wake | None] = deque()
        self._advancing = False
        self._until: float | None = None
        self._queued = False

    # -- what subclasses implement

    def start_attempt(self, attempt: Attempt) -> None:
        """Start ``attempt``: put its core call into ``running``, or report at once how it ended. Does not block."""
        raise NotImplementedError

    def set_timer(self, until: float | None) -> None:
        """Call ``timer_fired`` at ``until``, instead of at the time set before; None cancels the timer."""
        raise NotImplementedError

    def changed(self) -> None:
        """An attempt started or was committed, or the call has ended: wake up whoever waits for that."""
        raise NotImplementedError

    # -- for call objects

    def explain(self) -> Explanation:
        """Every attempt that was made for the call so far: where, when, and how it ended."""
        return explain(self.call, self._assembly.target, self.verdict, self.finished_at)

    def time_remaining(self) -> float | None:
        """Seconds to the call's deadline; None without one."""
        deadline = self.call.deadline
        return None if deadline == math.inf else max(0.0, deadline - time.monotonic())

    def forked(self) -> None:
        """In a forked child: the call continues in the parent and has ended here. Nothing in core is called."""
        self._conclude(Verdict(Outcome(Code.CANCELLED, FORKED_DETAILS, cancelled=True)))
        self._inherited = dict(self.running), self.committed
        self.running, self.committed = {}, None

    # -- events

    def start(self) -> None:
        """Run the flow's first step, in this thread."""
        self._deliver(START)

    def ended(self, number: int, outcome: Outcome) -> None:
        """Attempt ``number`` has ended."""
        self._deliver(Ended(time.monotonic(), number, outcome))

    def headers_received(self, number: int) -> None:
        """The server has started to respond to attempt ``number``."""
        self._deliver(Headers(time.monotonic(), number))

    def replay_overflowed(self, number: int) -> None:
        """Attempt ``number`` has sent more than the replay buffer holds, so its requests can't be sent again."""
        self._deliver(Overflow(time.monotonic(), number))

    def timer_fired(self) -> None:
        """The timer set by ``set_timer`` has fired."""
        self._deliver(TimerFired(time.monotonic()))

    def picker_changed(self) -> None:
        """The picker was replaced."""
        self._deliver(Elapsed(time.monotonic()))

    def cancel(self, details: str = CANCELLED_DETAILS) -> bool:
        """Cancel the call; False if it has already ended."""
        return self._end_here(Outcome(Code.CANCELLED, details, cancelled=True))

    def close(self) -> None:
        """Fail the call because its channel closes. (Not a cancellation by the caller.)"""
        self._end_here(Outcome(Code.CANCELLED, CLOSED_DETAILS))

    def _end_here(self, outcome: Outcome) -> bool:
        if not self._conclude(Verdict(outcome)):
            return False
        self._deliver(None)
        return True

    def _deliver(self, wake: Wake | None) -> None:
        """Advance the flow with ``wake``, here or in the thread that is advancing it. None: the call was concluded."""
        if self._advancing:
            self._wakes.append(wake)
            return
        self._advancing = True
        try:
            self._drain(wake)
        finally:
            self._advancing = False

    def _drain(self, wake: Wake | None) -> None:
        try:
            self._advance(wake)
            while self._wakes:
                self._advance(self._wakes.popleft())
        except BaseException as error:
            self._conclude(Verdict(Outcome(Code.INTERNAL, f"{type(error).__name__}: {error}")))
            self._clean_up()
            raise

    # -- by one thread at a time

    def _advance(self, wake: Wake | None) -> None:
        kind = type(wake)
        if kind is Ended:
            self.running.pop(wake.number, None)  # type: ignore[union-attr]
        elif kind is TimerFired:
            self._until = None  # it may fire a little early; it is set again if needed
        if self.verdict is None:
            try:
                step = self._flow.send(None if wake is START else wake)  # type: ignore[arg-type]
            except StopIteration as stop:
                if self._defers_conclusion(stop.value):
                    return
                self._conclude(stop.value)
            else:
                self._perform(step)
                return
        self._clean_up()

    def _perform(self, step: Step) -> None:
        if type(step) is Attempt:
            self.start_attempt(step)
            self.changed()
        elif type(step) is Commit:
            self.committed = self.running.pop(step.number)
            self._cancel_running()
            self.running[step.number] = self.committed
            self.changed()
        elif type(step) is Cancel:
            inner = self.running.get(step.number)
            if inner is not None:  # else it has just ended
                inner.cancel()
        elif type(step) is Wait and step.picker is not None:
            self._queued = True
            self.pool.exit_idle()
            self.pool.on_picker_change(step.picker, self.picker_changed)
        until = step.until
        if until != self._until:
            self._until = until
            self.set_timer(until)

    def _unrepeatable(self) -> bool:
        """Whether the requests exceed the replay buffer, so that no other attempt can send them."""
        if self.replay is not None:
            return self.replay.overflowed
        return exceeds_replay_limit(self._serializer, self._request)

    def _overflowed(self) -> None:
        for number in tuple(self.running):
            self.replay_overflowed(number)

    def _leave_scope(self, scope: context.Scope, verdict: Verdict) -> None:
        """The call has ended: the inbound call that it was made for need not cancel it any more."""
        scope.release(self)
        self._assembly.note_failure(self.call, verdict, scope)

    def _defers_conclusion(self, verdict: Verdict) -> bool:  # noqa: ARG002
        """Whether ``verdict`` takes effect with a later event; until then the call has not ended."""
        return False

    def _conclude(self, verdict: Verdict) -> bool:
        if self.verdict is not None:
            return False
        self.finished_at = time.monotonic()
        self.verdict = verdict
        return True

    def _clean_up(self) -> None:
        self._flow.close()
        if self.running:
            self._cancel_running()
        if self._until is not None:
            self._until = None
            self.set_timer(None)
        if self._queued:
            self.pool.forget(self.picker_changed)
        self.changed()

    def _cancel_running(self) -> None:
        while self.running:
            self.running.popitem()[1].cancel()


class LockedDriver(EventDriver):
    """Takes events from any thread; one thread at a time advances the flow."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lock = threading.Lock()

    def _deliver(self, wake: Wake | None) -> None:
        with self._lock:
            if self._advancing:
                self._wakes.append(wake)
                return
            self._advancing = True
        while True:
            try:
                self._drain(wake)
            except BaseException:
                self._advancing = False
                raise
            with self._lock:
                if not self._wakes:
                    self._advancing = False
                    return
                wake = self._wakes.popleft()

    def _conclude(self, verdict: Verdict) -> bool:
        with self._lock:
            return super()._conclude(verdict)


WAIT_SLICE = 1.0
"""Seconds that a thread waits at a time. Python runs signal handlers between bytecodes: one that arrives just before a
lock is waited for would run only when that wait ends."""


def until(instant: float | None) -> float:
    """Seconds to wait for ``instant`` (None: for an event), at most ``WAIT_SLICE``: a flow that is woken early checks
    again."""
    return WAIT_SLICE if instant is None else min(max(0.0, instant - time.monotonic()), WAIT_SLICE)


def ending(verdict: Verdict) -> Flow:
    """A flow, already started, that ends with ``verdict`` at its first wake-up."""

    def end() -> Flow:
        yield Wait()
        return verdict

    flow = end()
    next(flow)
    return flow


START = Elapsed(0.0)
"""Runs a flow's first step."""
