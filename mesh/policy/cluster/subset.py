"""Which endpoints a client uses at all: its subset, the serving priority, its own zone.

``Subset`` is A68's random subsetting by rendezvous hashing: each client ranks the endpoints by a hash of its own seed
and the address, and uses the first N of each priority. Adding or removing an endpoint changes one endpoint in the
subsets of a few clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from heapq import nsmallest

from mesh.config.settings import ZoneConfig
from mesh.model import Connectivity, Endpoint, Locality
from mesh.policy.cluster.node import Node

FAILOVER_TIMEOUT = 10.0
"""How long calls wait for a priority that was never ready before a lower one is used; A56's. Seconds."""

HEALTHY_SHARE = 0.5
"""The share of a zone's endpoints that must be available for calls to stay in the zone."""


class Subset:
    """The endpoints that this client uses. Hashes are cached, so an update hashes only new endpoints."""

    def __init__(self) -> None:
        self._seed = b""
        self._ranks: dict[str, bytes] = {}

    def select(self, endpoints: Mapping[str, Endpoint], size: int, seed: int) -> dict[str, Endpoint]:
        """``size`` endpoints of each priority (0: all). ``seed`` is used from the first call that leaves some out."""
        if not size or len(endpoints) <= size:
            return dict(endpoints)
        self._seed = self._seed or seed.to_bytes(8, "big")
        known, key = self._ranks, self._seed
        ranks = {
            address: known.get(address) or blake2b(address.encode(), digest_size=8, key=key).digest()
            for address in endpoints
        }
        self._ranks = ranks
        levels: dict[int, list[str]] = {}
        for address, endpoint in endpoints.items():
            levels.setdefault(endpoint.priority, []).append(address)
        used = [address for level in levels.values() for address in nsmallest(size, level, key=ranks.__getitem__)]
        return {address: endpoints[address] for address in used}


class Priorities:
    """The priorities, and which of them is used (A56).

    The lowest number with a READY endpoint serves; a higher priority that recovers is used at once. One that was never
    ready is waited for until all of its endpoints have failed or ``FAILOVER_TIMEOUT`` seconds have passed, so that a
    client which starts doesn't begin with its last resort. Lower priorities stay connected, so failover is immediate.
    """

    def __init__(self) -> None:
        self.nodes: dict[int, list[Node]] = {}
        self._failover_deadlines: dict[int, float] = {}  # for priorities that were never ready
        self._were_ready: set[int] = set()

    def update(self, nodes: Mapping[str, Node], now: float) -> None:
        """Apply a new endpoint set."""
        levels: dict[int, list[Node]] = {}
        for node in nodes.values():
            levels.setdefault(node.endpoint.priority, []).append(node)
        self.nodes = {priority: levels[priority] for priority in sorted(levels)}
        self._were_ready &= set(levels)
        self._failover_deadlines = {
            each: self._failover_deadlines.get(each, now + FAILOVER_TIMEOUT)
            for each in levels
            if each not in self._were_ready
        }

    def serving(self, states: Mapping[str, Connectivity], now: float) -> tuple[int, list[Node]]:
        """The index of the priority to use, from 0, and its READY nodes; none while one is waited for."""
        for index, (priority, nodes) in enumerate(self.nodes.items()):
            ready = [node for node in nodes if states[node.endpoint.address] == Connectivity.READY]
            if ready:
                self._were_ready.add(priority)
                self._failover_deadlines.pop(priority, None)
                return index, ready
            all_failed = all(states[node.endpoint.address] == Connectivity.TRANSIENT_FAILURE for node in nodes)
            if not all_failed and now < self._failover_deadlines.get(priority, now):
                break
        return 0, []

    def sweep(self, now: float) -> bool:
        """Whether a failover deadline has passed."""
        passed = [priority for priority, until in self._failover_deadlines.items() if now >= until]
        for priority in passed:
            del self._failover_deadlines[priority]
        return bool(passed) and len(self.nodes) > 1


def in_own_locality(nodes: Sequence[Node], level: Sequence[Node], own: Locality, config: ZoneConfig) -> Sequence[Node]:
    """Of the available ``nodes`` those in the client's own zone, else those in its region, else all. ``level`` also has
    the priority's endpoints that aren't available.

    Calls stay local while enough of the local endpoints are available; otherwise those would be overloaded (Envoy's
    zone aware routing, without its knowledge of where the other clients are).
    """
    if not config.enabled or len(level) < config.min_cluster:
        return nodes
    for area in (_zone, _region):
        here = area(own)
        local = [node for node in nodes if area(node.endpoint.locality) == here]
        local_total = sum(area(node.endpoint.locality) == here for node in level)
        if here[-1] and len(local) >= config.min_endpoints and len(local) >= HEALTHY_SHARE * local_total:
            return local
    return nodes


def _zone(locality: Locality) -> tuple[str, ...]:
    return locality.region, locality.zone


def _region(locality: Locality) -> tuple[str, ...]:
    return (locality.region,)
