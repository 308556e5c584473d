"""What each endpoint's share of the load is to be: its own weight, what it reports, and how long it has been ready.

A weight of 0 or less gets nothing while another endpoint has one. Reports count once two endpoints have them; those
without get the mean of those with (A58). Slow start is Envoy's: max(least, (age / window) ^ (1 / aggression)).
"""

from __future__ import annotations

from collections.abc import Sequence

from mesh.config import BalancerConfig, SlowStartConfig
from mesh.policy.load import Node

UNWEIGHTED = frozenset({"round_robin", "pick_first"})
"""Policies to which endpoints' weights mean nothing, as in gRPC. Slow start still does."""

NOTHING = 1e-9
"""The weight of an endpoint that is to get nothing while there is another; it is not 0, so that among such endpoints
all is as usual."""

CHANGED = 0.05
"""A weight that moved by less is the same: a picker isn't made anew for it."""


def weigh(nodes: Sequence[Node], balancer: BalancerConfig, slow_start: SlowStartConfig, now: float) -> bool:
    """Weigh ``nodes`` anew; returns whether a weight has changed."""
    weights = _given(nodes, balancer)
    if balancer.reports.enabled:
        weights = _reported(nodes, balancer, now) or weights
    changed = False
    for node, weight in zip(nodes, weights, strict=True):
        if slow_start.window:
            weight = max(NOTHING, weight * _warmth(now - node.ready_at, slow_start))
        if abs(weight - node.weight) > CHANGED * node.weight:
            node.weight = weight
            changed = True
    return changed


def _given(nodes: Sequence[Node], balancer: BalancerConfig) -> list[float]:
    if balancer.name not in UNWEIGHTED:
        return [max(NOTHING, float(node.endpoint.weight)) for node in nodes]
    return [1.0] * len(nodes)


def _reported(nodes: Sequence[Node], balancer: BalancerConfig, now: float) -> list[float] | None:
    weights = [node.report.weight(now, balancer.reports) for node in nodes]
    known = [weight for weight in weights if weight]
    if len(known) < 2:
        return None
    mean = sum(known) / len(known)
    return [weight or mean for weight in weights]


def _warmth(age: float, slow_start: SlowStartConfig) -> float:
    grown: float = (min(max(age, 0.0), slow_start.window) / slow_start.window) ** (1 / slow_start.aggression)
    return max(slow_start.least, grown)
