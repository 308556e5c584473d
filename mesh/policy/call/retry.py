"""Whether a failed attempt is retried, and after which delay (A6).

Pushback, throttling and budget: docs/correctness.md, R2, R5 and R6. The budget comes last, so that nothing is withdrawn
for a retry that isn't sent.
"""

from __future__ import annotations

import random

from mesh.config.settings import RetryPolicy
from mesh.model import Outcome
from mesh.policy.call.backoff import Backoff
from mesh.policy.call.budget import Budget, Throttle


class Retries:
    """The retries of one call."""

    __slots__ = ("_backoff", "_budget", "_left", "_policy", "_throttle")

    def __init__(self, policy: RetryPolicy, budget: Budget, throttle: Throttle) -> None:
        self._policy = policy
        self._budget = budget
        self._throttle = throttle
        self._backoff = Backoff(policy)
        self._left = policy.max_attempts - 1

    def after(
        self, outcome: Outcome, now: float, deadline: float, rng: random.Random, *, timed_out: bool, final: bool
    ) -> float | None:
        """Seconds until the next attempt, or None when the call fails with ``outcome``.

        ``timed_out``: the attempt's own timeout ended it, which is retryable whatever the codes say. ``final``: the
        call must not be retried; its failure still counts for throttling. A delay that doesn't end before ``deadline``
        means no retry.
        """
        forbidden = outcome.pushback is not None and outcome.pushback < 0
        retryable = timed_out or outcome.code in self._policy.retryable_codes
        if retryable or forbidden:
            self._throttle.record_failure()
        if not retryable or forbidden or final or outcome.committed or self._left <= 0 or not self._throttle.allows():
            return None
        if outcome.pushback is not None:
            delay = outcome.pushback
            self._backoff.reset()
        else:
            delay = self._backoff.delay(rng)
        if now + delay >= deadline or not self._budget.withdraw(now):
            return None
        self._left -= 1
        return delay
