"""The queue in front of a server's handlers: one lane per method and criticality, oldest call first."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from mesh.criticality import Criticality
from mesh.policy.server.limiter import Limiter
from mesh.policy.server.reasons import Reason

LOSS_WINDOW = 1.0
"""Seconds for which a missed deadline counts as recent."""


class Lane:
    """Waiting calls of one method and criticality, oldest first, and whether such calls missed their deadlines lately.

    ``losing_since``: when these losses began. ``sustained``: whether they have gone on long enough to act on.
    """

    __slots__ = ("_last_loss", "_required", "losing_since", "sustained", "tickets")

    def __init__(self) -> None:
        self.tickets: deque[Ticket] = deque()
        self.losing_since = self._last_loss = -math.inf
        self._required = 0.0
        self.sustained = False

    def record_loss(self, waited: float, overload_after: float, now: float) -> None:
        """A call that had ``waited`` in the queue missed its deadline."""
        if now - self._last_loss > LOSS_WINDOW:
            # Calls with short deadlines need not be lost for longer than one of them waits.
            self.losing_since, self._required = now, min(overload_after, waited)
        self._last_loss = now
        self.sustained = now - self.losing_since >= self._required

    def is_losing(self, now: float) -> bool:
        """Whether calls missed their deadlines lately."""
        return now - self._last_loss <= LOSS_WINDOW


class Method:
    """A method's queue and limit. ``name``: as shown to people. ``waiting``: its calls in the queue. ``bounds``: how
    many permits each criticality may take."""

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
    """A waiting call. Resolved once ``admitted`` or ``refused``; its owner then calls ``wake``.

    ``deadline`` is infinite for a call without one. ``abandoned``: the caller has gone. ``counted_late``: a dry run
    has counted it as late.
    """

    __slots__ = (
        "abandoned",
        "admitted",
        "arrived",
        "counted_late",
        "criticality",
        "deadline",
        "method",
        "refused",
        "wake",
    )

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
        self.abandoned = False
        self.counted_late = False

    def __repr__(self) -> str:
        state = "admitted" if self.admitted else f"refused: {self.refused.value}" if self.refused else "waiting"
        return f"<Ticket {self.criticality.name} {state}>"
