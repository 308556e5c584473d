"""Whether a server takes a call now, later, or not: the limit, and a queue before it that sheds the least important.

A call that finds a free permit and an empty queue runs at once. Others wait, first come first served among equals, the
important ones before the rest (criticality as in Google's SRE book, "Handling Overload"). The queue drops its oldest
when delay *stands*: when not one call in an interval waited less than the target, those that waited twice as long go
(CoDel, as Facebook simplified it for requests: "Fail at Scale", ACM Queue 2015, and Wangle's Codel). Each criticality
has that measure for itself, so what is shed is what doesn't get through. A queue that is full drops the oldest of the
least important.

Rule 1: decide, then do. A method returns the tickets that it settled; waking them is their owner's. Rule 2: a permit
taken is given back exactly once, by ``leave``. Rule 3: what is refused has not run.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mesh.model import Code, Lock
from mesh.policy.limiter import Ending, Latency, Limiter


class Criticality(enum.IntEnum):
    """How much a call matters, from the last to be shed to the first. Calls that say nothing are CRITICAL."""

    CRITICAL_PLUS = 0
    CRITICAL = 1
    SHEDDABLE_PLUS = 2
    SHEDDABLE = 3


BY_NAME = {criticality.name: criticality for criticality in Criticality}
"""The values of the metadata key."""


BUSY = 1.0
"""Seconds for which a server is busy after a call had to wait."""


class Reason(enum.Enum):
    """Why a call was refused."""

    STARTING = "starting"
    DRAINING = "draining"
    DELAY = "delay"
    FULL = "full"
    STREAMS = "streams"
    EXPIRED = "expired"
    LATE = "late"


SHARES = (1.0, 1.0, 0.9, 0.8)
"""How much of the limit calls of each criticality may fill: the sheddable leave room, so that the rest seldom wait."""

PATIENCE = (10.0, 5.0, 1.0, 1.0)
"""How many times the target calls of each criticality may stand: short waits shouldn't cost what matters."""

CODES = {
    Reason.STARTING: (Code.UNAVAILABLE, "not ready yet"),
    Reason.DRAINING: (Code.UNAVAILABLE, "shutting down"),
    Reason.DELAY: (Code.RESOURCE_EXHAUSTED, "overloaded: calls wait too long"),
    Reason.FULL: (Code.RESOURCE_EXHAUSTED, "overloaded: too many calls wait"),
    Reason.STREAMS: (Code.RESOURCE_EXHAUSTED, "too many streams are open"),
    Reason.EXPIRED: (Code.DEADLINE_EXCEEDED, "the deadline passed before the call could begin"),
    Reason.LATE: (Code.DEADLINE_EXCEEDED, "less time is left than the method takes"),
}
"""What the caller is told."""


class Mode(enum.Enum):
    """Whether to refuse, only to count what would be refused, or neither."""

    ON = "on"
    DRY_RUN = "dry-run"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """``overload``: the adaptive limit and the queue. ``late``: refusing calls that have less time left than their
    method takes, while the server is busy. Times in seconds.

    Without the limit (``overload`` OFF) ``most`` still holds.
    """

    initial: int = 20
    least: int = 10
    most: int = 1000
    queue_size: int = 1000
    target: float = 0.01
    interval: float = 0.1
    max_streams: int = 1000
    overload: Mode = Mode.ON
    late: Mode = Mode.ON


class CoDel:
    """Whether delay stands. ``standing``: not one call in the last interval waited less than the target."""

    __slots__ = ("_ends", "_interval", "_least", "_target", "standing")

    def __init__(self, target: float, interval: float) -> None:
        self._target = target
        self._interval = interval
        self._least = 0.0
        self._ends = 0.0
        self.standing = False

    def drops(self, delay: float, now: float) -> bool:
        """A call has waited for ``delay``: is it one to drop?"""
        if delay < self._least:
            self._least = delay
        if now >= self._ends:
            # Unless nothing was heard for an interval: what stood before is no news then.
            self.standing = now < self._ends + self._interval and self._least > self._target
            self._least = delay
            self._ends = now + self._interval
        return self.standing and delay > 2 * self._target


class Ticket:
    """A call that waits. Settled when ``refused`` or ``admitted``; ``wake`` is its owner's, to tell it so."""

    __slots__ = ("admitted", "arrived", "criticality", "gone", "refused", "wake")

    def __init__(self, criticality: Criticality, arrived: float, wake: Callable[[], object]) -> None:
        self.criticality = criticality
        self.arrived = arrived
        self.wake = wake
        self.admitted = False
        self.refused: Reason | None = None
        self.gone = False

    def __repr__(self) -> str:
        state = "admitted" if self.admitted else f"refused: {self.refused.value}" if self.refused else "waiting"
        return f"<Ticket {self.criticality.name} {state}>"


class Admission:
    """The gate before a server's handlers.

    ``in_flight``: calls that hold a permit. ``streams``: streams that are open; they need a permit to begin and hold
    none after that, as how long they last says nothing. ``ended`` counts calls whose handlers are through, ``failed``
    those that failed. ``refusals`` counts by reason and criticality, ``dry_run`` what would have been refused (reason
    DELAY there: had to wait).
    """

    __slots__ = (
        "_bounds",
        "_busy_until",
        "_closed",
        "_lanes",
        "_lock",
        "_waiting",
        "config",
        "dry_run",
        "ended",
        "failed",
        "in_flight",
        "limiter",
        "refusals",
        "streams",
    )

    def __init__(self, config: AdmissionConfig, lock: Lock) -> None:
        self.config = config
        self._lock = lock
        self.limiter = Limiter(config.initial, config.least, config.most)
        self._lanes: list[tuple[CoDel, deque[Ticket]]] = [
            (CoDel(config.target * patience, config.interval), deque()) for patience in PATIENCE
        ]
        self._waiting = 0
        self._busy_until = 0.0
        self._closed: Reason | None = None
        self.in_flight = 0
        self.streams = 0
        self.refusals: Counter[tuple[Reason, Criticality]] = Counter()
        self.dry_run: Counter[tuple[Reason, Criticality]] = Counter()
        self.ended = 0
        self.failed = 0
        self._bounds: list[int] = []
        self._set_bounds()

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return self._waiting

    @property
    def limit(self) -> int:
        """Permits that there are now."""
        return self._bounds[0]

    def close(self, reason: Reason) -> None:
        """Refuse all that comes from now on; what is here or waits goes on."""
        with self._lock:
            self._closed = reason

    def open(self) -> None:
        """Take calls (again)."""
        with self._lock:
            self._closed = None

    def enter(self, criticality: Criticality) -> bool:
        """Take a permit, if that can be had at once; else ``wait`` for one."""
        with self._lock:
            if self.in_flight < self._bounds[criticality] and not self._waiting and self._closed is None:
                self.in_flight += 1
                return True
            return False

    def wait(self, ticket: Ticket, now: float) -> Sequence[Ticket]:
        """Queue a call. Returns the tickets settled by that: itself, when it is refused or (in a dry run) admitted,
        or the one that had to make room."""
        with self._lock:
            if self._closed is not None:
                return (self._refuse(ticket, self._closed),)
            self._busy_until = now + BUSY
            self.limiter.queued = True
            if self.config.overload is Mode.DRY_RUN and self.in_flight < self.config.most:
                if self.in_flight >= self.limiter.limit:
                    self.dry_run[Reason.DELAY, ticket.criticality] += 1
                self._admit(ticket)
                return (ticket,)
            self._lanes[ticket.criticality][1].append(ticket)
            self._waiting += 1
            if self._waiting <= self.config.queue_size:
                return ()
            lane = next(lane for _, lane in reversed(self._lanes) if any(not ticket.gone for ticket in lane))
            oldest = lane.popleft()
            while oldest.gone:
                oldest = lane.popleft()
            self._waiting -= 1
            return (self._refuse(oldest, Reason.FULL),)

    def dispatch(self, now: float, most: int | None = None) -> list[Ticket]:
        """Settle tickets: drop those that waited too long, and admit as many (``most`` at most) as there are permits.

        To be called when a permit comes free, and every interval while calls wait.
        """
        settled: list[Ticket] = []
        if not self._waiting:
            return settled
        with self._lock:
            admitted = 0
            for (codel, lane), bound in zip(self._lanes, self._bounds, strict=True):
                while lane:
                    ticket = lane[0]
                    if ticket.gone:
                        lane.popleft()
                    elif self._drops(codel, now - ticket.arrived, self.in_flight < bound, now):
                        lane.popleft()
                        self._waiting -= 1
                        settled.append(self._refuse(ticket, Reason.DELAY))
                    elif self.in_flight < bound and admitted != most:
                        lane.popleft()
                        self._waiting -= 1
                        admitted += 1
                        self._admit(ticket)
                        settled.append(ticket)
                    else:
                        break
            if self._waiting:
                self._busy_until = now + BUSY
                self.limiter.queued = True
        return settled

    def abandon(self, ticket: Ticket, now: float) -> Sequence[Ticket]:
        """A call that waited is gone: give back what it may have got meanwhile. Returns the tickets settled by that."""
        with self._lock:
            ticket.gone = True
            if ticket.admitted:
                self.in_flight -= 1
            elif ticket.refused is None:
                self._waiting -= 1
        return self.dispatch(now)

    def leave(self, latency: Latency, seconds: float, ending: Ending, now: float) -> None:
        """A call's handler is through, ``seconds`` after it got its permit; ``dispatch`` is to follow if calls wait."""
        with self._lock:
            in_flight = self.in_flight
            self.in_flight = in_flight - 1
            self.ended += 1
            if ending is Ending.FAILED:
                self.failed += 1
                return
            if self.limiter.sample(latency, seconds, in_flight, ending, now):
                self._set_bounds()

    def release(self) -> None:
        """Give a permit back of a call that isn't run after all; ``dispatch`` is to follow if calls wait."""
        with self._lock:
            self.in_flight -= 1

    def begin_stream(self, criticality: Criticality) -> Reason | None:
        """A stream gives its permit back and counts as open; a reason when there are too many."""
        with self._lock:
            self.in_flight -= 1
            if self.streams >= self.config.max_streams:
                self.refusals[Reason.STREAMS, criticality] += 1
                return Reason.STREAMS
            self.streams += 1
            return None

    def end_stream(self, ending: Ending) -> None:
        """A stream is over."""
        with self._lock:
            self.streams -= 1
            self.ended += 1
            if ending is Ending.FAILED:
                self.failed += 1

    def unfit(self, latency: Latency, left: float | None, criticality: Criticality, now: float) -> Reason | None:
        """Why a call that could begin with ``left`` seconds to its deadline shouldn't; None when it should.

        One that has less than its method's median is refused while the server is busy, as it would only be in the way;
        when there is time to spare it may try.
        """
        if left is None:
            return None
        reason = Reason.EXPIRED
        if left > 0:
            if left >= latency.median or now >= self._busy_until or self.config.late is Mode.OFF:
                return None
            reason = Reason.LATE
        with self._lock:
            if reason is Reason.LATE and self.config.late is Mode.DRY_RUN:
                self.dry_run[reason, criticality] += 1
                return None
            self.refusals[reason, criticality] += 1
        return reason

    def _drops(self, codel: CoDel, delay: float, free: bool, now: float) -> bool:
        if self.config.overload is not Mode.ON or not codel.drops(delay, now):
            return False
        # Delay that stands over a few calls, with permits to spare, is a process that was kept from running: no
        # overload that refusing them would end.
        return not free or self._waiting > self.config.least

    def _set_bounds(self) -> None:
        if self.config.overload is Mode.OFF:
            self._bounds = [self.config.most for _ in SHARES]
        else:
            self._bounds = [max(1, int(self.limiter.limit * share)) for share in SHARES]

    def _admit(self, ticket: Ticket) -> None:
        ticket.admitted = True
        self.in_flight += 1

    def _refuse(self, ticket: Ticket, reason: Reason) -> Ticket:
        ticket.refused = reason
        self.refusals[reason, ticket.criticality] += 1
        return ticket

    def __repr__(self) -> str:
        closed = f" {self._closed.value}" if self._closed else ""
        return f"<Admission {self.in_flight}/{self.limit} in flight, {self._waiting} waiting{closed}>"
