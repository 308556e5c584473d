"""What each endpoint's share of the load is to be: its own weight, what it reports, and how long it has been ready.

Weights are against a mean of 1. An endpoint's own weight of 0 or less gets nothing while another has one. Reports count
once two endpoints have them; those without get the mean of those with (A58). Slow start is Envoy's: max(least, (age /
window) ^ (1 / aggression)).

A weight from reports is at most ``MOST`` times their median: one endpoint that reports what it can't do, by a fault or
a lie, doesn't take all calls. Weights that somebody configured aren't capped.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

from mesh.config.settings import BalancerConfig, SlowStartConfig
from mesh.policy.cluster.node import Node

MOST = 4.0
"""The largest weight that follows from a load report, as a multiple of the median of such weights. Of an even number of
endpoints the lower of the two in the middle counts: of two, the lighter."""

UNWEIGHTED = "pick_first"
"""The policy to which endpoints' weights mean nothing. Slow start still does."""

NOTHING = 1e-12
"""Weights up to this are for endpoints that get nothing while there is another. They aren't 0, so that among
themselves all is as usual."""

_NONE = 1e-18  # before the mean is 1

CHANGED = 0.05
"""Weights that have all moved by less are the same: a picker isn't made anew for that."""


def weigh(
    nodes: Sequence[Node], balancer: BalancerConfig, slow_start: SlowStartConfig, now: float, *, exactly: bool = False
) -> bool:
    """Weigh ``nodes`` anew, if that changes anything (with ``exactly``: however little); returns whether it did."""
    weights = _given(nodes, balancer)
    if balancer.reports.enabled:
        weights = _reported(nodes, balancer, now) or weights
    if slow_start.window:
        weights = [
            max(_NONE, weight * _warmth(now - node.ready_at, slow_start))
            for node, weight in zip(nodes, weights, strict=True)
        ]
    mean = sum(weights) / len(weights)
    weights = [weight / mean for weight in weights]
    changed = exactly or any(
        abs(weight - node.weight) > CHANGED * node.weight for node, weight in zip(nodes, weights, strict=True)
    )
    if changed:
        for node, weight in zip(nodes, weights, strict=True):
            node.weight = weight
    return changed


def _given(nodes: Sequence[Node], balancer: BalancerConfig) -> list[float]:
    if balancer.name == UNWEIGHTED:
        return [1.0] * len(nodes)
    return [node.endpoint.weight if node.endpoint.weight > 0 else _NONE for node in nodes]


def _reported(nodes: Sequence[Node], balancer: BalancerConfig, now: float) -> list[float] | None:
    weights = [node.report.weight(now, balancer.reports) for node in nodes]
    known = [weight for weight in weights if weight]
    if len(known) < 2:
        return None
    median = median_low(known)
    capped = [min(weight / median, MOST) for weight in weights]  # of the median, or their sum might not be finite
    mean = sum(capped) / len(known)
    return [max(weight, _NONE) if reported else mean for weight, reported in zip(capped, weights, strict=True)]


def _warmth(age: float, slow_start: SlowStartConfig) -> float:
    grown: float = (min(max(age, 0.0), slow_start.window) / slow_start.window) ** (1 / slow_start.aggression)
    return max(slow_start.least, grown)
