"""How many retries and hedges a client may add to its calls: the budget, and A6's throttle.

The budget bounds the load that retries add while everything fails: a share of the calls and a few each second
(Finagle's RetryBudget). It is withdrawn from when a retry is decided, so those waiting in backoff count
(docs/correctness.md, R6), and retries and hedges share one. The throttle stops them while most attempts fail (A6); it
is off unless the service config sets it.
"""

from __future__ import annotations

import itertools

from mesh.config.settings import BudgetConfig, ThrottleConfig
from mesh.model import Lock

TTL = 10.0  # seconds in which an unused allowance leaks away; Finagle's


class Budget:
    """Retries allowed as a share of calls, and a number each second.

    ``call`` is on the path of every call: it counts without a lock, as ``next`` of an ``itertools.count`` is atomic.
    Only a withdrawal, on the path of failures, locks.
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
        """A call begins."""

    def withdraw(self, now: float) -> bool:
        """Take one retry from the budget; False when there is none."""
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
        # Reading the count advances it, so the reads are taken off.
        calls = next(self._calls) - self._reads
        self._reads += 1
        elapsed = max(0.0, now - self._stamp)  # threads may come in another order than their instants
        earned = (calls - self._seen) * self._config.ratio + elapsed * self._config.min_per_second
        self._seen = calls
        self._stamp += elapsed
        # What is not used leaks away over TTL, so a long quiet time leaves TTL seconds' worth and no more.
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
        # Without a config a failure takes nothing: the neutral throttle always allows.
        self._max = self._tokens = config.max_tokens if config else 0.0
        self._ratio = config.token_ratio if config else 0.0

    def succeeded(self) -> None:
        """An attempt succeeded."""
        if self._tokens < self._max:
            with self._lock:
                self._tokens = min(self._max, self._tokens + self._ratio)

    def failed(self) -> None:
        """An attempt failed in a way that a retry is for, or the server said not to retry."""
        if self._max:
            with self._lock:
                self._tokens = max(0.0, self._tokens - 1.0)

    def allows(self) -> bool:
        """Whether a retry or a hedge may be sent: strictly above half (A6)."""
        return not self._max or self._tokens > self._max / 2

    def __repr__(self) -> str:
        return f"<Throttle {self._tokens:g}/{self._max:g}>" if self._max else "<Throttle off>"
