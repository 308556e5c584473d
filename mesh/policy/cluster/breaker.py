"""Whether one endpoint is ejected: its breaker, as a table, and the failures in a row that trip it.

CLOSED passes. A trip (failures in a row, or outlier detection's word) opens it. OPEN refuses until its time is over, or
until its connection was made anew, which is news of the endpoint. HALF_OPEN has one real request probe it; PROBING
waits for that one. A success closes, a failure opens again, and a probe that says nothing (cancelled, never sent) frees
the slot for another (docs/correctness.md, E5).

Rule 1: ``probe``, ``succeeded``, ``failed`` and ``ignored`` are called under the node's lock. The last three return
whether the cluster is to look at the node; it alone applies TRIP, TIME and RECONNECTED, because it alone knows how many
may be ejected.
Rule 2: only the probe's own outcome moves PROBING: it is told by when it started, exactly.
"""

from __future__ import annotations

import enum

from mesh.codes import Code
from mesh.config.settings import EjectionConfig

FAILURE_CODES = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS})
"""What counts against an endpoint. Not what speaks of the request, and not RESOURCE_EXHAUSTED: an endpoint that
refuses because it is busy isn't broken, and leaving it out would make the others busier (Envoy's 429, too)."""

GATEWAY_CODES = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED})  # HTTP's 502, 503 and 504


class State(enum.Enum):
    """Where a breaker stands."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"
    PROBING = "probing"


class Event(enum.Enum):
    """What moves a breaker."""

    TRIP = "trip"
    TIME = "time is over"
    RECONNECTED = "connected anew"
    PROBE = "a request goes to it"
    OK = "the probe succeeded"
    FAILED = "the probe failed"
    FREED = "the probe said nothing"


TRANSITIONS = {
    (State.CLOSED, Event.TRIP): State.OPEN,
    (State.OPEN, Event.TIME): State.HALF_OPEN,
    (State.OPEN, Event.RECONNECTED): State.HALF_OPEN,
    (State.HALF_OPEN, Event.PROBE): State.PROBING,
    (State.PROBING, Event.OK): State.CLOSED,
    (State.PROBING, Event.FAILED): State.OPEN,
    (State.PROBING, Event.FREED): State.HALF_OPEN,
}
"""All there are. An event that isn't here for a state changes nothing."""


class Breaker:
    """One endpoint's breaker.

    ``alert``: a success means something, too, so ask. ``reason``: why it is to be tripped. ``times``: how often it was
    of late, which its ejections' length goes by. ``until``: when an ejection ends. ``probed``: when the probe started.
    """

    __slots__ = ("_config", "_gateway", "_streak", "_timeouts", "alert", "probed", "reason", "state", "times", "until")

    def __init__(self, config: EjectionConfig) -> None:
        self._config = config
        self._streak = self._gateway = self._timeouts = 0
        self.alert = False
        self.probed = 0.0
        self.reason = ""
        self.state = State.CLOSED
        self.times = 0
        self.until = 0.0

    def apply(self, event: Event) -> bool:
        """Move as the table has it; False when ``event`` means nothing here."""
        after = TRANSITIONS.get((self.state, event))
        if after is None:
            return False
        self.state = after
        self.alert = after is not State.CLOSED
        self._streak = self._gateway = self._timeouts = 0
        return True

    def configure(self, config: EjectionConfig) -> None:
        """Take other limits; what is known stays."""
        self._config = config

    def probe(self, now: float) -> bool:
        """Whether a request that starts at ``now`` is to be the probe: one is."""
        if not self.apply(Event.PROBE):
            return False
        self.probed = now
        return True

    def succeeded(self, started: float) -> bool:
        """An attempt that started at ``started`` has succeeded; asked only while ``alert``."""
        if self.state is State.CLOSED:
            self._streak = self._gateway = self._timeouts = 0
            self.alert = False
            return False
        return self._probed(started, Event.OK)

    def failed(self, started: float, code: int) -> bool:
        """One has failed, in a way that counts against the endpoint."""
        if self.state is not State.CLOSED:
            return self._probed(started, Event.FAILED)
        self.alert = True
        self._streak += 1
        self._gateway = self._gateway + 1 if code in GATEWAY_CODES else 0
        self._timeouts = self._timeouts + 1 if code == Code.DEADLINE_EXCEEDED else 0
        config = self._config
        for count, limit, reason in (
            (self._timeouts, config.timeouts, "timeouts in a row"),
            (self._gateway, config.gateway, "gateway errors in a row"),
            (self._streak, config.consecutive, "failures in a row"),
        ):
            # At each multiple: it may be that it can't be ejected now, but later.
            if limit and count and count % limit == 0:
                self.reason = reason
                return True
        return False

    def ignored(self, started: float) -> bool:
        """One was cancelled or never left; asked only while ``alert``."""
        return self._probed(started, Event.FREED)

    def _probed(self, started: float, event: Event) -> bool:
        return started == self.probed and self.state is State.PROBING and self.apply(event)

    def __repr__(self) -> str:
        return f"<Breaker {self.state.value}>"
