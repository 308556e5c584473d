"""How long to wait before a retry: exponential backoff with jitter (A6).

Rule: the nth delay is min(initial × multiplier^(n-1), max) × U(0.8, 1.2), so jitter may exceed the maximum by a fifth.
A server's pushback restarts the sequence.
"""

from __future__ import annotations

import random

from mesh.config.settings import RetryPolicy

JITTER = 0.2


class Backoff:
    """The delays of one call's retries."""

    __slots__ = ("_next", "_policy")

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._next = policy.initial_backoff

    def delay(self, rng: random.Random) -> float:
        """The next delay, in seconds."""
        delay = min(self._next, self._policy.max_backoff)
        # Capped here as well, so that it can't overflow.
        self._next = min(delay * self._policy.multiplier, self._policy.max_backoff)
        return delay * rng.uniform(1 - JITTER, 1 + JITTER)

    def reset(self) -> None:
        """Restart with the initial backoff."""
        self._next = self._policy.initial_backoff

    def __repr__(self) -> str:
        return f"<Backoff next={self._next:g}s>"
