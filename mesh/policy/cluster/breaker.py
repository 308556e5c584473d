"""Whether one endpoint is ejected: its circuit breaker, as a table, and the consecutive failures that trip it.

CLOSED lets calls pass. Consecutive failures or outlier detection trip it. OPEN ejects the endpoint until its ejection
time has elapsed or its connection has been re-established. HALF_OPEN sends it one real request as a probe; PROBING
waits for that one. A success closes the breaker, a failure reopens it, and a probe without a result (cancelled, never
sent) makes room for another (docs/correctness.md, E5).

Rule 1: ``probe``, ``record_success``, ``record_failure`` and ``record_ignored`` are called under the node's lock. The
last three return whether the cluster must look at the node. Only the cluster applies TRIP, EXPIRED and RECONNECTED,
because only it knows how many endpoints may be ejected.
Rule 2: in PROBING only the probe's own outcome counts; it is identified by the instant at which it started.
"""

from __future__ import annotations

import enum

from mesh.codes import Code
from mesh.config.settings import OutlierDetectionConfig

FAILURE_CODES = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS})
"""Statuses that count against an endpoint. Not those that are about the request, and not RESOURCE_EXHAUSTED: an
endpoint that refuses calls because it is busy isn't broken, and ejecting it would overload the others (Envoy doesn't
count 429 either)."""

GATEWAY_CODES = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED})  # HTTP's 502, 503 and 504


class State(enum.Enum):
    """A breaker's state."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"
    PROBING = "probing"


class Event(enum.Enum):
    """What makes a breaker change its state."""

    TRIP = "trip"
    EXPIRED = "ejection time elapsed"
    RECONNECTED = "reconnected"
    PROBE = "probe sent"
    PROBE_SUCCEEDED = "probe succeeded"
    PROBE_FAILED = "probe failed"
    PROBE_IGNORED = "probe without a result"


TRANSITIONS = {
    (State.CLOSED, Event.TRIP): State.OPEN,
    (State.OPEN, Event.EXPIRED): State.HALF_OPEN,
    (State.OPEN, Event.RECONNECTED): State.HALF_OPEN,
    (State.HALF_OPEN, Event.PROBE): State.PROBING,
    (State.PROBING, Event.PROBE_SUCCEEDED): State.CLOSED,
    (State.PROBING, Event.PROBE_FAILED): State.OPEN,
    (State.PROBING, Event.PROBE_IGNORED): State.HALF_OPEN,
}
"""All transitions. An event that isn't listed for a state is ignored."""


class Breaker:
    """One endpoint's breaker.

    ``watches_success``: a success changes something, so it must be reported. ``reason``: why it is to be tripped.
    ``ejection_multiplier``: how often it was ejected lately, by which the base time is multiplied (A50). ``until``:
    when an ejection ends. ``probe_started``: when the probe started.
    """

    __slots__ = (
        "_config",
        "_failures",
        "_gateway_errors",
        "_timeouts",
        "ejection_multiplier",
        "probe_started",
        "reason",
        "state",
        "until",
        "watches_success",
    )

    def __init__(self, config: OutlierDetectionConfig) -> None:
        self._config = config
        self._failures = self._gateway_errors = self._timeouts = 0
        self.watches_success = False
        self.probe_started = 0.0
        self.reason = ""
        self.state = State.CLOSED
        self.ejection_multiplier = 0
        self.until = 0.0

    def apply(self, event: Event) -> bool:
        """Follow the table; False when the event is ignored in this state."""
        after = TRANSITIONS.get((self.state, event))
        if after is None:
            return False
        self.state = after
        self.watches_success = after is not State.CLOSED
        self._failures = self._gateway_errors = self._timeouts = 0
        return True

    def configure(self, config: OutlierDetectionConfig) -> None:
        """Use new limits; the state and the counts stay."""
        self._config = config

    def probe(self, now: float) -> bool:
        """Whether a request that starts at ``now`` is the probe: only one is."""
        if not self.apply(Event.PROBE):
            return False
        self.probe_started = now
        return True

    def record_success(self, started: float) -> bool:
        """An attempt that started at ``started`` has succeeded; called only while ``watches_success``."""
        if self.state is State.CLOSED:
            self._failures = self._gateway_errors = self._timeouts = 0
            self.watches_success = False
            return False
        return self._end_probe(started, Event.PROBE_SUCCEEDED)

    def record_failure(self, started: float, code: int) -> bool:
        """One has failed with a status that counts against the endpoint."""
        if self.state is not State.CLOSED:
            return self._end_probe(started, Event.PROBE_FAILED)
        self.watches_success = True
        self._failures += 1
        self._gateway_errors = self._gateway_errors + 1 if code in GATEWAY_CODES else 0
        self._timeouts = self._timeouts + 1 if code == Code.DEADLINE_EXCEEDED else 0
        config = self._config
        for count, limit, reason in (
            (self._timeouts, config.consecutive_timeouts, "consecutive timeouts"),
            (self._gateway_errors, config.consecutive_gateway_errors, "consecutive gateway errors"),
            (self._failures, config.consecutive_failures, "consecutive failures"),
        ):
            # At each multiple: too many may be ejected now, but not later.
            if limit and count and count % limit == 0:
                self.reason = reason
                return True
        return False

    def record_ignored(self, started: float) -> bool:
        """One was cancelled or never sent; called only while ``watches_success``."""
        return self._end_probe(started, Event.PROBE_IGNORED)

    def _end_probe(self, started: float, event: Event) -> bool:
        return started == self.probe_started and self.state is State.PROBING and self.apply(event)

    def __repr__(self) -> str:
        return f"<Breaker {self.state.value}>"
