"""Hedging (A6): when another attempt is sent while one is running. The learned delay is Finagle's
BackupRequestFilter's."""

from __future__ import annotations

import bisect
import itertools
import math

from mesh.config.settings import HedgingPolicy
from mesh.model import Lock, Outcome
from mesh.policy.call.budget import Budget, Throttle

SAMPLES_NEEDED = 100  # latencies recorded before a percentile is used
HALF_LIFE = 5000  # latencies after which the counts are halved, so that old ones fade
SHORTEST_LEARNED_DELAY = 0.001  # seconds; a shorter one is noise (Finagle)

# Buckets grow by 5 %, from 10 µs to 10 minutes, so a percentile is exact within 5 %.
_GROWTH = math.log(1.05)
_SMALLEST = 1e-5
_BUCKETS = math.ceil(math.log(600 / _SMALLEST) / _GROWTH)


class Latencies:
    """The latencies of a method's successful attempts: a histogram with logarithmic buckets in which old samples fade.
    Shared by the method's calls."""

    __slots__ = ("_counts", "_lock", "_total")

    def __init__(self, lock: Lock) -> None:
        self._counts = [0] * (_BUCKETS + 1)
        self._total = 0
        self._lock = lock

    def record(self, seconds: float) -> None:
        """An attempt took ``seconds``."""
        bucket = int(math.log(max(seconds, _SMALLEST) / _SMALLEST) / _GROWTH)
        with self._lock:
            self._counts[min(bucket, _BUCKETS)] += 1
            self._total += 1
            if self._total >= 2 * HALF_LIFE:
                self._counts = [count // 2 for count in self._counts]
                self._total = sum(self._counts)

    def percentile(self, percent: float) -> float | None:
        """A percentile of the latencies, in seconds; None until ``SAMPLES_NEEDED`` have been recorded."""
        with self._lock:
            if self._total < SAMPLES_NEEDED:
                return None
            bucket = bisect.bisect_left(list(itertools.accumulate(self._counts)), self._total * percent / 100)
        return _SMALLEST * math.exp((bucket + 1) * _GROWTH)

    def __repr__(self) -> str:
        return f"<Latencies of {self._total}>"


class Hedges:
    """The hedges of one call."""

    __slots__ = ("_budget", "_latencies", "_left", "_policy", "_throttle")

    def __init__(self, policy: HedgingPolicy, budget: Budget, throttle: Throttle, latencies: Latencies) -> None:
        self._policy = policy
        self._budget = budget
        self._throttle = throttle
        self._latencies = latencies
        self._left = policy.max_attempts - 1

    def delay(self) -> float:
        """Seconds until the next hedge, unless something happens before: the learned percentile if the policy sets one
        and enough is known, else the fixed delay; math.inf when no hedge is left."""
        if self._left <= 0:
            return math.inf
        if self._policy.percentile:
            learned = self._latencies.percentile(self._policy.percentile)
            if learned is not None:
                return max(learned, SHORTEST_LEARNED_DELAY)
        return self._policy.delay

    def withdraw(self, now: float) -> bool:
        """Take one hedge, if one is left and the throttle and the budget allow it; False ends hedging for this call."""
        if self._left > 0 and self._throttle.allows() and self._budget.withdraw(now):
            self._left -= 1
            return True
        self._left = 0
        return False

    def after(self, outcome: Outcome, *, timed_out: bool, final: bool) -> float | None:
        """Seconds until the next hedge after a failure, math.inf when no hedge is left; None when the call fails with
        ``outcome``.

        A non-fatal status sends the next hedge at once, or after the server's pushback; a negative pushback means no
        more hedges; any other status is fatal (docs/correctness.md, H1). ``timed_out``: the attempt's own timeout ended
        it, which is never fatal. ``final``: the call was committed to the attempt.
        """
        forbidden = outcome.pushback is not None and outcome.pushback < 0
        non_fatal = timed_out or outcome.code in self._policy.non_fatal_codes
        if non_fatal or forbidden:
            self._throttle.record_failure()
        if not non_fatal or final or outcome.committed:
            return None
        if forbidden or self._left <= 0:
            self._left = 0
            return math.inf
        return outcome.pushback or 0.0
