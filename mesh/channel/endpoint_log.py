"""Log lines about a channel's endpoints (added, removed, lost, returned, ejected) and its resolver.

The pool calls it on changes; calls never do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping

from mesh import lines
from mesh.discovery.resolver import Update
from mesh.model import Connectivity, Endpoint
from mesh.policy.cluster.cluster import Cluster

_LOG = logging.getLogger("mesh.channel")

LISTED = 3
"""Endpoints that a line names."""


def listed(addresses: Iterable[str]) -> str:
    """The first addresses by name, and how many more there are."""
    all_of_them = list(addresses)
    more = len(all_of_them) - LISTED
    text = ", ".join(all_of_them[:LISTED])
    return f"{text} and {more} more" if more > 0 else text


class EndpointLog:
    """One channel's log lines. Used on the pool's loop only."""

    def __init__(self, cluster: Cluster, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._clock = clock
        self._lost: dict[str, float] = {}
        self._ejected: frozenset[str] = frozenset()
        self._failing = ""

    def on_resolver_update(self, update: Update) -> None:
        """Log that the resolver fails, and that it works again."""
        name = self._cluster.name
        if update.endpoints is None:
            lines.warning(_LOG, "discovery", "%s: %s%s", name, update.error, self._kept())
            self._failing = update.error
        elif self._failing:
            lines.info(_LOG, "found", "%s: discovery works again; endpoints: %d", name, len(update.endpoints))
            self._failing = ""

    def _kept(self) -> str:
        known = len(self._cluster.nodes)
        return f"; keeping {known} known endpoint{'' if known == 1 else 's'}" if known else ""

    def on_endpoints(self, added: Iterable[Endpoint], removed: Iterable[str]) -> None:
        """Log which endpoints were added and removed."""
        for kind, addresses in (("added", [each.address for each in added]), ("removed", list(removed))):
            if addresses:
                self._log(kind, addresses)
        for address in self._lost.keys() - self._cluster.nodes.keys():
            self._lost.pop(address, None)

    def on_states(self, states: Iterable[tuple[str, Connectivity]], causes: Mapping[str, str]) -> None:
        """Log which endpoints were lost and which returned. A connection that is re-established at once isn't lost."""
        lost: list[str] = []
        unreachable: list[str] = []
        returned: list[str] = []
        for address, state in states:
            if state == Connectivity.TRANSIENT_FAILURE and address not in self._lost:
                self._lost[address] = self._clock()
                cause = causes.get(address)
                node = self._cluster.nodes.get(address)
                worked = node is not None and node.ready_at
                (lost if worked else unreachable).append(f"{address}: {cause}" if cause else address)
            elif state == Connectivity.READY and self._lost:
                since = self._lost.pop(address, None)
                if since is not None:
                    returned.append(f"{address} after {self._clock() - since:.1f} s")
        for kind, what in (("lost", lost), ("unreachable", unreachable), ("returned", returned)):
            if what:
                self._log(kind, what)

    def on_sweep(self) -> None:
        """Log which endpoints were ejected and which returned from ejection."""
        out = self._cluster.ejections.ejected
        if not out and not self._ejected:
            return
        now = frozenset(out)
        if now == self._ejected:
            return
        before, self._ejected = self._ejected, now
        why = self._cluster.ejections.reasons
        ejected = [f"{address}: {why[address]}" for address in sorted(now - before)]
        returned = [f"{address} from ejection" for address in sorted(before - now) if address in self._cluster.nodes]
        if ejected:
            self._log("ejected", ejected)
        if returned:
            self._log("returned", returned)

    def _log(self, kind: str, what: list[str]) -> None:
        endpoints = "endpoint" if len(what) == 1 else f"{len(what)} endpoints"
        lines.info(_LOG, kind, "%s: %s %s: %s", self._cluster.name, endpoints, kind, listed(what))
