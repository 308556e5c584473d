"""How many retries and hedges a client may send: the retry budget, and A6's retry throttling.

The budget bounds the load that retries add while everything fails: a share of the calls, and a few per second
(Finagle's RetryBudget). It is withdrawn from when a retry is decided, so retries that wait in backoff count
(docs/correctness.md, R6). Retries and hedges share it. The throttle stops both while most attempts fail (A6); it is
off unless the service config sets it.
"""

from __future__ import annotations

import itertools

from mesh.config.settings import BudgetConfig, ThrottleConfig
from mesh.model import Lock

TTL = 10.0  # seconds after which an unused balance has expired; Finagle's


class Budget:
    """Retries as a share of calls, plus a number per second.

    ``call`` is on the path of every call: it counts without a lock, as ``next`` of an ``itertools.count`` is atomic.
    Only a withdrawal, which follows a failure, locks.
    """

    __slots__ = ("_balance", "_calls", "_config", "_lock", "_reads", "_seen", "_stamp", "call")

    def __init__(self, config: BudgetConfig, lock: Lock, now: float) -> None:
        self._config = config
        self._lock = lock
        self._calls = itertools.count()
        self._reads = 0
        self._seen = 0
        self._stamp = now
        self._balance = config.min_per_second * TTL
        self.call = self._calls.__next__
        """Count a call."""

    def withdraw(self, now: float) -> bool:
        """Take one retry from the budget; False when it is used up."""
        with self._lock:
            self._update(now)
            if self._balance < 1.0:
                return False
            self._balance -= 1.0
            return True

    def balance(self, now: float) -> float:
        """How many retries the budget allows now."""
        with self._lock:
            self._update(now)
            return self._balance

    def _update(self, now: float) -> None:
        # Reading the count advances it, so the reads are subtracted.
        calls = next(self._calls) - self._reads
        self._reads += 1
        elapsed = max(0.0, now - self._stamp)  # another thread with a later instant may have been first
        earned = (calls - self._seen) * self._config.ratio + elapsed * self._config.min_per_second
        self._seen = calls
        self._stamp += elapsed
        # An unused balance expires over TTL, so a long idle time leaves no more than TTL seconds' worth.
        if elapsed > TTL:
            self._balance, earned = 0.0, earned * TTL / elapsed
        self._balance = self._balance * (1 - min(elapsed, TTL) / TTL) + earned

    def __repr__(self) -> str:
        return f"<Budget balance={self._balance:.1f}>"


class Throttle:
    """A6's token count: starts full, a success adds ``token_ratio``, a failure takes 1; no retries at or below half."""

    __slots__ = ("_lock", "_max", "_ratio", "_tokens")

    def __init__(self, config: ThrottleConfig | None, lock: Lock) -> None:
        self._lock = lock
        # Without a config a failure takes nothing, and retries are always allowed.
        self._max = self._tokens = config.max_tokens if config else 0.0
        self._ratio = config.token_ratio if config else 0.0

    def record_success(self) -> None:
        """An attempt succeeded."""
        if self._tokens < self._max:
            with self._lock:
                self._tokens = min(self._max, self._tokens + self._ratio)

    def record_failure(self) -> None:
        """An attempt failed with a retryable status, or the server's pushback forbids a retry."""
        if self._max:
            with self._lock:
                self._tokens = max(0.0, self._tokens - 1.0)

    def allows(self) -> bool:
        """Whether a retry or a hedge may be sent: strictly above half (A6)."""
        return not self._max or self._tokens > self._max / 2

    def __repr__(self) -> str:
        return f"<Throttle {self._tokens:g}/{self._max:g}>" if self._max else "<Throttle off>"
