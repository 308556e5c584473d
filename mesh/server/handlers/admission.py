"""Admission control (``mesh/policy/server/admission.py``) for handlers: tasks or threads wait for permits, and refused
calls end with a status.

A ``ServerAdmission`` belongs to one server. For a server of your own, make one and pass it to ``ServerInterceptor`` or
``AioServerInterceptor``. Health, reflection, channelz and load reports are exempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable

import grpc

from mesh import deprecation, lines
from mesh.context import REFUSAL_REASON, Scope
from mesh.criticality import Criticality
from mesh.model import Metadatum
from mesh.policy.server.admission import Admission, AdmissionConfig, Mode
from mesh.policy.server.queue import LOSS_WINDOW, Method, Ticket
from mesh.policy.server.reasons import STATUSES, Reason
from mesh.server.load_report import LoadReporter
from mesh.wire import PUSHBACK, STATUS_CODES

PUSHBACK_DELAYS = {
    # Clients are about to notice that the server is leaving, and can use other endpoints now.
    Reason.DRAINING: 0.02,
    Reason.STARTING: 0.5,
    Reason.DELAY: 0.1,
    Reason.FULL: 0.1,
    Reason.STREAMS: 1.0,
}
"""Seconds of pushback for a refused call, plus or minus half: clients wait exactly as long as they are asked to (A6),
so without jitter all calls refused together would be retried together."""

EXEMPT = ("/grpc.health.", "/grpc.reflection.", "/grpc.channelz.", "/xds.service.orca.")
"""Prefixes of the methods that need no permit."""

_LOG = logging.getLogger("mesh.server")


class ServerAdmission:
    """What threads and asyncio share. ``policy`` decides; ``load_reporter`` measures the load, which goes out in
    trailers if ``sends_load``."""

    BUSY_SHARE = 0.5
    """The process is busy when it uses at least this share of a core. Otherwise there are no accept pauses."""

    QUIET_PERIOD = 0.002
    """Seconds without a new call that end an accept pause."""

    SWEEP_PERIOD = 0.05
    """Seconds between two checks of the queue while no call ends."""

    def __init__(self, config: AdmissionConfig | None = None, *, load_reports: bool = True) -> None:
        self.policy = Admission(config or AdmissionConfig(), threading.Lock())
        self.load_reporter = LoadReporter(self.policy)
        self.sends_load = load_reports
        self.arrivals = 0
        """Calls accepted; counted when their handlers are looked up."""
        self.ending_streams = False
        """A drain has waited long enough for streams: they end now."""
        self._rng = random.Random()
        self._pauses_enabled = self.policy.config.overload is Mode.ON
        self._pausing = False
        self._last_pause = 0.0

    @property
    def admission(self) -> Admission:
        """Deprecated: use ``policy``."""
        deprecation.warn(f"{type(self).__name__}.admission", f"{type(self).__name__}.policy")
        return self.policy

    def drain(self) -> None:
        """Refuse new calls with UNAVAILABLE; for a server of your own that shuts down."""
        self.policy.close(Reason.DRAINING)

    def refusal(
        self, reason: Reason, method: Method, waited: float, *, handler_started: bool = False
    ) -> tuple[grpc.StatusCode, str, tuple[Metadatum, ...]]:
        """Status, details and trailers of a call that is refused after it ``waited``, or, if ``handler_started``,
        ended."""
        if not handler_started:
            REFUSAL_REASON.set(reason.value)
        code, details = STATUSES[reason]
        if reason is Reason.DELAY:
            if method.limited:
                details = f"overloaded: {method.name} is limited to {method.limiter.limit} at a time"
            details += f" and the call waited for {1000 * waited:.0f} ms"
        elif reason is Reason.FULL:
            details += f" (MESH_QUEUE_SIZE={self.policy.config.queue_size})"
        elif reason is Reason.STREAMS:
            details += f" (MESH_MAX_STREAMS={self.policy.config.max_streams})"
        trailers: tuple[Metadatum, ...] = ()
        if reason in PUSHBACK_DELAYS:
            milliseconds = 1000 * PUSHBACK_DELAYS[reason] * self._rng.uniform(0.5, 1.5)
            trailers = ((PUSHBACK, str(round(milliseconds))),)
        return STATUS_CODES[code], details, trailers

    def dispatch(self) -> None:
        """Give free permits to waiting calls, and refuse those that waited too long."""
        raise NotImplementedError

    def expire(self, method: Method, criticality: Criticality, scope: Scope, now: float) -> Reason:
        """Return the permit of a call that has no time left. Returns the reason for refusing it."""
        reason = self.policy.expire(method, criticality, scope.arrived, now)
        self.dispatch()
        return reason

    def _log_limit_changes(self) -> None:
        changes = self.policy.limit_changes
        while changes:
            with contextlib.suppress(IndexError):  # another thread took it
                method = changes.popleft()
                if method.limited:
                    only = " (dry-run: only counted)" if self.policy.config.overload is Mode.DRY_RUN else ""
                    message = "%s is limited to %d calls at a time: its calls miss their deadlines because of load%s"
                    lines.info(_LOG, "limited", message, method.name, method.limiter.limit, only)
                else:
                    lines.info(_LOG, "not limited", "%s is no longer limited", method.name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.policy!r}>"


def _wake(resolved: Iterable[Ticket]) -> None:
    for ticket in resolved:
        ticket.wake()


class ThreadServerAdmission(ServerAdmission):
    """For handlers that run in threads: a waiting call holds its thread.

    gRPC accepts calls on a single thread. Handlers that compute keep the GIL from it, for 5 ms each time it needs the
    GIL (``sys.getswitchinterval``): calls then expire in core, where nothing orders or sheds them. So while the process
    is busy and calls miss their deadlines, there is an *accept pause* now and then: no handler starts until gRPC has
    accepted the calls that wait in core.
    """

    ACCEPT_PAUSE_PERIOD = 0.1
    """Seconds between two accept pauses."""

    LONGEST_PAUSE = 0.3
    """Seconds after which an accept pause ends in any case."""

    HANDLERS_BETWEEN_PAUSES = 3
    """Handlers that run at once between two pauses, at most: the next pause starts when they have ended, and while they
    compute, each holds the GIL for only part of the time."""

    WAITER_PERIOD = 0.5
    """Seconds between two checks of the queue by each waiting thread other than the one that sweeps it."""

    def __init__(self, config: AdmissionConfig | None = None, *, load_reports: bool = True) -> None:
        super().__init__(config, load_reports=load_reports)
        self._few_at_once = False
        self._cpu = 0.0
        self._pause_lock = threading.Lock()
        self._sweeper = threading.Lock()

    def enter(self, method: Method, criticality: Criticality, now: float) -> bool:
        """Take a permit if one is free; otherwise ``wait`` for one."""
        if now - self.policy.last_loss < LOSS_WINDOW:
            if now - self._last_pause >= self.ACCEPT_PAUSE_PERIOD:
                self._pause_if_busy()
        elif self._few_at_once:
            self._few_at_once = False
        if self._pausing or (self._few_at_once and self.policy.in_flight >= self.HANDLERS_BETWEEN_PAUSES):
            return False
        return self.policy.enter(method, criticality)

    def wait(self, method: Method, criticality: Criticality, scope: Scope) -> Reason | None:
        """Wait for a permit. Returns None with a permit, else why the call is refused. A cancelled call stops
        waiting."""
        woken = threading.Event()
        ticket = Ticket(method, criticality, scope.arrived, woken.set, scope.deadline)
        _wake(self.policy.wait(ticket))
        scope.adopt(ticket, woken.set)
        sweeps = False
        try:
            # A permit that was returned after ``enter`` failed has not been given to any call.
            self.dispatch()
            while not woken.is_set():
                sweeps = sweeps or self._sweeper.acquire(blocking=False)
                if not woken.wait(self.SWEEP_PERIOD if sweeps else self.WAITER_PERIOD):
                    self.dispatch()
        finally:
            scope.release(ticket)
            if sweeps:
                self._sweeper.release()
        if scope.cancelled:
            self.policy.abandon(ticket, time.monotonic())
            self.dispatch()
            return Reason.EXPIRED
        return ticket.refused

    def dispatch(self) -> None:
        if not self._pausing:
            limit = max(0, self.HANDLERS_BETWEEN_PAUSES - self.policy.in_flight) if self._few_at_once else None
            _wake(self.policy.dispatch(time.monotonic(), limit))
        if self.policy.limit_changes:
            self._log_limit_changes()

    def _pause_if_busy(self) -> None:
        """If the process was busy since the last pause, start no handler until no more calls arrive. Blocks the calling
        thread until then."""
        if not self._pauses_enabled or not self._pause_lock.acquire(blocking=False):
            return
        try:
            started, cpu = time.monotonic(), time.process_time()
            if started - self._last_pause < self.ACCEPT_PAUSE_PERIOD:
                return
            busy = cpu - self._cpu >= self.BUSY_SHARE * (started - self._last_pause)
            self._pausing = self._few_at_once = busy
            arrivals, quiet_since, now = self.arrivals, started, started
            while self._pausing and now - quiet_since < self.QUIET_PERIOD and now - started < self.LONGEST_PAUSE:
                time.sleep(self.QUIET_PERIOD / 4)
                now = time.monotonic()
                if self.arrivals != arrivals or self.policy.in_flight:
                    arrivals, quiet_since = self.arrivals, now
            self._pausing = False
            self._last_pause, self._cpu = now, time.process_time()
        finally:
            self._pause_lock.release()
        self.dispatch()


class _BusyClock:
    """Seconds that a thread ran or was runnable: time spent waiting for a CPU counts where Linux reports it."""

    def __init__(self) -> None:
        self._file: int | None = None

    def __call__(self) -> float:
        """Must always be called from the same thread."""
        if self._file is None:
            try:
                self._file = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
            except OSError:
                self._file = -1
            else:
                weakref.finalize(self, os.close, self._file)
        if self._file < 0:
            return time.thread_time()
        ran, waited, _ = os.pread(self._file, 64, 0).split()
        return (int(ran) + int(waited)) / 1e9


class AioServerAdmission(ServerAdmission):
    """For handlers on an event loop.

    grpc.aio accepts one call in about five iterations of the loop, so handlers that block the loop keep it from
    accepting: calls pile up in core, where nothing sees how long they wait. So while the loop is busy there is an
    *accept pause* now and then: no handler starts until gRPC has accepted the calls that wait in core. They then wait
    in the queue, where they are counted, ordered and shed.
    """

    ACCEPT_PAUSE_PERIOD, LONG_ACCEPT_PAUSE_PERIOD = 0.12, 0.48
    """Seconds between two accept pauses: while handlers block the loop, and while they don't."""

    BLOCKED = 0.002
    """Handlers block the loop if the iteration that starts them takes longer than this. Seconds."""

    BATCH = 64
    """Handlers that start in one iteration, at most; fewer when they block the loop."""

    LONGEST_PAUSE, LONGEST_CATCH_UP = 0.02, 0.05
    """Seconds after which an accept pause ends in any case: usually, and while calls miss their deadlines. Then many
    calls may wait in core whose callers have gone."""

    IDLE_SHARE = 0.3
    """If the loop's thread runs for less than this share of a step of an accept pause, all calls have been accepted."""

    def __init__(self, config: AdmissionConfig | None = None, *, load_reports: bool = True) -> None:
        super().__init__(config, load_reports=load_reports)
        self._clock = _BusyClock()
        self._pause_period = self.ACCEPT_PAUSE_PERIOD
        self._batch = 1
        self._last_step = 0.0
        self._cpu = 0.0
        self._arrivals_seen = 0
        self._quiet_since = 0.0
        self._dispatching = False
        self._sweep: asyncio.TimerHandle | None = None
        self.streams: set[Callable[[], object]] = set()
        """Callbacks that each end an open stream."""

    def end_streams(self) -> None:
        """End the open streams with UNAVAILABLE; streams that start later end at once."""
        self.ending_streams = True
        for end in tuple(self.streams):
            end()

    def enter(self, method: Method, criticality: Criticality, now: float) -> bool:
        """Take a permit if one is free; otherwise ``wait`` for one."""
        # In a pause no handler starts, even if all waiting callers have gone.
        if self._pausing or (now - self._last_pause >= self._pause_period and self._pause_if_busy(now)):
            return False
        return self.policy.enter(method, criticality)

    async def wait(self, method: Method, criticality: Criticality, scope: Scope) -> Reason | None:
        """Wait for a permit. Returns None with a permit, else why the call is refused."""
        loop = asyncio.get_running_loop()
        woken = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        ticket = Ticket(method, criticality, scope.arrived, wake, scope.deadline)
        _wake(self.policy.wait(ticket))
        self.dispatch()
        try:
            await woken
        except asyncio.CancelledError:
            self.policy.abandon(ticket, time.monotonic())
            self.dispatch()
            raise
        return ticket.refused

    def dispatch(self) -> None:
        if self.policy.limit_changes:
            self._log_limit_changes()
        if not self._dispatching and self.policy.waiting:
            self._dispatching = True
            self._last_step = time.monotonic()
            asyncio.get_running_loop().call_soon(self._dispatch_step)

    def _pause_if_busy(self, now: float) -> bool:
        """Start an accept pause if the loop was busy since the last pause or check."""
        cpu = self._clock()
        self._pausing = self._pauses_enabled and cpu - self._cpu >= self.BUSY_SHARE * (now - self._last_pause)
        self._last_pause, self._cpu, self._quiet_since = now, cpu, now
        if self._pausing:
            longer = min(2 * self._pause_period, self.LONG_ACCEPT_PAUSE_PERIOD)
            self._pause_period = self.ACCEPT_PAUSE_PERIOD if self._is_losing(now) else longer
        return self._pausing

    def _is_losing(self, now: float) -> bool:
        return now - self.policy.last_loss < LOSS_WINDOW

    def _dispatch_step(self) -> None:
        now = time.monotonic()
        loop = asyncio.get_running_loop()
        if self._pausing:
            # Accepting calls whose callers have gone takes time, too, and they never arrive.
            cpu = self._clock()
            if self.arrivals != self._arrivals_seen or cpu - self._cpu > self.IDLE_SHARE * (now - self._last_step):
                self._arrivals_seen, self._quiet_since = self.arrivals, now
            self._cpu, self._last_step = cpu, now
            longest = self.LONGEST_CATCH_UP if self._is_losing(now) else self.LONGEST_PAUSE
            if now - self._quiet_since < self.QUIET_PERIOD and now - self._last_pause < longest:
                loop.call_later(self.QUIET_PERIOD / 4, self._dispatch_step)
                return
            self._pausing = False
            self._last_pause, self._cpu = now, self._clock()
            self._batch = 1
        elif now - self._last_step > self.BLOCKED:
            # Handlers that started in the last iteration blocked it: start one at a time, and pause soon.
            self._batch = 1
            self._pause_period = self.ACCEPT_PAUSE_PERIOD
        else:
            self._batch = min(2 * self._batch, self.BATCH)
        resolved = self.policy.dispatch(now, self._batch)
        _wake(resolved)
        if self.policy.limit_changes:
            self._log_limit_changes()
        if any(ticket.admitted for ticket in resolved):
            if now - self._last_pause >= self._pause_period:
                self._pause_if_busy(now)
            self._last_step = now
            loop.call_soon(self._dispatch_step)
            return
        self._dispatching = False
        if self.policy.waiting and self._sweep is None:
            self._sweep = loop.call_later(self.SWEEP_PERIOD, self._on_sweep)

    def _on_sweep(self) -> None:
        self._sweep = None
        self.dispatch()
