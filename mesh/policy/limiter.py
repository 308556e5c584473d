"""How many calls a server works on at once: a limit that follows its latency, and what each method usually takes.

Gradient2 of Netflix's concurrency-limits, on the server, which sees all requests (on a client latency says too little:
Envoy's and Netflix's own advice). When calls take longer than they do unhindered, the limit falls by that ratio; while
they don't, and the limit is in use, it grows. Two things differ. Calls are measured against their
own method's baseline, so that a change in the mix of methods is no slowness. And a baseline rises slowly while calls
queue, so that an overload doesn't become the norm.

Rule 1: time is an argument. Rule 2: a call that failed is ignored: failing fast is not being fast. Rule 3: one that was
cancelled counts only for how slow it already was.
"""

from __future__ import annotations

import enum
import math

WINDOW = 0.1
"""Seconds between two looks at the limit."""

LEAST_SAMPLES = 10
"""Calls that a window needs: it lasts until they have come."""

TOLERANCE = 1.5
"""How much longer than usual calls may take before the limit falls (Gradient2's rttTolerance)."""

SMOOTHING = 0.2
"""The share of its way down that the limit goes in one window (Gradient2's)."""

GROWTH = 0.1
"""The share, beside its square root, by which the limit grows in one window: from 20 to 500 in about two seconds."""

FALL, RISE, RISE_QUEUED = 0.3, 1 / 60, 1 / 600
"""How far a baseline goes towards a window's mean: down; up; up while calls queue."""

STEP = 1.05
"""The factor by which one call moves a median."""


class Ending(enum.Enum):
    """How a call left the handler."""

    OK = "ok"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Latency:
    """What one method takes, in seconds: ``baseline`` unhindered, ``median`` as observed; both 0.0 until known.

    The median is a frugal one: a value above moves it up a step, one below moves it down (Ma, Muthukrishnan, Sandler:
    "Frugal Streaming for Estimating Quantiles", 2013).
    """

    __slots__ = ("baseline", "count", "median", "total")

    def __init__(self) -> None:
        self.baseline = 0.0
        self.median = 0.0
        self.count = 0
        self.total = 0.0

    def __repr__(self) -> str:
        return f"<Latency baseline={self.baseline * 1000:.1f}ms median={self.median * 1000:.1f}ms>"


class Limiter:
    """The limit. Not locked: it is called under its owner's lock.

    ``limit`` starts at ``initial`` and stays from ``least`` to ``most``. ``queued`` is set by the owner when a call
    had to wait, and holds for the window.
    """

    __slots__ = ("_count", "_due", "_least", "_level", "_most", "_peak", "_seen", "limit", "queued")

    def __init__(self, initial: int, least: int, most: int) -> None:
        self._most = most
        self._least = min(least, most)
        self._level = float(min(max(initial, self._least), most))
        self.limit = int(self._level)
        self.queued = False
        self._due = 0.0
        self._count = 0
        self._peak = 0
        self._seen: list[Latency] = []

    def sample(self, latency: Latency, seconds: float, in_flight: int, ending: Ending, now: float) -> bool:
        """A call has left its handler after ``seconds``, while ``in_flight`` were there, itself among them.

        Returns whether the limit was looked at.
        """
        if ending is not Ending.OK and (ending is Ending.FAILED or seconds <= latency.baseline):
            return False
        if seconds > latency.median:
            latency.median = latency.median * STEP or seconds
        else:
            latency.median /= STEP
        if not latency.count:
            self._seen.append(latency)
        latency.count += 1
        latency.total += seconds
        self._count += 1
        if in_flight > self._peak:
            self._peak = in_flight
        if now < self._due or self._count < LEAST_SAMPLES:
            return False
        self._look(now)
        return True

    def _look(self, now: float) -> None:
        """The window is over: set the limit by it, and begin the next."""
        spent = expected = 0.0
        for latency in self._seen:
            mean = latency.total / latency.count
            if not latency.baseline:
                latency.baseline = mean
            spent += latency.total
            expected += latency.baseline * latency.count
            weight = FALL if mean < latency.baseline else RISE_QUEUED if self.queued else RISE
            latency.baseline += (mean - latency.baseline) * weight
            latency.total, latency.count = 0.0, 0
        # A limit that isn't in use says nothing: latency has other reasons then (Gradient2's app-limited rule).
        if self._peak * 2 >= self.limit:
            gradient = max(0.5, TOLERANCE * expected / spent) if spent else 1.0
            if gradient < 1.0:
                # Room for a few that wait keeps the limit from falling to where nothing does.
                lower = self._level * gradient + math.sqrt(self._level)
                self._level += min(0.0, lower - self._level) * SMOOTHING
            else:
                self._level += math.sqrt(self._level) + self._level * GROWTH
            self._level = min(max(self._level, self._least), self._most)
            self.limit = int(self._level)
        self._seen.clear()
        self._count = self._peak = 0
        self._due = now + WINDOW
        self.queued = False

    def __repr__(self) -> str:
        return f"<Limiter {self.limit} of {self._least}..{self._most}>"
