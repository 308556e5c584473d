"""What a client refuses to send: calls beyond what may be outstanding (A32), and what an overloaded service would
refuse anyway (the adaptive throttle of Google's SRE book, "Handling Overload").

The less a call matters, the sooner it is refused: its metadata says (``CRITICALITY``), or that of the inbound call it
is made for. A refusal is final: it is never retried, and counts against no endpoint.

Rule 1: a call is counted before it is sent, and as accepted until the service refuses it: else the first calls in
flight would look like refusals (docs/correctness.md, O1). One refused here counts as a request, never as accepted.
Rule 2: what was entered is left exactly once. The count is a deque's length: its append and pop are atomic, so threads
share it without a lock. Rule 3: in a dry run refusals are counted and not made.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence

from mesh.codes import Code
from mesh.config.settings import AdaptiveConfig, OverloadConfig
from mesh.criticality import BY_NAME, CRITICALITY, SHARES, Criticality
from mesh.model import CallSpec, Lock, Metadatum, Outcome

REFUSALS = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED})
"""How a service says that it has too much to do."""

PATIENCE = (2.0, 1.0, 0.75, 0.6)
"""What K is multiplied by for each criticality (K stays at 1.1 or more): how much refusal it takes to be held back."""

BUCKETS = 24
"""The window moves by so many parts."""


class Throttled:
    """One criticality's requests and accepts over the window."""

    __slots__ = ("_accepts", "_at", "_buckets", "_lock", "_requests", "_span", "k")

    def __init__(self, window: float, k: float, lock: Lock) -> None:
        self.k = k
        self._span = window / BUCKETS
        self._buckets = [[0, 0] for _ in range(BUCKETS)]  # requests and accepts of each part of the window
        self._requests = self._accepts = 0  # their sums
        self._at = 0
        self._lock = lock

    def request(self, now: float) -> float:
        """Count a request that is accepted until told otherwise; returns the chance with which to refuse it."""
        with self._lock:
            bucket = self._turn(now)
            requests, accepts = self._requests, max(self._accepts, 0)
            bucket[0] += 1
            bucket[1] += 1
            self._requests += 1
            self._accepts += 1
        return max(0.0, (requests - self.k * accepts) / (requests + 1))

    def refused(self, now: float) -> None:
        """One was not accepted after all."""
        with self._lock:
            self._turn(now)[1] -= 1
            self._accepts -= 1

    def _turn(self, now: float) -> list[int]:
        """The bucket of the present; those since the last one are emptied."""
        turn = int(now / self._span)
        for passed in range(max(self._at, turn - BUCKETS) + 1, turn + 1):
            bucket = self._buckets[passed % BUCKETS]
            self._requests -= bucket[0]
            self._accepts -= bucket[1]
            bucket[:] = 0, 0
        self._at = max(self._at, turn)
        return self._buckets[self._at % BUCKETS]


class Gate:
    """What every call of a cluster passes.

    A call asks ``refuses`` if ``out`` is as long as ``free`` or longer, adds to ``out``, and takes off it when it is
    over, once; it then tells ``ended`` while ``adaptive``. So one that nothing holds back pays for a length, an append
    and a pop. ``counts``: what was refused ("would refuse: ..." in a dry run).
    """

    def __init__(self, config: OverloadConfig, locks: Sequence[Lock] = ()) -> None:
        self.counts: Counter[str] = Counter()
        self.out: deque[None] = deque()
        self._locks = locks
        self.configure(config)

    def configure(self, config: OverloadConfig) -> None:
        """Take other settings. What is in flight stays counted; the throttle begins anew."""
        self.config = config
        self.limit = config.max_outstanding
        self.adaptive = config.adaptive is not None
        self.free = 0.0 if self.adaptive else self.limit * min(SHARES)
        self._most_refused = config.adaptive.max_refused if config.adaptive else 0.0
        self._throttled = _throttled(config.adaptive, self._locks) if config.adaptive else ()

    def refuses(self, call: CallSpec, now: float, rng: random.Random) -> Outcome | None:
        """The outcome that refuses a call which begins now, or None."""
        criticality = criticality_of(call.metadata)
        outstanding, most = len(self.out), self.limit * SHARES[criticality]
        if outstanding >= most and self._refuses("outstanding"):
            return Outcome(
                Code.UNAVAILABLE,
                f"refused by the client: {outstanding} calls are outstanding, and the limit for {criticality.name} "
                f"calls is {most:g} (overload.maxOutstanding in the service config)",
            )
        if self._throttled:
            throttled = self._throttled[criticality]
            chance = min(throttled.request(now), self._most_refused)
            if rng.random() < chance and self._refuses("throttle"):
                throttled.refused(now)
                return Outcome(
                    Code.RESOURCE_EXHAUSTED,
                    f"refused by the client: the service refuses {criticality.name} calls, so {chance:.0%} of them "
                    "aren't sent",
                )
        return None

    def ended(self, call: CallSpec, now: float) -> None:
        """A call that was not refused here is over: the service may have refused it."""
        last = call.attempts[-1].outcome if call.attempts else None
        if last is not None and last.code in REFUSALS and not last.never_sent and self._throttled:
            self._throttled[criticality_of(call.metadata)].refused(now)

    def _refuses(self, reason: str) -> bool:
        self.counts[f"would refuse: {reason}" if self.config.dry_run else f"refused: {reason}"] += 1
        return not self.config.dry_run

    def __repr__(self) -> str:
        return f"<Gate {len(self.out)}/{self.limit:g} outstanding>"


def criticality_of(metadata: Sequence[Metadatum] | None) -> Criticality:
    """What a call's metadata says of how much it matters."""
    for key, value in metadata or ():
        if key == CRITICALITY:
            return BY_NAME.get(str(value), Criticality.CRITICAL)
    return Criticality.CRITICAL


def _throttled(config: AdaptiveConfig, locks: Sequence[Lock]) -> tuple[Throttled, ...]:
    return tuple(
        Throttled(config.window, max(1.1, config.k * patience), lock)
        for patience, lock in zip(PATIENCE, locks, strict=True)
    )
