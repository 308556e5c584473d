"""Which endpoints a client uses at all: its subset, the priority that serves, its own zone.

``subset`` is A68's rendezvous hashing: each client ranks the endpoints by a hash of its own seed and the address, and
uses the first so many of each priority. A change moves one endpoint of few clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from heapq import nsmallest

from mesh.config.settings import ZoneConfig
from mesh.model import Connectivity, Endpoint, Locality
from mesh.policy.cluster.node import Node

FAILOVER = 10.0
"""Seconds that calls wait for a priority that was never ready before a lower one is used; A56's."""

HEALTHY = 0.5
"""The share of a zone's endpoints that must be callable for its calls to stay there."""


class Subset:
    """The endpoints that this client uses. Remembers the hashes, so an update costs those that are new."""

    def __init__(self) -> None:
        self._seed = b""
        self._ranks: dict[str, bytes] = {}

    def of(self, endpoints: Mapping[str, Endpoint], size: int, seed: int) -> dict[str, Endpoint]:
        """``size`` of each priority's endpoints (0: all). ``seed`` is taken once, with the first that are left out."""
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


class Levels:
    """The priorities, and which of them serves (A56).

    The lowest number with an endpoint that is READY serves; a higher priority that comes back is used at once. One
    that was never ready is waited for, until all of its endpoints have failed or ``FAILOVER`` seconds are over: a
    client that starts doesn't begin with its last resort. Lower priorities stay connected, so a failover costs nothing.
    """

    def __init__(self) -> None:
        self.nodes: dict[int, list[Node]] = {}
        self._hopes: dict[int, float] = {}  # until when a level that was never ready is waited for
        self._seen: set[int] = set()

    def update(self, nodes: Mapping[str, Node], now: float) -> None:
        """The endpoints are these now."""
        levels: dict[int, list[Node]] = {}
        for node in nodes.values():
            levels.setdefault(node.endpoint.priority, []).append(node)
        self.nodes = {priority: levels[priority] for priority in sorted(levels)}
        self._seen &= set(levels)
        self._hopes = {each: self._hopes.get(each, now + FAILOVER) for each in levels if each not in self._seen}

    def serving(self, states: Mapping[str, Connectivity], now: float) -> tuple[int, list[Node]]:
        """The place of the priority that serves, from 0, and its READY nodes; none while all are waited for."""
        for place, (priority, nodes) in enumerate(self.nodes.items()):
            ready = [node for node in nodes if states[node.endpoint.address] == Connectivity.READY]
            if ready:
                self._seen.add(priority)
                self._hopes.pop(priority, None)
                return place, ready
            failed = all(states[node.endpoint.address] == Connectivity.TRANSIENT_FAILURE for node in nodes)
            if not failed and now < self._hopes.get(priority, now):
                break
        return 0, []

    def sweep(self, now: float) -> bool:
        """Whether a priority's time has run out."""
        over = [priority for priority, until in self._hopes.items() if now >= until]
        for priority in over:
            del self._hopes[priority]
        return bool(over) and len(self.nodes) > 1


def nearest(nodes: Sequence[Node], level: Sequence[Node], own: Locality, config: ZoneConfig) -> Sequence[Node]:
    """Of ``nodes``, which may be called, those of the client's own zone, else region, else all. ``level`` has those
    that may not be called, too.

    Calls stay near while there are endpoints enough there, most of which may be called; else the rest of the calls
    would go to too few (Envoy's zone aware routing, without its knowledge of where the other clients are).
    """
    if not config.enabled or len(level) < config.min_cluster:
        return nodes
    for near in (_zone, _region):
        here = near(own)
        inside = [node for node in nodes if near(node.endpoint.locality) == here]
        of_all = sum(near(node.endpoint.locality) == here for node in level)
        if here[-1] and len(inside) >= config.min_endpoints and len(inside) >= HEALTHY * of_all:
            return inside
    return nodes


def _zone(locality: Locality) -> tuple[str, ...]:
    return locality.region, locality.zone


def _region(locality: Locality) -> tuple[str, ...]:
    return (locality.region,)
