"""``mesh.policy.admission`` for handlers: who waits is a task or a thread, and who refuses says so to the caller.

A gate belongs to one server, or to one that its owner keeps: give it to ``ServerInterceptor`` or
``AioServerInterceptor``. Health, reflection, channelz and load reports never pass one.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable

import grpc

from mesh.context import REFUSED, Scope
from mesh.model import Metadatum
from mesh.policy.admission import BY_NAME, CODES, Admission, AdmissionConfig, Criticality, Mode, Reason, Ticket
from mesh.server.load import Load

PUSHBACK = "grpc-retry-pushback-ms"

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

_STATUS = {code.value[0]: code for code in grpc.StatusCode}


class Gate:
    """What both kinds share. ``admission`` decides; ``load`` is reported in trailers, unless it is None."""

    def __init__(self, config: AdmissionConfig | None = None, *, load_reports: bool = True) -> None:
        self.admission = Admission(config or AdmissionConfig(), threading.Lock())
        self.load = Load(self.admission)
        self.reports = self.load if load_reports else None
        self.ending = False
        """Streams are to end: a drain has waited for them long enough."""
        self._rng = random.Random()

    def refusal(self, reason: Reason, *, begun: bool = False) -> tuple[grpc.StatusCode, str, tuple[Metadatum, ...]]:
        """Status, details and trailers for a call that is refused, or, when its handler has ``begun``, ended."""
        if not begun:
            REFUSED.set(reason.value)
        code, details = CODES[reason]
        trailers: tuple[Metadatum, ...] = ()
        if reason in PUSHBACKS:
            milliseconds = 1000 * PUSHBACKS[reason] * self._rng.uniform(0.5, 1.5)
            trailers = ((PUSHBACK, str(round(milliseconds))),)
        return _STATUS[code], details, trailers

    def settle(self) -> None:
        """Hand out what permits there are, and drop what waited too long."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.admission!r}>"


def criticality_of(name: str) -> Criticality:
    """The criticality that metadata names; CRITICAL when it names none."""
    return BY_NAME.get(name, Criticality.CRITICAL)


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
    """A gate for handlers that run in threads: a call that waits holds its thread."""

    def wait(self, criticality: Criticality, scope: Scope) -> Reason | None:
        """Wait for a permit: None with it, else the reason why there is none. The call's cancellation ends the wait."""
        woken = threading.Event()
        ticket = Ticket(criticality, scope.arrived, woken.set)
        _wake(self.admission.wait(ticket, time.monotonic()))
        # A permit that came free meanwhile was nobody's to hand on.
        self.settle()
        while not woken.wait(0.05):
            if scope.cancelled:
                _wake(self.admission.abandon(ticket, time.monotonic()))
                return Reason.EXPIRED
            self.settle()
        return ticket.refused

    def settle(self) -> None:
        _wake(self.admission.dispatch(time.monotonic()))


class AioGate(Gate):
    """A gate for handlers on an event loop.

    grpc.aio accepts one call in about five passes of the loop, so handlers that hold the loop keep it from accepting:
    calls then pile up in core, where nothing sees how long they wait. While the loop is busy, the gate therefore takes
    a *turn* now and then: it holds handlers back until no more calls come in, so that what waits waits here, where it
    is counted, ordered and shed.
    """

    TURN, SELDOM = 0.03, 0.48
    """Seconds between two turns: when handlers hold the loop, and when none was seen to."""

    HELD = 0.002
    """Seconds in a pass that began handlers, beyond which they hold the loop."""

    BATCH = 64
    """Handlers that begin in one pass at most; fewer when they hold the loop."""

    BUSY = 0.5
    """The share of its time that the loop's thread runs, or would, when it is busy. Below, there are no turns."""

    QUIET = 0.002
    """Seconds without a new call that end a turn: a call takes a few passes, and gRPC's poller its share of them."""

    LONGEST = 0.02
    """Seconds after which a turn ends however many calls come in."""

    SWEEP = 0.05
    """Seconds between two looks at a queue that nothing moves."""

    def __init__(self, config: AdmissionConfig | None = None, *, load_reports: bool = True) -> None:
        super().__init__(config, load_reports=load_reports)
        self.arrivals = 0
        """Calls seen; counted where handlers are looked up."""
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

    def enter(self, criticality: Criticality, now: float) -> bool:
        """Take a permit, if that can be had at once; else ``wait`` for one."""
        if now - self._turned >= self._every and self._turn_begins(now):
            return False
        return self.admission.enter(criticality)

    async def wait(self, criticality: Criticality, arrived: float) -> Reason | None:
        """Wait for a permit: None with it, else the reason why there is none."""
        loop = asyncio.get_running_loop()
        woken = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        ticket = Ticket(criticality, arrived, wake)
        _wake(self.admission.wait(ticket, time.monotonic()))
        self.settle()
        try:
            await woken
        except asyncio.CancelledError:
            _wake(self.admission.abandon(ticket, time.monotonic()))
            raise
        return ticket.refused

    def settle(self) -> None:
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
            self._every = min(2 * self._every, self.SELDOM)
        return self._turning

    def _pass(self) -> None:
        now = time.monotonic()
        loop = asyncio.get_running_loop()
        if self._turning:
            if self.arrivals != self._heard:
                self._heard, self._quiet = self.arrivals, now
            if now - self._quiet < self.QUIET and now - self._turned < self.LONGEST:
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
