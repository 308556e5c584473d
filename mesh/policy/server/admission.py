"""Whether a server runs a call now, queues it, or refuses it.

A call runs at once when a permit is free and nothing is queued. Other calls wait: higher criticality first (as in
Google's SRE book, "Handling Overload"), first come, first served within each. A waiting call is refused when its
deadline passes. It is refused earlier only after calls of the same method and criticality have missed their deadlines:
first, calls with less time left than the method takes; if the losses go on, also calls that arrived since and have
waited for half of their time, so that their callers can try another endpoint and the next call starts with time to
spare. A full queue drops the oldest call of the lowest criticality.

There are permits for all methods together (``max_concurrency``), and for each method that its ``Limiter`` limits.
Calls waiting for one method's limit do not hold up other methods.

Rule 1: decide, then do. Methods return the tickets they resolved; the owner wakes them.
Rule 2: each permit taken is returned exactly once: by ``leave``, ``begin_stream``, ``expire`` or ``abandon``.
Rule 3: a refused call has not run.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.criticality import LIMIT_SHARES, Criticality
from mesh.model import Lock
from mesh.policy.server.limiter import Ending, Limiter, is_out_of_time
from mesh.policy.server.queue import Lane, Method, Ticket
from mesh.policy.server.reasons import Reason

LATE_MARGIN = 1.5
"""After losses, a call needs this many times its method's median duration left to start."""

WAIT_SHARE = 0.5
"""While losses are sustained, the share of its time that a call may spend in the queue."""


class Mode(enum.Enum):
    """Whether to refuse calls, only count those that would be refused, or neither."""

    ON = "on"
    DRY_RUN = "dry-run"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """``max_concurrency``: handlers that may run at once, of all methods. ``min_concurrency``: the lowest limit that a
    method gets. ``overload``: limits on methods and early refusals. ``overload_after``: seconds for which calls must
    miss their deadlines before either starts. ``late``: refusing calls with less time left than their method takes.

    With ``overload`` OFF, ``max_concurrency`` and ``queue_size`` still apply.
    """

    min_concurrency: int = 10
    max_concurrency: int = 10_000
    queue_size: int = 1000
    overload_after: float = 1.0
    max_streams: int = 10_000
    overload: Mode = Mode.ON
    late: Mode = Mode.ON


class Admission:
    """Admission control in front of a server's handlers.

    ``in_flight``: calls that hold a permit. ``streams``: open streams; they need a permit to start and return it then,
    because a stream's duration says nothing about load. ``completed`` counts calls whose handlers returned,
    ``failures`` those that failed. ``refusals`` counts by reason and criticality, ``dry_run`` what would have been
    refused (reason DELAY: would have waited). ``limited``: the methods limited now. ``limit_changes``: methods whose
    limit was set or lifted, for the owner to take and log. ``last_loss``: when a call last missed its deadline before
    its handler started, or because of the queue.
    """

    __slots__ = (
        "_bounds",
        "_closed",
        "_lock",
        "_queued",
        "_waiting_for_method",
        "completed",
        "config",
        "dry_run",
        "failures",
        "in_flight",
        "last_loss",
        "limit_changes",
        "limited",
        "refusals",
        "streams",
        "waiting",
    )

    def __init__(self, config: AdmissionConfig, lock: Lock) -> None:
        self.config = config
        self._lock = lock
        self._bounds = _bounds(config.max_concurrency, shared=config.overload is not Mode.OFF)
        self._queued: dict[Method, None] = {}  # methods with waiting calls
        self._waiting_for_method = 0  # calls of limited methods that wait
        self._closed: Reason | None = None
        self.limited: dict[Method, None] = {}
        self.limit_changes: deque[Method] = deque()
        self.waiting = 0
        self.in_flight = 0
        self.streams = 0
        self.refusals: Counter[tuple[Reason, Criticality]] = Counter()
        self.dry_run: Counter[tuple[Reason, Criticality]] = Counter()
        self.completed = 0
        self.failures = 0
        self.last_loss = -math.inf

    def method(self, name: str = "") -> Method:
        """The state of a method that is served."""
        config = self.config
        limiter = Limiter(config.min_concurrency, config.max_concurrency, config.overload_after)
        return Method(limiter, self._bounds, name)

    @property
    def utilization(self) -> float:
        """Running and waiting calls against the limit: the overall one, or the most utilized method's."""
        shares = [(method.limiter.in_flight + method.waiting) / method.limiter.limit for method in tuple(self.limited)]
        return max((self.in_flight + self.waiting) / self.config.max_concurrency, *shares, 0.0)

    def close(self, reason: Reason) -> None:
        """Refuse new calls from now on; running and waiting calls go on."""
        with self._lock:
            self._closed = reason

    def open(self) -> None:
        """Accept calls (again)."""
        with self._lock:
            self._closed = None

    def enter(self, method: Method, criticality: Criticality) -> bool:
        """Take a permit if one is free; otherwise ``wait`` for one."""
        with self._lock:
            limiter = method.limiter
            if (
                self.in_flight >= self._bounds[criticality]
                or limiter.in_flight >= method.bounds[criticality]
                or method.waiting
                or self.waiting != self._waiting_for_method
                or self._closed is not None
            ):
                return False
            self.in_flight += 1
            limiter.in_flight += 1
            return True

    def wait(self, ticket: Ticket) -> Sequence[Ticket]:
        """Queue a call. Returns the tickets that this resolved: the call's own, if refused or (in a dry run) admitted,
        or the one dropped to make room."""
        with self._lock:
            if self._closed is not None:
                return (self._refuse(ticket, self._closed),)
            method = ticket.method
            if self.config.overload is Mode.DRY_RUN and self.in_flight < self.config.max_concurrency:
                if method.limiter.in_flight >= method.bounds[ticket.criticality]:
                    self.dry_run[Reason.DELAY, ticket.criticality] += 1
                self._admit(ticket)
                return (ticket,)
            method.lanes[ticket.criticality].tickets.append(ticket)
            self._queued[method] = None
            self._count_waiting(method, 1)
            if self.waiting <= self.config.queue_size:
                return ()
            oldest = next(oldest for rank in reversed(Criticality) if (oldest := self._oldest(rank)) is not None)
            self._dequeue(oldest)
            return (self._refuse(oldest, Reason.FULL),)

    def dispatch(self, now: float, limit: int | None = None) -> list[Ticket]:
        """Resolve waiting calls: refuse those that are too late, and admit as many (at most ``limit``) as there are
        permits.

        Call it when a permit is returned, and periodically while calls wait.
        """
        resolved: list[Ticket] = []
        if not self.waiting:
            return resolved
        with self._lock:
            for method in self._queued:
                if method.limiter.update(now, method.limited and method.waiting > 0):
                    self._apply_limit(method)
            admitted = 0
            for rank, bound in zip(Criticality, self._bounds, strict=True):
                for method in self._queued:
                    self._refuse_late(method, rank, now, resolved)
                while self.in_flight < bound and admitted != limit:
                    ticket = self._oldest(rank, permitted=True)
                    if ticket is None:
                        break
                    self._dequeue(ticket)
                    admitted += 1
                    self._admit(ticket)
                    resolved.append(ticket)
                    self._refuse_late(ticket.method, rank, now, resolved)
            for method in [method for method in self._queued if not method.waiting]:
                del self._queued[method]
        return resolved

    def abandon(self, ticket: Ticket, now: float) -> None:
        """A waiting call's caller has gone: return the permit it may have been given. Call ``dispatch`` next if calls
        wait."""
        with self._lock:
            ticket.abandoned = True
            if ticket.admitted:
                self._release(ticket.method)
            elif ticket.refused is None:
                self._count_waiting(ticket.method, -1)
                waited = now - ticket.arrived
                if is_out_of_time(waited, ticket.deadline - now):
                    self._record_loss(ticket.method, ticket.criticality, waited, now)

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
        """A handler has returned, ``seconds`` after its call got a permit, for which the call had ``waited``. ``left``:
        seconds to the deadline (infinite without one). Call ``dispatch`` next if calls wait."""
        limiter = method.limiter
        with self._lock:
            self.in_flight -= 1
            limiter.in_flight -= 1
            self.completed += 1
            if limiter.sample(seconds, left, ending, now):
                self._apply_limit(method)
            if ending is Ending.OK:
                return
            if ending is Ending.FAILED:
                self.failures += 1
            if waited > seconds and is_out_of_time(seconds, left):
                # It would have made its deadline without the wait.
                self._record_loss(method, criticality, waited, now)

    def expire(self, method: Method, criticality: Criticality, arrived: float, now: float) -> Reason:
        """Return the permit of a call whose deadline had passed when it got it. Returns the reason for refusing it.
        Call ``dispatch`` next if calls wait."""
        with self._lock:
            self._release(method)
            self._record_loss(method, criticality, now - arrived, now)
            self.refusals[Reason.EXPIRED, criticality] += 1
        return Reason.EXPIRED

    def begin_stream(self, method: Method, criticality: Criticality) -> Reason | None:
        """Return a stream's permit and count the stream as open. Returns a reason when too many are open."""
        with self._lock:
            self._release(method)
            if self.streams >= self.config.max_streams:
                self.refusals[Reason.STREAMS, criticality] += 1
                return Reason.STREAMS
            self.streams += 1
            return None

    def end_stream(self, ending: Ending) -> None:
        """A stream has ended."""
        with self._lock:
            self.streams -= 1
            self.completed += 1
            if ending is Ending.FAILED:
                self.failures += 1

    def _oldest(self, rank: Criticality, *, permitted: bool = False) -> Ticket | None:
        """The ticket of this criticality that has waited longest; with ``permitted``, of methods that have permits."""
        oldest = None
        enforced = self.config.overload is Mode.ON
        for method in self._queued:
            if permitted and enforced and method.limiter.in_flight >= method.bounds[rank]:
                continue
            tickets = method.lanes[rank].tickets
            while tickets and tickets[0].abandoned:
                tickets.popleft()
            if tickets and (oldest is None or tickets[0].arrived < oldest.arrived):
                oldest = tickets[0]
        return oldest

    def _refuse_late(self, method: Method, rank: Criticality, now: float, resolved: list[Ticket]) -> None:
        """Refuse the oldest calls of a lane until one can still make its deadline."""
        lane = method.lanes[rank]
        while lane.tickets:
            ticket = lane.tickets[0]
            if ticket.abandoned:
                lane.tickets.popleft()
                continue
            reason = self._check_deadline(lane, ticket, now)
            if reason is None:
                return
            self._record_loss(method, rank, now - ticket.arrived, now)
            self._dequeue(ticket)
            resolved.append(self._refuse(ticket, reason))

    def _check_deadline(self, lane: Lane, ticket: Ticket, now: float) -> Reason | None:
        """Why a call should not wait any longer; None when it should."""
        left = ticket.deadline - now
        if left <= 0:
            return Reason.EXPIRED
        if not lane.is_losing(now):
            return None
        waited_long = now - ticket.arrived > WAIT_SHARE * (ticket.deadline - ticket.arrived)
        if left < LATE_MARGIN * ticket.method.limiter.median and self.config.late is not Mode.OFF:
            if self.config.late is Mode.ON:
                return Reason.LATE
            if not ticket.counted_late:
                ticket.counted_late = True
                self.dry_run[Reason.LATE, ticket.criticality] += 1
        arrived_since = ticket.arrived >= lane.losing_since
        if waited_long and lane.sustained and arrived_since and self.config.overload is Mode.ON:
            return Reason.DELAY
        return None

    def _record_loss(self, method: Method, rank: Criticality, waited: float, now: float) -> None:
        """A call missed its deadline before its handler started, or because of the queue."""
        self.last_loss = now
        method.limiter.record_loss()
        method.lanes[rank].record_loss(waited, self.config.overload_after, now)

    def _dequeue(self, ticket: Ticket) -> None:
        """Take the oldest ticket of its lane out of the queue."""
        ticket.method.lanes[ticket.criticality].tickets.popleft()
        self._count_waiting(ticket.method, -1)

    def _count_waiting(self, method: Method, change: int) -> None:
        method.waiting += change
        self.waiting += change
        if method.limited:
            self._waiting_for_method += change

    def _apply_limit(self, method: Method) -> None:
        """A method's limit has changed."""
        if self.config.overload is Mode.OFF:
            return
        method.bounds = _bounds(method.limiter.limit)
        if method.limiter.limited is method.limited:
            return
        method.limited = not method.limited
        self.limit_changes.append(method)
        if method.limited:
            self.limited[method] = None
            self._waiting_for_method += method.waiting
        else:
            del self.limited[method]
            self._waiting_for_method -= method.waiting

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
        running = f"{self.in_flight}/{self.config.max_concurrency} in flight"
        return f"<Admission {running}, {self.waiting} waiting{closed}>"


def _bounds(limit: int, *, shared: bool = True) -> tuple[int, ...]:
    """How many of ``limit`` permits each criticality may take."""
    return tuple(max(1, int(limit * share)) if shared else limit for share in LIMIT_SHARES)
