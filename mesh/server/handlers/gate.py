"""Admission (``mesh/policy/server/admission.py``) for handlers: who waits is a task or a thread, and
who refuses says so to the caller.

A gate belongs to one server, or to one that its owner keeps: give it to ``ServerInterceptor`` or
``AioServerInterceptor``. Health, reflection, channelz and load reports never pass one.
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

from mesh import lines
from mesh.context import REFUSAL_REASON, Scope
from mesh.criticality import Criticality
from mesh.model import Metadatum
from mesh.policy.server.admission import CODES, Admission, AdmissionConfig, Method, Mode, Reason, Ticket
from mesh.server.load_report import Load
from mesh.wire import PUSHBACK, STATUS_CODES

PUSHBACKS = {
    # Its clients are about to see that it is gone; the others are there now.
    Reason.DRAINING: 0.02,
    Reason.STARTING: 0.5,
    Reason.DELAY: 0.1,
    Reason.FULL: 0.1,
    Reason.STREAMS: 1.0,
}
"""Seconds that a refused caller is asked to keep off, give or take half: A6 has clients wait exactly as long as they
are told, so all that are refused together would come back together."""

UNGATED = ("/grpc.health.", "/grpc.reflection.", "/grpc.channelz.", "/xds.service.orca.")
"""Methods that no gate stands before, by how they begin."""

_LOG = logging.getLogger("mesh.server")


class Gate:
    """What both kinds share. ``admission`` decides; ``load`` is reported in trailers, unless it is None."""

    def __init__(self, config: AdmissionConfig | None = None, *, load_reports: bool = True) -> None:
        self.admission = Admission(config or AdmissionConfig(), threading.Lock())
        self.load = Load(self.admission)
        self.reports = self.load if load_reports else None
        self.arrivals = 0
        """Calls seen; counted where handlers are looked up."""
        self.ending = False
        """Streams are to end: a drain has waited for them long enough."""
        self._rng = random.Random()

    def refusal(
        self, reason: Reason, method: Method, waited: float, *, begun: bool = False
    ) -> tuple[grpc.StatusCode, str, tuple[Metadatum, ...]]:
        """Status, details and trailers for a call that is refused after it ``waited``, or, when its handler has
        ``begun``, ended."""
        if not begun:
            REFUSAL_REASON.set(reason.value)
        code, details = CODES[reason]
        if reason is Reason.DELAY:
            if method.limited:
                details = f"overloaded: {method.name} is limited to {method.limiter.limit} at a time"
            details += f" and the call waited for {1000 * waited:.0f} ms"
        elif reason is Reason.FULL:
            details += f" (MESH_QUEUE_SIZE={self.admission.config.queue_size})"
        elif reason is Reason.STREAMS:
            details += f" (MESH_MAX_STREAMS={self.admission.config.max_streams})"
        trailers: tuple[Metadatum, ...] = ()
        if reason in PUSHBACKS:
            milliseconds = 1000 * PUSHBACKS[reason] * self._rng.uniform(0.5, 1.5)
            trailers = ((PUSHBACK, str(round(milliseconds))),)
        return STATUS_CODES[code], details, trailers

    def settle(self) -> None:
        """Hand out what permits there are, and drop what waited too long."""
        raise NotImplementedError

    def _log_changes(self) -> None:
        """Log which methods' limits have begun or ended."""
        changed = self.admission.changed
        while changed:
            with contextlib.suppress(IndexError):  # another thread was quicker
                method = changed.popleft()
                if method.limited:
                    only = " (dry-run: it is only counted)" if self.admission.config.overload is Mode.DRY_RUN else ""
                    message = "%s is limited to %d calls at a time: its calls miss their deadlines because of load%s"
                    lines.info(_LOG, "limited", message, method.name, method.limiter.limit, only)
                else:
                    lines.info(_LOG, "not limited", "%s is no longer limited", method.name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.admission!r}>"


def _wake(settled: Iterable[Ticket]) -> None:
    for ticket in settled:
        ticket.wake()


class _BusyClock:
    """Seconds that a thread ran or was ready to run; what it was kept from by others counts, where Linux tells."""

    def __init__(self) -> None:
        self._file: int | None = None

    def __call__(self) -> float:
        """For the current thread, which must always be the same."""
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


class ThreadGate(Gate):
    """A gate for handlers that run in threads: a call that waits holds its thread.

    gRPC accepts calls on a single thread. Handlers that compute keep Python's lock from it, for 5 ms each time that it
    needs it (``sys.getswitchinterval``): calls then expire in core, where nothing orders or sheds them. While that is
    seen, the gate takes a *turn* now and then: no handler begins until no more calls come in.
    """

    TURN, RECENT = 0.1, 1.0
    """Seconds between two turns, and since a call was lost to its deadline."""

    BUSY = 0.5
    """The share of a core that the process uses when it is busy. Below, there are no turns."""

    QUIET = 0.002
    """Seconds without a new call, and without a handler at work, that end a turn."""

    LONGEST = 0.3
    """Seconds after which a turn ends, whatever goes on."""

    CROWD = 3
    """Handlers at work at most between two turns: the next turn begins when they have ended, and while they compute,
    each has Python's lock for only a part of the time."""

    SWEEP, SELDOM = 0.05, 0.5
    """Seconds between two looks at the queue by one of those that wait, and by each of the others."""

    def __init__(self, config: AdmissionConfig | None = None, *, load_reports: bool = True) -> None:
        super().__init__(config, load_reports=load_reports)
        self._turns = self.admission.config.overload is Mode.ON
        self._turning = self._crowded = False
        self._turned = self._cpu = 0.0
        self._turn_lock = threading.Lock()
        self._sweeper = threading.Lock()

    def enter(self, method: Method, criticality: Criticality, now: float) -> bool:
        """Take a permit, if that can be had at once; else ``wait`` for one."""
        if now - self.admission.last_loss < self.RECENT:
            if now - self._turned >= self.TURN:
                self._turn()
        elif self._crowded:
            self._crowded = False
        if self._turning or (self._crowded and self.admission.in_flight >= self.CROWD):
            return False
        return self.admission.enter(method, criticality)

    def wait(self, method: Method, criticality: Criticality, scope: Scope) -> Reason | None:
        """Wait for a permit: None with it, else the reason why there is none. The call's cancellation ends the wait."""
        woken = threading.Event()
        ticket = Ticket(method, criticality, scope.arrived, woken.set, scope.deadline)
        _wake(self.admission.wait(ticket))
        scope.adopt(ticket, woken.set)
        sweeps = False
        try:
            # A permit that came free meanwhile was nobody's to hand on.
            self.settle()
            while not woken.is_set():
                sweeps = sweeps or self._sweeper.acquire(blocking=False)
                woken.wait(self.SWEEP if sweeps else self.SELDOM)
                self.settle()
        finally:
            scope.release(ticket)
            if sweeps:
                self._sweeper.release()
        if scope.cancelled:
            self.admission.abandon(ticket, time.monotonic())
            self.settle()
            return Reason.EXPIRED
        return ticket.refused

    def settle(self) -> None:
        if not self._turning:
            most = max(0, self.CROWD - self.admission.in_flight) if self._crowded else None
            _wake(self.admission.dispatch(time.monotonic(), most))
        if self.admission.changed:
            self._log_changes()

    def _turn(self) -> None:
        """Hold handlers back until no more calls come in, if the process was busy since the last turn. The thread that
        finds that out waits for it."""
        if not self._turns or not self._turn_lock.acquire(blocking=False):
            return
        try:
            begun, cpu = time.monotonic(), time.process_time()
            if begun - self._turned < self.TURN:
                return
            self._turning = self._crowded = cpu - self._cpu >= self.BUSY * (begun - self._turned)
            heard, quiet, now = self.arrivals, begun, begun
            while self._turning and now - quiet < self.QUIET and now - begun < self.LONGEST:
                time.sleep(self.QUIET / 4)
                now = time.monotonic()
                if self.arrivals != heard or self.admission.in_flight:
                    heard, quiet = self.arrivals, now
            self._turning = False
            self._turned, self._cpu = now, time.process_time()
        finally:
            self._turn_lock.release()
        self.settle()


class AioGate(Gate):
    """A gate for handlers on an event loop.

    grpc.aio accepts one call in about five passes of the loop, so handlers that hold the loop keep it from accepting:
    calls then pile up in core, where nothing sees how long they wait. While the loop is busy, the gate therefore takes
    a *turn* now and then: it holds handlers back until no more calls come in, so that what waits waits here, where it
    is counted, ordered and shed.
    """

    TURN, SELDOM = 0.12, 0.48
    """Seconds between two turns: when handlers hold the loop, and when none was seen to."""

    HELD = 0.002
    """Seconds in a pass that began handlers, beyond which they hold the loop."""

    BATCH = 64
    """Handlers that begin in one pass at most; fewer when they hold the loop."""

    BUSY = 0.5
    """The share of its time that the loop's thread runs, or would, when it is busy. Below, there are no turns."""

    QUIET = 0.002
    """Seconds without a new call that end a turn: a call takes a few passes, and gRPC's poller its share of them."""

    RECENT = 1.0
    """Seconds since a call was lost to its deadline in which others may have been."""

    LONGEST, CATCH_UP = 0.02, 0.05
    """Seconds after which a turn ends however many calls come in: usually, and while calls are lost. Then many may wait
    in core, and their callers be gone."""

    IDLE = 0.3
    """The share of a few moments in a turn that the loop's thread runs when it has accepted all that came."""

    SWEEP = 0.05
    """Seconds between two looks at a queue that nothing moves."""

    def __init__(self, config: AdmissionConfig | None = None, *, load_reports: bool = True) -> None:
        super().__init__(config, load_reports=load_reports)
        self._turns = self.admission.config.overload is Mode.ON
        self._clock = _BusyClock()
        self._every = self.TURN
        self._batch = 1
        self._passed = 0.0
        self._turned = 0.0
        self._cpu = 0.0
        self._turning = False
        self._heard = 0
        self._quiet = 0.0
        self._pumping = False
        self._sweep: asyncio.TimerHandle | None = None
        self.streams: set[Callable[[], object]] = set()
        """What ends each of the streams that are open."""

    def end_streams(self) -> None:
        """End the streams that are open with UNAVAILABLE; those that begin from now on end at once."""
        self.ending = True
        for end in tuple(self.streams):
            end()

    def enter(self, method: Method, criticality: Criticality, now: float) -> bool:
        """Take a permit, if that can be had at once; else ``wait`` for one."""
        # In a turn nobody begins, also when those that wait have given up.
        if self._turning or (now - self._turned >= self._every and self._turn_begins(now)):
            return False
        return self.admission.enter(method, criticality)

    async def wait(self, method: Method, criticality: Criticality, scope: Scope) -> Reason | None:
        """Wait for a permit: None with it, else the reason why there is none."""
        loop = asyncio.get_running_loop()
        woken = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        ticket = Ticket(method, criticality, scope.arrived, wake, scope.deadline)
        _wake(self.admission.wait(ticket))
        self.settle()
        try:
            await woken
        except asyncio.CancelledError:
            self.admission.abandon(ticket, time.monotonic())
            self.settle()
            raise
        return ticket.refused

    def settle(self) -> None:
        if self.admission.changed:
            self._log_changes()
        if not self._pumping and self.admission.waiting:
            self._pumping = True
            self._passed = time.monotonic()
            asyncio.get_running_loop().call_soon(self._pass)

    def _turn_begins(self, now: float) -> bool:
        """Begin a turn if the loop was busy since the last, or the last look."""
        cpu = self._clock()
        self._turning = self._turns and cpu - self._cpu >= self.BUSY * (now - self._turned)
        self._turned, self._cpu, self._quiet = now, cpu, now
        if self._turning:
            self._every = self.TURN if self._is_losing(now) else min(2 * self._every, self.SELDOM)
        return self._turning

    def _is_losing(self, now: float) -> bool:
        return now - self.admission.last_loss < self.RECENT

    def _pass(self) -> None:
        now = time.monotonic()
        loop = asyncio.get_running_loop()
        if self._turning:
            # Calls whose callers are gone take time to accept, too, and never arrive.
            cpu = self._clock()
            if self.arrivals != self._heard or cpu - self._cpu > self.IDLE * (now - self._passed):
                self._heard, self._quiet = self.arrivals, now
            self._cpu, self._passed = cpu, now
            longest = self.CATCH_UP if self._is_losing(now) else self.LONGEST
            if now - self._quiet < self.QUIET and now - self._turned < longest:
                loop.call_later(self.QUIET / 4, self._pass)
                return
            self._turning = False
            self._turned, self._cpu = now, self._clock()
            self._batch = 1
        elif now - self._passed > self.HELD:
            # Handlers began in the last pass, and held it: one at a time, and a turn soon.
            self._batch = 1
            self._every = self.TURN
        else:
            self._batch = min(2 * self._batch, self.BATCH)
        settled = self.admission.dispatch(now, self._batch)
        _wake(settled)
        if self.admission.changed:
            self._log_changes()
        if any(ticket.admitted for ticket in settled):
            if now - self._turned >= self._every:
                self._turn_begins(now)
            self._passed = now
            loop.call_soon(self._pass)
            return
        self._pumping = False
        if self.admission.waiting and self._sweep is None:
            self._sweep = loop.call_later(self.SWEEP, self._swept)

    def _swept(self) -> None:
        self._sweep = None
        self.settle()
