"""How many calls of one method a server runs at once: no limit until load makes calls miss their deadlines.

A handler that waits is not load, and neither is a burst. A method is limited once two things have held for a while:
calls miss their deadlines, or nearly, although at the baseline latency they would take less than half as long; and
more calls begin than end in time. The limit starts at twice what the throughput needs by Little's law (throughput ×
baseline latency) and then follows latency. It refuses no call: calls wait for a permit (see ``admission``).

Calls that wait for other calls of the same method would deadlock if those got no permit. So a limit that does not help
is lifted: when fewer calls succeed than before it, or when none ends.

docs/decisions/0017 compares this with other limiters.

Rule 1: time is an argument. Rule 2: a failed call is ignored, unless it ran out of time: failing fast is not low
latency. Rule 3: the latency of strained calls does not raise the baseline.
"""

from __future__ import annotations

import enum
import math

WINDOW = 0.1
"""Seconds between two updates of the limit."""

WINDOW_SAMPLES = 10
"""Calls that must end in a window; with fewer it lasts up to ``LONGEST_WINDOW``."""

LONGEST_WINDOW = 1.0
"""Seconds that a window lasts at most, or four times the baseline: when no call ends in that time while others wait for
the limit, the calls wait for each other."""

STRAINED_RATIO = 2.0
"""Strained calls take more than this many times the baseline."""

NEAR_MISS_RATIO = 2.0
"""A call that ends with less than this many times its own duration left nearly missed its deadline."""

OVERLOADED_SHARE = 0.2
"""The share of calls not finished in time from which a method is overloaded."""

HEADROOM = 2.0
"""The limit starts at this many times what throughput and baseline latency need."""

SHRINK_RATIO, GROW_RATIO = 3.0, 1.5
"""Mean latency as a multiple of the baseline above which the limit shrinks, and below which it grows."""

SMOOTHING = 0.2
"""The share of the way down that the limit moves in one window (as in Gradient2)."""

GROWTH = 0.1
"""The share, beside its square root, by which the limit grows in one window: from 20 to 500 in about two seconds."""

HARMFUL_SHARE = 0.6
"""The share of the throughput before the limit below which the limit does harm."""

HARMFUL_CHECKS = 2
"""Consecutive checks, about a second apart, that must find harm before the limit is lifted: a hiccup is shorter."""

UNUSED_AFTER = 1.0
"""Seconds without a waiting call after which the limit is lifted."""

COOLDOWN, LONGEST_COOLDOWN = 2.0, 64.0
"""Seconds without a limit after one that did not help; doubled each time, up to the second."""

BASELINE_FALL, BASELINE_RISE, BASELINE_RISE_BUSY = 0.3, 1 / 60, 1 / 600
"""How far the baseline moves towards a window's mean: down; up; up while more than the lowest limit is in flight."""

RATE_SMOOTHING, PEAK_DECAY = 0.1, 0.998
"""The weight of a window in the rate of successful calls, and what a window leaves of the peak rate."""

MEDIAN_STEP = 1.05
"""The factor by which one call moves the median."""

DEADLINE_TOLERANCE = 0.1
"""The share of a call's duration by which its client may give up before the server sees the deadline pass: clocks
differ, and the network takes time."""


class Ending(enum.Enum):
    """How a call ended."""

    OK = "ok"
    CANCELLED = "cancelled"
    FAILED = "failed"


def is_out_of_time(seconds: float, left: float) -> bool:
    """Whether a call that did not succeed, after ``seconds`` and with ``left`` to its deadline, ran out of time."""
    return left < DEADLINE_TOLERANCE * seconds


class Limiter:
    """The limit of one method. Not locked: it is called under its owner's lock.

    ``limit``: ``max_concurrency`` while not limited, else from ``min_concurrency`` to ``max_concurrency``.
    ``in_flight`` is counted by the owner. ``baseline``: seconds that a call takes without load; ``median``: the median
    observed; both 0.0 until known. ``overload_after``: seconds for which calls must miss their deadlines before there
    is a limit; less for calls that take less.

    The median is estimated: a value above moves it up a step, one below moves it down (Ma, Muthukrishnan, Sandler:
    "Frugal Streaming for Estimating Quantiles", 2013).
    """

    __slots__ = (
        "_check_at",
        "_cooldown",
        "_cooldown_until",
        "_harmful_checks",
        "_in_flight_before",
        "_last_queued",
        "_level",
        "_longest_call",
        "_lost",
        "_max",
        "_min",
        "_missed",
        "_overload_after",
        "_peak_rate",
        "_rate",
        "_rate_before",
        "_strained",
        "_strained_ended",
        "_strained_since",
        "_strained_succeeded",
        "_succeeded",
        "_succeeded_since_check",
        "_total",
        "_update_due",
        "_window_start",
        "baseline",
        "in_flight",
        "limit",
        "limited",
        "median",
    )

    def __init__(self, min_concurrency: int, max_concurrency: int, overload_after: float) -> None:
        self._max = max_concurrency
        self._min = min(min_concurrency, max_concurrency)
        self._overload_after = overload_after
        self.limit = max_concurrency
        self.limited = False
        self.in_flight = 0
        self.baseline = 0.0
        self.median = 0.0
        # The window.
        self._window_start = self._update_due = -math.inf
        self._succeeded = self._strained = self._missed = self._lost = 0
        self._total = self._longest_call = 0.0
        # While calls are strained.
        self._strained_since = math.inf
        self._in_flight_before = 0  # when the strain began
        self._strained_succeeded = self._strained_ended = 0
        # The limit in force.
        self._level = 0.0
        self._rate = self._peak_rate = 0.0  # successful calls a second; the recent peak
        self._rate_before = 0.0  # successful calls a second before the limit
        self._check_at = self._last_queued = 0.0
        self._succeeded_since_check = self._harmful_checks = 0
        self._cooldown = COOLDOWN
        self._cooldown_until = -math.inf

    def sample(self, seconds: float, left: float, ending: Ending, now: float) -> bool:
        """A handler has returned after ``seconds``, with ``left`` to the call's deadline (infinite without one).

        Returns whether the limit changed.
        """
        if ending is Ending.OK:
            self._succeeded += 1
            self._total += seconds
            if left < NEAR_MISS_RATIO * seconds and seconds > STRAINED_RATIO * self.baseline > 0:
                self._strained += 1
        elif is_out_of_time(seconds, left):
            self._missed += 1
        elif ending is Ending.FAILED:
            return False
        if seconds > self.median:
            self.median = self.median * MEDIAN_STEP or seconds
        elif ending is Ending.OK:  # an unfinished call only shows that it takes longer
            self.median /= MEDIAN_STEP
        if seconds > self._longest_call:
            self._longest_call = seconds
        return now >= self._update_due and self.update(now, False)

    def record_loss(self) -> None:
        """A call missed its deadline before its handler started."""
        self._lost += 1

    def update(self, now: float, queued: bool) -> bool:
        """Update the limit if a window is over. ``queued``: calls wait for this limit.

        Returns whether it changed. Call it periodically while calls wait: perhaps none ends.
        """
        if queued:
            self._last_queued = now
        if now < self._update_due:
            return False
        span, ended = now - self._window_start, self._succeeded + self._missed
        no_progress = max(LONGEST_WINDOW, 4 * self.baseline)
        if ended < WINDOW_SAMPLES and span < (LONGEST_WINDOW if ended else no_progress):
            return False
        limit = self.limit
        mean = self._total / self._succeeded if self._succeeded else 0.0
        # The first window, and the first after an idle period, say nothing about load.
        strained = span < 2 * no_progress and self._is_strained(mean, ended, now)
        if not strained:
            self._strained_since = math.inf
        if mean:
            self._update_baseline(mean, strained, span)
        self._rate += (self._succeeded / span - self._rate) * RATE_SMOOTHING
        self._peak_rate = max(self._rate, self._peak_rate * PEAK_DECAY)
        if self.limited:
            self._adjust(mean, ended, strained, now)
        elif strained and now >= self._cooldown_until:
            self._consider_limiting(now)
        # The effect of a limit shows in calls that start under it and end in the next window.
        self._window_start, self._update_due = now, now + (max(WINDOW, 2 * mean) if self.limited else WINDOW)
        self._succeeded = self._strained = self._missed = self._lost = 0
        self._total = self._longest_call = 0.0
        return self.limit != limit

    def _is_strained(self, mean: float, ended: int, now: float) -> bool:
        """Whether most calls of the window missed their deadlines, or nearly, and took far longer than the baseline."""
        if 2 * (self._strained + self._missed) <= ended or 0 < mean <= STRAINED_RATIO * self.baseline:
            return False
        if self._strained_since == math.inf:
            # Count from here: earlier calls may show a downstream that became slower, not load.
            self._strained_since, self._in_flight_before = now, self.in_flight
            self._strained_succeeded = self._strained_ended = 0
        else:
            self._strained_succeeded += self._succeeded
            self._strained_ended += ended + self._lost
        return True

    def _update_baseline(self, mean: float, strained: bool, span: float) -> None:
        if not self.baseline:
            self.baseline = mean
        elif mean < self.baseline:
            self.baseline += (mean - self.baseline) * BASELINE_FALL
        elif not strained and not self.limited:
            # Little's law: the calls that ended in the window had this many in flight.
            busy = self._total > self._min * span
            self.baseline += (mean - self.baseline) * (BASELINE_RISE_BUSY if busy else BASELINE_RISE)

    def _consider_limiting(self, now: float) -> None:
        """Calls are strained: limit them if that has lasted and the server falls behind."""
        elapsed = now - self._strained_since
        # Half of a call's duration is long enough: what ends after that started under the same load.
        if elapsed < min(self._overload_after, self._longest_call / 2) or not elapsed:
            return
        growth = max(0, self.in_flight - self._in_flight_before)
        late = self._strained_ended - self._strained_succeeded + growth
        # Calls arrive and end at random: require three standard deviations.
        if late < max(OVERLOADED_SHARE * (self._strained_ended + growth), 3 * math.sqrt(self._strained_ended)):
            return
        self._rate_before = self._strained_succeeded / elapsed
        carried = max(self._rate_before, self._peak_rate) * self.baseline * HEADROOM
        self._level = min(max(carried, self._min), self._max)
        self.limit, self.limited = int(self._level), True
        self._last_queued = now
        # Calls in flight have to end first. Where most calls fail already, a limit can do little harm, and the backlog
        # downstream may take as long to drain as it took to build up.
        collapsed = 2 * self._strained_succeeded < self._strained_ended
        self._check_at = now + max(LONGEST_WINDOW, 2 * self._longest_call, elapsed if collapsed else 0.0)
        self._succeeded_since_check = self._harmful_checks = 0

    def _adjust(self, mean: float, ended: int, strained: bool, now: float) -> None:
        """Adjust the limit, or lift it when it isn't needed or doesn't help."""
        if now - self._last_queued > UNUSED_AFTER:
            self._lift()
            self._cooldown = COOLDOWN
            return
        if not ended:
            self._lift_for_a_while(now)
            return
        if now >= self._check_at:
            self._succeeded_since_check += self._succeeded
            elapsed = now - self._check_at
            if elapsed >= max(LONGEST_WINDOW, 4 * self.baseline):
                harmful = self._succeeded_since_check / elapsed <= HARMFUL_SHARE * self._rate_before
                self._harmful_checks = self._harmful_checks + 1 if harmful else 0
                if self._harmful_checks == HARMFUL_CHECKS:
                    self._lift_for_a_while(now)
                    return
                self._check_at, self._succeeded_since_check = now, 0
        ratio = mean / self.baseline if mean else math.inf
        if strained or ratio > SHRINK_RATIO:
            gradient = min(1.0, max(0.5, (1.0 if strained else HEADROOM) / ratio))
            lower = self._level * gradient + math.sqrt(self._level)
            self._level += min(0.0, lower - self._level) * SMOOTHING
        elif ratio < GROW_RATIO:
            self._level += math.sqrt(self._level) + self._level * GROWTH
        self._level = min(max(self._level, self._min), self._max)
        self.limit = int(self._level)

    def _lift_for_a_while(self, now: float) -> None:
        self._lift()
        self._cooldown_until = now + self._cooldown
        self._cooldown = min(2 * self._cooldown, LONGEST_COOLDOWN)

    def _lift(self) -> None:
        self.limit, self.limited = self._max, False
        self._strained_since = math.inf

    def __repr__(self) -> str:
        limit = f"limit {self.limit}" if self.limited else "no limit"
        took = f"baseline {self.baseline * 1000:.1f} ms, median {self.median * 1000:.1f} ms"
        return f"<Limiter {self.in_flight} in flight, {limit}, {took}>"
