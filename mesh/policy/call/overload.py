"""Calls that a client refuses to send: those over the limit of outstanding calls (circuit breaking, A32), and those
that an overloaded service would refuse anyway (client-side throttling: Google's SRE book, "Handling Overload").

Less critical calls are refused first. A call's criticality is in its metadata (``CRITICALITY``), or in that of the
inbound call for which it is made. A refused call is never retried, and counts against no endpoint.

Rule 1: a call is counted before it is sent, and as accepted until the service refuses it; otherwise the first calls in
flight would look like refusals (docs/correctness.md, O1). A call refused here counts as a request, never as accepted.
Rule 2: every call that was added is removed exactly once. The count is a deque's length: append and pop are atomic, so
threads share it without a lock.
Rule 3: in a dry run refusals are counted but not made.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence

from mesh.codes import Code
from mesh.config.settings import AdaptiveThrottleConfig, OverloadConfig
from mesh.criticality import LIMIT_SHARES, criticality_in
from mesh.model import CallSpec, Lock, Outcome

REFUSALS = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED})
"""Statuses with which a service refuses calls because it is overloaded."""

K_MULTIPLIERS = (2.0, 1.0, 0.75, 0.6)
"""Factors of K by criticality: less critical calls are throttled earlier. The product is 1.1 at least."""

BUCKETS = 24
"""Parts of the sliding window."""


class AdaptiveThrottle:
    """Requests and accepts of one criticality over the window."""

    __slots__ = ("_accepts", "_at", "_buckets", "_lock", "_requests", "_span", "k")

    def __init__(self, window: float, k: float, lock: Lock) -> None:
        self.k = k
        self._span = window / BUCKETS
        self._buckets = [[0, 0] for _ in range(BUCKETS)]  # requests and accepts
        self._requests = self._accepts = 0  # their sums
        self._at = 0
        self._lock = lock

    def request(self, now: float) -> float:
        """Count a request, for now as accepted; returns the probability with which to refuse it."""
        with self._lock:
            bucket = self._current(now)
            requests, accepts = self._requests, max(self._accepts, 0)
            bucket[0] += 1
            bucket[1] += 1
            self._requests += 1
            self._accepts += 1
        return max(0.0, (requests - self.k * accepts) / (requests + 1))

    def refused(self, now: float) -> None:
        """A request was not accepted after all."""
        with self._lock:
            self._current(now)[1] -= 1
            self._accepts -= 1

    def _current(self, now: float) -> list[int]:
        """The bucket for ``now``; those since the last one are cleared."""
        index = int(now / self._span)
        for passed in range(max(self._at, index - BUCKETS) + 1, index + 1):
            bucket = self._buckets[passed % BUCKETS]
            self._requests -= bucket[0]
            self._accepts -= bucket[1]
            bucket[:] = 0, 0
        self._at = max(self._at, index)
        return self._buckets[self._at % BUCKETS]


class ClientAdmission:
    """Admission control for a cluster's calls, in the client.

    A call asks ``refusal_of`` when ``outstanding`` is no shorter than ``unchecked_below``. It appends to
    ``outstanding``, and pops from it exactly once when it ends; then it calls ``call_ended`` if ``adaptive``. So a call
    below the limits costs a length, an append and a pop. ``counts``: what was refused ("would refuse: ..." in a dry
    run).
    """

    def __init__(self, config: OverloadConfig, locks: Sequence[Lock] = ()) -> None:
        self.counts: Counter[str] = Counter()
        self.outstanding: deque[None] = deque()
        self._locks = locks
        self.configure(config)

    def configure(self, config: OverloadConfig) -> None:
        """Use new settings. Outstanding calls stay counted; the adaptive throttle starts afresh."""
        self.config = config
        self.limit = config.max_outstanding
        self.adaptive = config.adaptive is not None
        self.unchecked_below = 0.0 if self.adaptive else self.limit * min(LIMIT_SHARES)
        self._max_refused = config.adaptive.max_refused if config.adaptive else 0.0
        self._throttles = _throttles(config.adaptive, self._locks) if config.adaptive else ()

    def refusal_of(self, call: CallSpec, now: float, rng: random.Random) -> Outcome | None:
        """The outcome with which to refuse a call that starts now, or None."""
        criticality = criticality_in(call.metadata)
        outstanding, limit = len(self.outstanding), self.limit * LIMIT_SHARES[criticality]
        if outstanding >= limit and self._count_refusal("outstanding"):
            return Outcome(
                Code.UNAVAILABLE,
                f"refused by the client: {outstanding} calls are outstanding, and the limit for {criticality.name} "
                f"calls is {limit:g} (overload.maxOutstanding in the service config)",
            )
        if self._throttles:
            throttle = self._throttles[criticality]
            chance = min(throttle.request(now), self._max_refused)
            if rng.random() < chance and self._count_refusal("throttle"):
                throttle.refused(now)
                return Outcome(
                    Code.RESOURCE_EXHAUSTED,
                    f"refused by the client: the service refuses {criticality.name} calls, so {chance:.0%} of them "
                    "aren't sent",
                )
        return None

    def call_ended(self, call: CallSpec, now: float) -> None:
        """A call that wasn't refused here has ended; the service may have refused it."""
        last = call.attempts[-1].outcome if call.attempts else None
        if last is not None and last.code in REFUSALS and not last.never_sent and self._throttles:
            self._throttles[criticality_in(call.metadata)].refused(now)

    def _count_refusal(self, reason: str) -> bool:
        """Count a refusal; returns whether it is to be made."""
        self.counts[f"would refuse: {reason}" if self.config.dry_run else f"refused: {reason}"] += 1
        return not self.config.dry_run

    def __repr__(self) -> str:
        return f"<ClientAdmission {len(self.outstanding)}/{self.limit:g} outstanding>"


def _throttles(config: AdaptiveThrottleConfig, locks: Sequence[Lock]) -> tuple[AdaptiveThrottle, ...]:
    return tuple(
        AdaptiveThrottle(config.window, max(1.1, config.k * multiplier), lock)
        for multiplier, lock in zip(K_MULTIPLIERS, locks, strict=True)
    )
