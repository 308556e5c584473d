"""Outlier detection: which endpoints are ejected for doing worse than the others (A50), and for how long.

``outliers`` is A50's two algorithms over one interval's counts. ``Ejections`` keeps the ejected endpoints. An ejection
lasts the base time × the endpoint's ejection multiplier, up to the maximum, plus jitter so that many clients don't
return at the same time (docs/correctness.md, J1).

Rule 1: the ejected share is checked as it would be *after* the ejection (docs/correctness.md, E1). Of three or more
endpoints one may always be ejected, however small the share: otherwise small clusters would have no ejection at all.
Rule 2: an ejected endpoint keeps its connection; it just isn't picked (docs/correctness.md, E2).
Rule 3: in a dry run everything is decided and counted, and nothing is ejected.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from math import sqrt

from mesh.config.settings import OutlierDetectionConfig
from mesh.policy.cluster.breaker import Event, State
from mesh.policy.cluster.node import Node

FEWEST_ENDPOINTS = 3
"""With fewer endpoints none is ejected: all of the load would move to one."""

JITTER = 0.2
"""An ejection is extended by up to this share of its time."""

RECONNECT_MULTIPLIER_LIMIT = 2
"""Up to this ejection multiplier a reconnected endpoint is probed at once."""

Counts = Mapping[Node, tuple[int, int]]


def outliers(counts: Counts, config: OutlierDetectionConfig, rng: random.Random) -> Iterator[tuple[Node, str]]:
    """The endpoints that A50 ejects after an interval, with the reason. ``counts``: successes and failures."""
    if config.success_rate is not None:
        rate = config.success_rate
        rates = {
            node: successes / (successes + failures)
            for node, (successes, failures) in counts.items()
            if successes + failures >= max(1, rate.request_volume)
        }
        if rates and len(rates) >= rate.minimum_hosts:
            mean = sum(rates.values()) / len(rates)
            deviation = sqrt(sum((each - mean) ** 2 for each in rates.values()) / len(rates))
            threshold = mean - rate.stdev_factor * deviation
            for node, each in rates.items():
                if each < threshold and rng.random() * 100 < rate.enforcement:
                    yield node, "success rate"
    if config.failure_percentage is not None:
        limit = config.failure_percentage
        shares = {
            node: 100 * failures / (successes + failures)
            for node, (successes, failures) in counts.items()
            if successes + failures >= max(1, limit.request_volume)
        }
        if len(shares) >= limit.minimum_hosts:
            for node, each in shares.items():
                if each > limit.threshold and rng.random() * 100 < limit.enforcement:
                    yield node, "failure percentage"


class Ejections:
    """The ejected endpoints. ``counts``: ejections by reason; those of a dry run ("would eject: ..."), and those that
    the limit didn't allow ("kept: ...")."""

    def __init__(self, config: OutlierDetectionConfig, rng: random.Random, now: float) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self.ejected: dict[str, Node] = {}
        self.reasons: dict[str, str] = {}  # by address, why it is ejected
        self._pending: dict[Node, None] = {}  # a dict: each node once, so that it stays bounded between sweeps
        self._rng = rng
        self._next = now + config.interval

    def on_breaker_event(self, node: Node) -> None:
        """A breaker's state may have to change: the next ``sweep`` handles it. Called from any thread."""
        self._pending[node] = None

    def configure(self, config: OutlierDetectionConfig, now: float) -> None:
        """Use new settings. Endpoints that are ejected stay ejected until their time has elapsed."""
        self.config = config
        self._next = min(self._next, now + config.interval)

    def forget(self, address: str) -> None:
        """The endpoint was removed."""
        self.ejected.pop(address, None)
        self.reasons.pop(address, None)

    def reconnected(self, node: Node) -> None:
        """A new connection may be to a new process: the endpoint is probed at once, unless it was ejected too often."""
        if node.breaker.ejection_multiplier <= RECONNECT_MULTIPLIER_LIMIT:
            node.breaker.apply(Event.RECONNECTED)

    def sweep(self, nodes: Mapping[str, Node], now: float) -> bool:
        """Handle breakers' events and elapsed ejections, and once an interval detect outliers; returns whether the
        picker must be rebuilt."""
        changed = False
        while self._pending:
            node, _ = self._pending.popitem()
            if nodes.get(node.endpoint.address) is node:
                changed |= self._handle(node, nodes, now)
        for node in self.ejected.values():
            if now >= node.breaker.until and node.breaker.apply(Event.EXPIRED):
                changed = True
        if now >= self._next:
            self._next = now + self.config.interval
            changed |= self._detect_outliers(nodes, now)
        return changed

    def _handle(self, node: Node, nodes: Mapping[str, Node], now: float) -> bool:
        breaker = node.breaker
        if breaker.state is State.CLOSED:
            if self.ejected.pop(node.endpoint.address, None):
                self.reasons.pop(node.endpoint.address)
                self.counts["returned"] += 1
                return True
            return bool(breaker.reason) and self._eject(node, breaker.reason, nodes, now)
        if breaker.state is State.OPEN:  # the probe failed
            self._extend_ejection(node, now)
            self.counts["probe failed"] += 1
        return True

    def _detect_outliers(self, nodes: Mapping[str, Node], now: float) -> bool:
        counts = {node: node.take_counts() for node in nodes.values()}
        not_ejected = {node: count for node, count in counts.items() if node.breaker.state is State.CLOSED}
        changed = False
        for node, reason in outliers(not_ejected, self.config, self._rng):
            if node.breaker.state is State.CLOSED:  # the other algorithm may have ejected it
                changed |= self._eject(node, reason, nodes, now)
        for node in not_ejected:
            if node.breaker.state is State.CLOSED:
                node.breaker.ejection_multiplier = max(0, node.breaker.ejection_multiplier - 1)
        return changed

    def _eject(self, node: Node, reason: str, nodes: Mapping[str, Node], now: float) -> bool:
        node.breaker.reason = ""
        if self.config.dry_run:
            self.counts[f"would eject: {reason}"] += 1
            return False
        if not self._allowed(len(nodes)):
            self.counts[f"kept: {reason}"] += 1
            return False
        node.breaker.apply(Event.TRIP)
        self._extend_ejection(node, now)
        self.ejected[node.endpoint.address] = node
        self.reasons[node.endpoint.address] = f"{reason}; for {node.breaker.until - now:.0f} s"
        self.counts[f"ejected: {reason}"] += 1
        return True

    def _allowed(self, count: int) -> bool:
        limit = max(1, int(count * self.config.max_percent / 100)) if self.config.max_percent else 0
        return count >= FEWEST_ENDPOINTS and len(self.ejected) + 1 <= limit

    def _extend_ejection(self, node: Node, now: float) -> None:
        config, breaker = self.config, node.breaker
        breaker.ejection_multiplier += 1
        longest = max(config.base_time, config.max_time)
        breaker.until = now + min(config.base_time * breaker.ejection_multiplier, longest) * (
            1 + self._rng.random() * JITTER
        )

    def __repr__(self) -> str:
        return f"<Ejections {len(self.ejected)} ejected>"
