"""When a second attempt is sent beside a running one (A6's hedging; Finagle's BackupRequestFilter for the
percentile)."""

from __future__ import annotations

import bisect
import itertools
import math

from mesh.config.settings import HedgingPolicy
from mesh.model import Lock, Outcome
from mesh.policy.call.budget import Budget, Throttle

ENOUGH = 100  # latencies seen before a percentile is trusted
HALF_LIFE = 5000  # latencies after which the counts are halved, so that old ones fade
MINIMUM = 0.001  # seconds; a hedge earlier than that is noise (Finagle)

# Buckets grow by 5 %, from 10 µs to 10 minutes: a percentile is right within 5 %.
_GROWTH = math.log(1.05)
_SMALLEST = 1e-5
_BUCKETS = math.ceil(math.log(600 / _SMALLEST) / _GROWTH)


class Latencies:
    """What a method's successful attempts took, as fading counts in logarithmic buckets. Shared by the method's
    calls."""

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
        """The latency that ``percent`` of attempts stay below, in seconds; None until ``ENOUGH`` have been seen."""
        with self._lock:
            if self._total < ENOUGH:
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
        """Seconds until the next hedge, if nothing happens before: the learned percentile where the policy asks for
        one, else its fixed delay; math.inf when none is left."""
        if self._left <= 0:
            return math.inf
        if self._policy.percentile:
            learned = self._latencies.percentile(self._policy.percentile)
            if learned is not None:
                return max(learned, MINIMUM)
        return self._policy.delay

    def withdraw(self, now: float) -> bool:
        """Take one hedge, when one is left and throttle and budget allow it; False ends hedging for this call."""
        if self._left > 0 and self._throttle.allows() and self._budget.withdraw(now):
            self._left -= 1
            return True
        self._left = 0
        return False

    def after(self, outcome: Outcome, *, timed_out: bool, final: bool) -> float | None:
        """Seconds until the next hedge after a failure, math.inf when none is left; None when ``outcome`` is the
        call's.

        A non-fatal status sends the next hedge at once, or after the server's pushback; a negative pushback means no
        more hedges; any other status is fatal (docs/correctness.md, H1). ``timed_out``: the attempt's own timeout ended
        it, which is never fatal to the others. ``final``: the attempt was the call already.
        """
        forbidden = outcome.pushback is not None and outcome.pushback < 0
        non_fatal = timed_out or outcome.code in self._policy.non_fatal
        if non_fatal or forbidden:
            self._throttle.failed()
        if not non_fatal or final or outcome.committed:
            return None
        if forbidden or self._left <= 0:
            self._left = 0
            return math.inf
        return outcome.pushback or 0.0
