"""How many calls of one method a server works on at once: no limit until load makes its calls miss their deadlines.

A handler that waits is not load, and neither is a burst. Two things have to hold together, for a while: calls run out
of time, or nearly, although unhindered they would take less than half as long; and more calls begin than end in time.
The limit then begins at what carries the same throughput by Little's law, throughput × unhindered latency, with room
to spare, and follows latency from there. It refuses nobody: calls wait for their turn (see ``admission``).

Calls that wait for other calls of the same method would wait for ever if the others got no permit. So a limit that
does not help is lifted: when fewer calls end well than before, or when none ends at all.

Compared with others' laws in docs/decisions/0017.

Rule 1: time is an argument. Rule 2: a call that failed is ignored, unless its time was up: failing fast is not being
fast. Rule 3: while calls are hindered, what they take is not taken for normal.
"""

from __future__ import annotations

import enum
import math

WINDOW = 0.1
"""Seconds between two looks at the limit."""

LEAST_SAMPLES = 10
"""Calls that a window needs; without them it lasts ``LONGEST``."""

LONGEST = 1.0
"""Seconds that a window lasts at most, or four times what a call takes: when none ends in that time while others wait
for the limit, they wait for each other."""

HINDERED = 2.0
"""Calls that take so many times as long as unhindered are hindered."""

NEARLY = 2.0
"""A call that ends with less than so many times its own duration left nearly ran out of time."""

BEHIND = 0.2
"""The share of calls that are not finished in time, beyond which a server falls behind."""

HEADROOM = 2.0
"""The limit begins at so many times what throughput and unhindered latency ask for."""

SATURATED, SLACK = 3.0, 1.5
"""How many times the unhindered latency calls take, beyond which the limit falls, and below which it grows."""

SMOOTHING = 0.2
"""The share of its way down that the limit goes in one window (Gradient2's)."""

GROWTH = 0.1
"""The share, beside its square root, by which the limit grows in one window: from 20 to 500 in about two seconds."""

HELPS = 0.6
"""The share of the earlier throughput below which a limit does harm."""

DOUBTS = 2
"""Looks in a row, about a second each, that find harm before a limit is lifted: a hiccup is shorter."""

CALM = 1.0
"""Seconds in which no call had to wait, after which a limit is lifted."""

PAUSE, LONGEST_PAUSE = 2.0, 64.0
"""Seconds without a limit after one that did not help; twice as many each time, up to the second."""

FALL, RISE, RISE_BUSY = 0.3, 1 / 60, 1 / 600
"""How far a baseline goes towards a window's mean: down; up; up while more than the least concurrency is in use."""

RECENT, FADE = 0.1, 0.998
"""The weight of a window in the rate of calls that end well, and what a window leaves of the highest rate."""

STEP = 1.05
"""The factor by which one call moves the median."""

OUT_OF_TIME = 0.1
"""The share of a call's duration by which a client may give up before the server sees the deadline pass: their clocks
and the way between them are not exact."""


class Ending(enum.Enum):
    """How a call left the handler."""

    OK = "ok"
    CANCELLED = "cancelled"
    FAILED = "failed"


def is_out_of_time(seconds: float, left: float) -> bool:
    """Whether a call that did not succeed, after ``seconds`` and with ``left`` to its deadline, ran out of time."""
    return left < OUT_OF_TIME * seconds


class Limiter:
    """The limit of one method. Not locked: it is called under its owner's lock.

    ``limit``: ``most`` while nothing is limited, else from ``least`` to ``most``. ``in_flight`` is counted by the
    owner. ``baseline``: seconds that a call takes unhindered; ``median``: as observed; both 0.0 until known.
    ``after``: seconds for which calls must miss their deadlines before there is a limit; less for calls that take less.

    The median is a frugal one: a value above moves it up a step, one below moves it down (Ma, Muthukrishnan, Sandler:
    "Frugal Streaming for Estimating Quantiles", 2013).
    """

    __slots__ = (
        "_after",
        "_base",
        "_before",
        "_began",
        "_best",
        "_count",
        "_doubts",
        "_due",
        "_ended",
        "_guard",
        "_guarded",
        "_least",
        "_level",
        "_longest",
        "_lost",
        "_missed",
        "_most",
        "_not_before",
        "_ok",
        "_pause",
        "_queued",
        "_rate",
        "_since",
        "_strained",
        "_total",
        "baseline",
        "in_flight",
        "limit",
        "limited",
        "median",
    )

    def __init__(self, least: int, most: int, after: float) -> None:
        self._most = most
        self._least = min(least, most)
        self._after = after
        self.limit = most
        self.limited = False
        self.in_flight = 0
        self.baseline = 0.0
        self.median = 0.0
        # The window.
        self._began = self._due = -math.inf
        self._count = self._strained = self._missed = self._lost = 0
        self._total = self._longest = 0.0
        # The time since which calls are strained.
        self._since = math.inf
        self._base = 0  # calls in flight then
        self._ok = self._ended = 0
        # The limit in force.
        self._level = 0.0
        self._rate = self._best = 0.0  # calls a second that end well; the highest lately
        self._before = 0.0  # calls a second that ended well before
        self._guard = self._queued = 0.0
        self._guarded = self._doubts = 0
        self._pause = PAUSE
        self._not_before = -math.inf

    def sample(self, seconds: float, left: float, ending: Ending, now: float) -> bool:
        """A call has left its handler after ``seconds``, with ``left`` to its deadline (infinite without one).

        Returns whether the limit changed.
        """
        if ending is Ending.OK:
            self._count += 1
            self._total += seconds
            if left < NEARLY * seconds and seconds > HINDERED * self.baseline > 0:
                self._strained += 1
        elif is_out_of_time(seconds, left):
            self._missed += 1
        elif ending is Ending.FAILED:
            return False
        if seconds > self.median:
            self.median = self.median * STEP or seconds
        elif ending is Ending.OK:  # one that did not finish counts only for how slow it already was
            self.median /= STEP
        if seconds > self._longest:
            self._longest = seconds
        return now >= self._due and self.look(now, False)

    def lose(self) -> None:
        """A call ran out of time without having begun."""
        self._lost += 1

    def look(self, now: float, queued: bool) -> bool:
        """Set the limit, if a window is over. ``queued``: calls wait for this limit.

        Returns whether it changed. To be called now and then while calls wait: perhaps none ends.
        """
        if queued:
            self._queued = now
        if now < self._due:
            return False
        span, ended = now - self._began, self._count + self._missed
        patience = max(LONGEST, 4 * self.baseline)
        if ended < LEAST_SAMPLES and span < (LONGEST if ended else patience):
            return False
        limit = self.limit
        mean = self._total / self._count if self._count else 0.0
        # The first window, and the first after a quiet time, say nothing about load.
        strained = span < 2 * patience and self._is_strained(mean, ended, now)
        if not strained:
            self._since = math.inf
        if mean:
            self._learn(mean, strained, span)
        self._rate += (self._count / span - self._rate) * RECENT
        self._best = max(self._rate, self._best * FADE)
        if self.limited:
            self._follow(mean, ended, strained, now)
        elif strained and now >= self._not_before:
            self._consider(now)
        # A limit shows its effect in calls that begin under it, and end in the next window.
        self._began, self._due = now, now + (max(WINDOW, 2 * mean) if self.limited else WINDOW)
        self._count = self._strained = self._missed = self._lost = 0
        self._total = self._longest = 0.0
        return self.limit != limit

    def _is_strained(self, mean: float, ended: int, now: float) -> bool:
        """Whether most calls of the window ran out of time, or nearly, and not for what they take by themselves."""
        if 2 * (self._strained + self._missed) <= ended or 0 < mean <= HINDERED * self.baseline:
            return False
        if self._since == math.inf:
            # From here on: what came before this window's end may be the step to a slower downstream, not load.
            self._since, self._base = now, self.in_flight
            self._ok = self._ended = 0
        else:
            self._ok += self._count
            self._ended += ended + self._lost
        return True

    def _learn(self, mean: float, strained: bool, span: float) -> None:
        if not self.baseline:
            self.baseline = mean
        elif mean < self.baseline:
            self.baseline += (mean - self.baseline) * FALL
        elif not strained and not self.limited:
            # By Little's law, what ended in the window had this many in flight.
            busy = self._total > self._least * span
            self.baseline += (mean - self.baseline) * (RISE_BUSY if busy else RISE)

    def _consider(self, now: float) -> None:
        """Calls are strained: begin to limit them, if that has lasted and the server falls behind."""
        elapsed = now - self._since
        # Half of what such a call takes is long enough: what ends after that began under the same load.
        if elapsed < min(self._after, self._longest / 2) or not elapsed:
            return
        growth = max(0, self.in_flight - self._base)
        late = self._ended - self._ok + growth
        # Calls come and end at random: three standard deviations are no chance.
        if late < max(BEHIND * (self._ended + growth), 3 * math.sqrt(self._ended)):
            return
        self._before = self._ok / elapsed
        carried = max(self._before, self._best) * self.baseline * HEADROOM
        self._level = min(max(carried, self._least), self._most)
        self.limit, self.limited = int(self._level), True
        self._queued = now
        # Those that are in flight have to end first. Where most calls fail already a limit has nothing to spoil, and
        # what they have left behind downstream may take as long to work off as it took to pile up.
        collapsed = 2 * self._ok < self._ended
        self._guard = now + max(LONGEST, 2 * self._longest, elapsed if collapsed else 0.0)
        self._guarded = self._doubts = 0

    def _follow(self, mean: float, ended: int, strained: bool, now: float) -> None:
        """A limit is in force: move it, or lift it when it isn't needed or does no good."""
        if now - self._queued > CALM:
            self._lift()
            self._pause = PAUSE
            return
        if not ended:
            self._give_up(now)
            return
        if now >= self._guard:
            self._guarded += self._count
            elapsed = now - self._guard
            if elapsed >= max(LONGEST, 4 * self.baseline):
                self._doubts = self._doubts + 1 if self._guarded / elapsed <= HELPS * self._before else 0
                if self._doubts == DOUBTS:
                    self._give_up(now)
                    return
                self._guard, self._guarded = now, 0
        ratio = mean / self.baseline if mean else math.inf
        if strained or ratio > SATURATED:
            gradient = min(1.0, max(0.5, (1.0 if strained else HEADROOM) / ratio))
            lower = self._level * gradient + math.sqrt(self._level)
            self._level += min(0.0, lower - self._level) * SMOOTHING
        elif ratio < SLACK:
            self._level += math.sqrt(self._level) + self._level * GROWTH
        self._level = min(max(self._level, self._least), self._most)
        self.limit = int(self._level)

    def _give_up(self, now: float) -> None:
        self._lift()
        self._not_before = now + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _lift(self) -> None:
        self.limit, self.limited = self._most, False
        self._since = math.inf

    def __repr__(self) -> str:
        limit = f"limit {self.limit}" if self.limited else "no limit"
        took = f"baseline {self.baseline * 1000:.1f} ms, median {self.median * 1000:.1f} ms"
        return f"<Limiter {self.in_flight} in flight, {limit}, {took}>"
