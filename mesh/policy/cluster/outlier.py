"""Which endpoints answer so much worse than the others that they are left out (A50), and for how long.

``outliers`` is A50's two algorithms over one interval's counts. ``Ejections`` keeps who is out: for base time × how
often of late, up to the maximum, with jitter, so that many clients don't come back in step (docs/correctness.md, J1).

Rule 1: the share ejected is checked as it would be *after*, not before (docs/correctness.md, E1). One may always be
ejected where there are three or more, however small the share: else small clusters would have no ejection at all.
Rule 2: an ejected endpoint keeps its connection; it is only not picked (docs/correctness.md, E2).
Rule 3: in a dry run everything is decided and counted, and nothing is done.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from math import sqrt

from mesh.config.settings import EjectionConfig
from mesh.policy.cluster.breaker import Event, State
from mesh.policy.cluster.node import Node

LEAST = 3
"""With fewer endpoints none is ejected: the load would fall on one."""

JITTER = 0.2
"""An ejection lasts up to this much longer than it must."""

RECONNECTS = 2
"""How often of late an endpoint may have been ejected for a new connection to mean something."""

Counts = Mapping[Node, tuple[int, int]]


def outliers(counts: Counts, config: EjectionConfig, rng: random.Random) -> Iterator[tuple[Node, str]]:
    """Whom A50 ejects for what they answered in an interval, with the reason. ``counts``: successes and failures."""
    if config.success_rate is not None:
        rate = config.success_rate
        rates = {node: ok / (ok + bad) for node, (ok, bad) in counts.items() if ok + bad >= max(1, rate.request_volume)}
        if rates and len(rates) >= rate.minimum_hosts:
            mean = sum(rates.values()) / len(rates)
            deviation = sqrt(sum((each - mean) ** 2 for each in rates.values()) / len(rates))
            least = mean - rate.stdev_factor * deviation
            for node, each in rates.items():
                if each < least and rng.random() * 100 < rate.enforcement:
                    yield node, "success rate"
    if config.failure_percentage is not None:
        limit = config.failure_percentage
        shares = {
            node: 100 * bad / (ok + bad)
            for node, (ok, bad) in counts.items()
            if ok + bad >= max(1, limit.request_volume)
        }
        if len(shares) >= limit.minimum_hosts:
            for node, each in shares.items():
                if each > limit.threshold and rng.random() * 100 < limit.enforcement:
                    yield node, "failure percentage"


class Ejections:
    """Who is ejected. ``counts``: how often, for which reason, and how often it would have been ("would eject: ...")
    or could not be ("kept: ...")."""

    def __init__(self, config: EjectionConfig, rng: random.Random, now: float) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self.out: dict[str, Node] = {}
        self.why: dict[str, str] = {}  # the latest reason of each that is out
        self._news: dict[Node, None] = {}  # each node once, so nothing grows while nobody sweeps
        self._rng = rng
        self._next = now + config.interval

    def heard(self, node: Node) -> None:
        """A breaker has something to say. From any thread; the next ``sweep`` attends to it."""
        self._news[node] = None

    def configure(self, config: EjectionConfig, now: float) -> None:
        """Take other settings. Who is out stays out until its time."""
        self.config = config
        self._next = min(self._next, now + config.interval)

    def forget(self, address: str) -> None:
        """The endpoint has left."""
        self.out.pop(address, None)
        self.why.pop(address, None)

    def reconnected(self, node: Node) -> None:
        """A new connection may be a new process: it is probed at once. Not one that comes and goes."""
        if node.breaker.times <= RECONNECTS:
            node.breaker.apply(Event.RECONNECTED)

    def sweep(self, nodes: Mapping[str, Node], now: float) -> bool:
        """Look at what was heard, whose time is over, and once an interval at everyone; returns whether anything has
        changed for a picker."""
        changed = False
        while self._news:
            node, _ = self._news.popitem()
            if nodes.get(node.endpoint.address) is node:
                changed |= self._attend(node, nodes, now)
        for node in self.out.values():
            if now >= node.breaker.until and node.breaker.apply(Event.TIME):
                changed = True
        if now >= self._next:
            self._next = now + self.config.interval
            changed |= self._review(nodes, now)
        return changed

    def _attend(self, node: Node, nodes: Mapping[str, Node], now: float) -> bool:
        breaker = node.breaker
        if breaker.state is State.CLOSED:
            if self.out.pop(node.endpoint.address, None):
                self.why.pop(node.endpoint.address)
                self.counts["returned"] += 1
                return True
            return bool(breaker.reason) and self._eject(node, breaker.reason, nodes, now)
        if breaker.state is State.OPEN:  # the probe failed
            self._lengthen(node, now)
            self.counts["probe failed"] += 1
        return True

    def _review(self, nodes: Mapping[str, Node], now: float) -> bool:
        counts = {node: node.counted() for node in nodes.values()}
        inside = {node: count for node, count in counts.items() if node.breaker.state is State.CLOSED}
        changed = False
        for node, reason in outliers(inside, self.config, self._rng):
            if node.breaker.state is State.CLOSED:  # the other algorithm may have had it
                changed |= self._eject(node, reason, nodes, now)
        for node in inside:
            if node.breaker.state is State.CLOSED:
                node.breaker.times = max(0, node.breaker.times - 1)
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
        self._lengthen(node, now)
        self.out[node.endpoint.address] = node
        self.why[node.endpoint.address] = f"{reason}; for {node.breaker.until - now:.0f} s"
        self.counts[f"ejected: {reason}"] += 1
        return True

    def _allowed(self, count: int) -> bool:
        most = max(1, int(count * self.config.max_percent / 100)) if self.config.max_percent else 0
        return count >= LEAST and len(self.out) + 1 <= most

    def _lengthen(self, node: Node, now: float) -> None:
        config, breaker = self.config, node.breaker
        breaker.times += 1
        longest = max(config.base_time, config.max_time)
        breaker.until = now + min(config.base_time * breaker.times, longest) * (1 + self._rng.random() * JITTER)

    def __repr__(self) -> str:
        return f"<Ejections {len(self.out)} out>"
