"""Whether a server takes a call now, later, or not: permits, and a queue before them.

A call that finds a free permit and an empty queue runs at once. Others wait, first come first served among equals, the
important ones before the rest (criticality as in Google's SRE book, "Handling Overload"). A call that waits is refused
when its deadline passes, and before that only when calls like it were lost to their deadlines here already: then one
that has less time left than its method takes is refused; and when that lasts, so is each that came since and has
waited for half of its time, so that its caller can try elsewhere and the next begins with time to spare. A queue that
is full drops the oldest of the least important.

There are permits for all methods together (``most``), and for each method that its ``Limiter`` limits: calls of one
method that wait do not hold up the others.

Rule 1: decide, then do. A method returns the tickets that it settled; waking them is their owner's. Rule 2: a permit
taken is given back exactly once, by ``leave``. Rule 3: what is refused has not run.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mesh.codes import Code
from mesh.criticality import LIMIT_SHARES, Criticality
from mesh.model import Lock
from mesh.policy.server.limiter import Ending, Limiter, is_out_of_time

RECENT = 1.0
"""Seconds for which a call that was lost to its deadline says something about those that come after it."""

MARGIN = 1.5
"""How many times the median of its method a call should have left to begin, when others were lost."""

PATIENCE = 0.5
"""The share of its time that a call may wait, when losses last."""


class Reason(enum.Enum):
    """Why a call was refused."""

    STARTING = "starting"
    DRAINING = "draining"
    DELAY = "delay"
    FULL = "full"
    STREAMS = "streams"
    EXPIRED = "expired"
    LATE = "late"


CODES = {
    Reason.STARTING: (Code.UNAVAILABLE, "not ready yet"),
    Reason.DRAINING: (Code.UNAVAILABLE, "shutting down"),
    Reason.DELAY: (Code.RESOURCE_EXHAUSTED, "overloaded: calls miss their deadlines in the queue"),
    Reason.FULL: (Code.RESOURCE_EXHAUSTED, "overloaded: the queue is full"),
    Reason.STREAMS: (Code.RESOURCE_EXHAUSTED, "too many streams are open"),
    Reason.EXPIRED: (Code.DEADLINE_EXCEEDED, "the deadline passed before the call could begin"),
    Reason.LATE: (Code.DEADLINE_EXCEEDED, "overloaded: less time is left than the method takes"),
}
"""What the caller is told, before the figures."""


class Mode(enum.Enum):
    """Whether to refuse, only to count what would be refused, or neither."""

    ON = "on"
    DRY_RUN = "dry-run"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """``most``: calls at work at once, of all methods. ``least``: the lowest limit that a method gets. ``after``: the
    seconds for which calls must miss their deadlines before a method is limited, or calls are refused before theirs.
    ``overload``: these two. ``late``: refusing calls that have less time left than their method takes.

    Without ``overload`` (OFF) ``most`` and ``queue_size`` still hold.
    """

    least: int = 10
    most: int = 10_000
    queue_size: int = 1000
    after: float = 1.0
    max_streams: int = 10_000
    overload: Mode = Mode.ON
    late: Mode = Mode.ON


class Lane:
    """Calls of one method and criticality that wait, the oldest first, and whether such calls were lost lately.

    ``since``: when those losses began. ``lasting``: whether they have gone on for long enough.
    """

    __slots__ = ("_last", "_long", "lasting", "since", "tickets")

    def __init__(self) -> None:
        self.tickets: deque[Ticket] = deque()
        self.since = self._last = -math.inf
        self._long = 0.0
        self.lasting = False

    def lost(self, waited: float, after: float, now: float) -> None:
        """A call that had waited ran out of time here."""
        if now - self._last > RECENT:
            # As long as such a call waits is long enough.
            self.since, self._long = now, min(after, waited)
        self._last = now
        self.lasting = now - self.since >= self._long

    def is_losing(self, now: float) -> bool:
        """Whether calls were lost lately."""
        return now - self._last <= RECENT


class Method:
    """A method's queue and its limit. ``name``: as people read it. ``waiting``: its calls in the queue."""

    __slots__ = ("bounds", "lanes", "limited", "limiter", "name", "waiting")

    def __init__(self, limiter: Limiter, bounds: tuple[int, ...], name: str) -> None:
        self.name = name
        self.limiter = limiter
        self.limited = False
        self.bounds = bounds
        self.lanes = tuple(Lane() for _ in Criticality)
        self.waiting = 0

    def __repr__(self) -> str:
        return f"<Method {self.limiter!r}, {self.waiting} waiting>"


class Ticket:
    """A call that waits. Settled when ``refused`` or ``admitted``; ``wake`` is its owner's, to tell it so.

    ``deadline`` is infinite for a call without one.
    """

    __slots__ = ("admitted", "arrived", "criticality", "deadline", "gone", "late", "method", "refused", "wake")

    def __init__(
        self,
        method: Method,
        criticality: Criticality,
        arrived: float,
        wake: Callable[[], object],
        deadline: float | None = None,
    ) -> None:
        self.method = method
        self.criticality = criticality
        self.arrived = arrived
        self.deadline = math.inf if deadline is None else deadline
        self.wake = wake
        self.admitted = False
        self.refused: Reason | None = None
        self.gone = False
        self.late = False

    def __repr__(self) -> str:
        state = "admitted" if self.admitted else f"refused: {self.refused.value}" if self.refused else "waiting"
        return f"<Ticket {self.criticality.name} {state}>"


class Admission:
    """The gate before a server's handlers.

    ``in_flight``: calls that hold a permit. ``streams``: streams that are open; they need a permit to begin and hold
    none after that, as how long they last says nothing. ``ended`` counts calls whose handlers are through, ``failed``
    those that failed. ``refusals`` counts by reason and criticality, ``dry_run`` what would have been refused (reason
    DELAY there: had to wait). ``limited``: the methods that have a limit now. ``changed``: those whose limit has begun
    or ended, for its owner to take out and to log. ``last_loss``: when a call last ran out of time before its handler
    began, or because of the queue.
    """

    __slots__ = (
        "_bounds",
        "_closed",
        "_held",
        "_lock",
        "_queued",
        "changed",
        "config",
        "dry_run",
        "ended",
        "failed",
        "in_flight",
        "last_loss",
        "limited",
        "refusals",
        "streams",
        "waiting",
    )

    def __init__(self, config: AdmissionConfig, lock: Lock) -> None:
        self.config = config
        self._lock = lock
        self._bounds = _bounds(config.most, shared=config.overload is not Mode.OFF)
        self._queued: dict[Method, None] = {}  # methods whose calls wait
        self._held = 0  # calls that wait for the limit of their own method
        self._closed: Reason | None = None
        self.limited: dict[Method, None] = {}
        self.changed: deque[Method] = deque()
        self.waiting = 0
        self.in_flight = 0
        self.streams = 0
        self.refusals: Counter[tuple[Reason, Criticality]] = Counter()
        self.dry_run: Counter[tuple[Reason, Criticality]] = Counter()
        self.ended = 0
        self.failed = 0
        self.last_loss = -math.inf

    def method(self, name: str = "") -> Method:
        """A method that is served."""
        return Method(Limiter(self.config.least, self.config.most, self.config.after), self._bounds, name)

    @property
    def utilization(self) -> float:
        """Calls that run or wait against the limit: of all, or of the method that is worst off."""
        shares = [(method.limiter.in_flight + method.waiting) / method.limiter.limit for method in tuple(self.limited)]
        return max((self.in_flight + self.waiting) / self.config.most, *shares, 0.0)

    def close(self, reason: Reason) -> None:
        """Refuse all that comes from now on; what is here or waits goes on."""
        with self._lock:
            self._closed = reason

    def open(self) -> None:
        """Take calls (again)."""
        with self._lock:
            self._closed = None

    def enter(self, method: Method, criticality: Criticality) -> bool:
        """Take a permit, if there is one; else ``wait`` for one."""
        with self._lock:
            limiter = method.limiter
            if (
                self.in_flight >= self._bounds[criticality]
                or limiter.in_flight >= method.bounds[criticality]
                or method.waiting
                or self.waiting != self._held
                or self._closed is not None
            ):
                return False
            self.in_flight += 1
            limiter.in_flight += 1
            return True

    def wait(self, ticket: Ticket) -> Sequence[Ticket]:
        """Queue a call. Returns the tickets settled by that: itself, when it is refused or (in a dry run) admitted,
        or the one that had to make room."""
        with self._lock:
            if self._closed is not None:
                return (self._refuse(ticket, self._closed),)
            method = ticket.method
            if self.config.overload is Mode.DRY_RUN and self.in_flight < self.config.most:
                if method.limiter.in_flight >= method.bounds[ticket.criticality]:
                    self.dry_run[Reason.DELAY, ticket.criticality] += 1
                self._admit(ticket)
                return (ticket,)
            method.lanes[ticket.criticality].tickets.append(ticket)
            self._queued[method] = None
            self._count(method, 1)
            if self.waiting <= self.config.queue_size:
                return ()
            oldest = next(oldest for rank in reversed(Criticality) if (oldest := self._oldest(rank)) is not None)
            self._take(oldest)
            return (self._refuse(oldest, Reason.FULL),)

    def dispatch(self, now: float, most: int | None = None) -> list[Ticket]:
        """Settle tickets: drop those whose time is up, and admit as many (``most`` at most) as there are permits.

        To be called when a permit comes free, and now and then while calls wait.
        """
        settled: list[Ticket] = []
        if not self.waiting:
            return settled
        with self._lock:
            for method in self._queued:
                if method.limiter.look(now, method.limited and method.waiting > 0):
                    self._limit(method)
            admitted = 0
            for rank, bound in zip(Criticality, self._bounds, strict=True):
                for method in self._queued:
                    self._drop(method, rank, now, settled)
                while self.in_flight < bound and admitted != most:
                    ticket = self._oldest(rank, permitted=True)
                    if ticket is None:
                        break
                    self._take(ticket)
                    admitted += 1
                    self._admit(ticket)
                    settled.append(ticket)
                    self._drop(ticket.method, rank, now, settled)
            for method in [method for method in self._queued if not method.waiting]:
                del self._queued[method]
        return settled

    def abandon(self, ticket: Ticket, now: float) -> None:
        """A call that waited is gone: give back what it may have got meanwhile; ``dispatch`` is to follow if calls
        wait."""
        with self._lock:
            ticket.gone = True
            if ticket.admitted:
                self._release(ticket.method)
            elif ticket.refused is None:
                self._count(ticket.method, -1)
                waited = now - ticket.arrived
                if is_out_of_time(waited, ticket.deadline - now):
                    self._lose(ticket.method, ticket.criticality, waited, now)

    def leave(
        self,
        method: Method,
        criticality: Criticality,
        waited: float,
        seconds: float,
        left: float,
        ending: Ending,
        now: float,
    ) -> None:
        """A call's handler is through, ``seconds`` after it got its permit, for which it had ``waited``, with ``left``
        to its deadline (infinite without one); ``dispatch`` is to follow if calls wait."""
        limiter = method.limiter
        with self._lock:
            self.in_flight -= 1
            limiter.in_flight -= 1
            self.ended += 1
            if limiter.sample(seconds, left, ending, now):
                self._limit(method)
            if ending is Ending.OK:
                return
            if ending is Ending.FAILED:
                self.failed += 1
            if waited > seconds and is_out_of_time(seconds, left):
                # It would have had the time, but for the queue.
                self._lose(method, criticality, waited, now)

    def expire(self, method: Method, criticality: Criticality, arrived: float, now: float) -> Reason:
        """Give a permit back of a call whose deadline had passed when it got it; why it isn't run. ``dispatch`` is to
        follow if calls wait."""
        with self._lock:
            self._release(method)
            self._lose(method, criticality, now - arrived, now)
            self.refusals[Reason.EXPIRED, criticality] += 1
        return Reason.EXPIRED

    def begin_stream(self, method: Method, criticality: Criticality) -> Reason | None:
        """A stream gives its permit back and counts as open; a reason when there are too many."""
        with self._lock:
            self._release(method)
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

    def _oldest(self, rank: Criticality, *, permitted: bool = False) -> Ticket | None:
        """The ticket of this criticality that has waited longest; ``permitted``: among methods with permits."""
        oldest = None
        enforced = self.config.overload is Mode.ON
        for method in self._queued:
            if permitted and enforced and method.limiter.in_flight >= method.bounds[rank]:
                continue
            tickets = method.lanes[rank].tickets
            while tickets and tickets[0].gone:
                tickets.popleft()
            if tickets and (oldest is None or tickets[0].arrived < oldest.arrived):
                oldest = tickets[0]
        return oldest

    def _drop(self, method: Method, rank: Criticality, now: float, settled: list[Ticket]) -> None:
        """Refuse the oldest of a lane for as long as they are past hope."""
        lane = method.lanes[rank]
        while lane.tickets:
            ticket = lane.tickets[0]
            if ticket.gone:
                lane.tickets.popleft()
                continue
            reason = self._hopeless(lane, ticket, now)
            if reason is None:
                return
            self._lose(method, rank, now - ticket.arrived, now)
            self._take(ticket)
            settled.append(self._refuse(ticket, reason))

    def _hopeless(self, lane: Lane, ticket: Ticket, now: float) -> Reason | None:
        """Why a call should wait no longer."""
        left = ticket.deadline - now
        if left <= 0:
            return Reason.EXPIRED
        if not lane.is_losing(now):
            return None
        waited = now - ticket.arrived
        impatient = waited > PATIENCE * (ticket.deadline - ticket.arrived)
        if left < MARGIN * ticket.method.limiter.median and self.config.late is not Mode.OFF:
            if self.config.late is Mode.ON:
                return Reason.LATE
            if not ticket.late:
                ticket.late = True
                self.dry_run[Reason.LATE, ticket.criticality] += 1
        if impatient and lane.lasting and ticket.arrived >= lane.since and self.config.overload is Mode.ON:
            return Reason.DELAY
        return None

    def _lose(self, method: Method, rank: Criticality, waited: float, now: float) -> None:
        """A call ran out of time before its handler began, or because of the queue."""
        self.last_loss = now
        method.limiter.lose()
        method.lanes[rank].lost(waited, self.config.after, now)

    def _take(self, ticket: Ticket) -> None:
        """Take the oldest ticket of its lane out of the queue."""
        ticket.method.lanes[ticket.criticality].tickets.popleft()
        self._count(ticket.method, -1)

    def _count(self, method: Method, change: int) -> None:
        method.waiting += change
        self.waiting += change
        if method.limited:
            self._held += change

    def _limit(self, method: Method) -> None:
        """The limit of a method has changed."""
        if self.config.overload is Mode.OFF:
            return
        method.bounds = _bounds(method.limiter.limit)
        if method.limiter.limited is method.limited:
            return
        method.limited = not method.limited
        self.changed.append(method)
        if method.limited:
            self.limited[method] = None
            self._held += method.waiting
        else:
            del self.limited[method]
            self._held -= method.waiting

    def _admit(self, ticket: Ticket) -> None:
        ticket.admitted = True
        self.in_flight += 1
        ticket.method.limiter.in_flight += 1

    def _release(self, method: Method) -> None:
        self.in_flight -= 1
        method.limiter.in_flight -= 1

    def _refuse(self, ticket: Ticket, reason: Reason) -> Ticket:
        ticket.refused = reason
        self.refusals[reason, ticket.criticality] += 1
        return ticket

    def __repr__(self) -> str:
        closed = f" {self._closed.value}" if self._closed else ""
        return f"<Admission {self.in_flight}/{self.config.most} in flight, {self.waiting} waiting{closed}>"


def _bounds(limit: int, *, shared: bool = True) -> tuple[int, ...]:
    """How many of ``limit`` permits each criticality may take."""
    return tuple(max(1, int(limit * share)) if shared else limit for share in LIMIT_SHARES)
