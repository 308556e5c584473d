"""Each endpoint's share of the load, from its configured weight, its load reports, and how long it has been ready.

Weights are relative to a mean of 1. An endpoint with a weight of 0 or less gets no calls while another has more. Load
reports are used once two endpoints have them; endpoints without one get the mean of the others (A58). Slow start is
Envoy's: max(min weight, (age / window) ^ (1 / aggression)).

A weight from reports is capped at ``REPORTED_WEIGHT_CAP`` times their median: an endpoint that reports more than it can
do, by a bug or on purpose, must not attract all calls. Configured weights aren't capped.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

from mesh.config.settings import BalancerConfig, SlowStartConfig
from mesh.policy.cluster.node import Node

REPORTED_WEIGHT_CAP = 4.0
"""The largest weight from a load report, as a multiple of the median of such weights. For an even number of endpoints
the median is the lower of the two in the middle."""

UNWEIGHTED_POLICY = "pick_first"
"""The policy that ignores endpoints' weights. Slow start still applies."""

NEGLIGIBLE_WEIGHT = 1e-12
"""Endpoints with no more than this get no calls while another has more. It isn't 0, so that calls are shared as usual
when no endpoint has more."""

_ZERO_WEIGHT = 1e-18  # before normalization

SIGNIFICANT_CHANGE = 0.05
"""Smaller changes of weights don't rebuild the picker. A share of the weight."""


def update_weights(
    nodes: Sequence[Node], balancer: BalancerConfig, slow_start: SlowStartConfig, now: float, *, force: bool = False
) -> bool:
    """Recompute the weights of ``nodes``; apply them if they have changed enough, or with ``force``. Returns whether
    they were applied."""
    weights = _configured_weights(nodes, balancer)
    if balancer.reports.enabled:
        weights = _reported_weights(nodes, balancer, now) or weights
    if slow_start.window:
        weights = [
            max(_ZERO_WEIGHT, weight * _slow_start_factor(now - node.ready_at, slow_start))
            for node, weight in zip(nodes, weights, strict=True)
        ]
    mean = sum(weights) / len(weights)
    weights = [weight / mean for weight in weights]
    changed = force or any(
        abs(weight - node.weight) > SIGNIFICANT_CHANGE * node.weight
        for node, weight in zip(nodes, weights, strict=True)
    )
    if changed:
        for node, weight in zip(nodes, weights, strict=True):
            node.weight = weight
    return changed


def _configured_weights(nodes: Sequence[Node], balancer: BalancerConfig) -> list[float]:
    if balancer.name == UNWEIGHTED_POLICY:
        return [1.0] * len(nodes)
    return [node.endpoint.weight if node.endpoint.weight > 0 else _ZERO_WEIGHT for node in nodes]


def _reported_weights(nodes: Sequence[Node], balancer: BalancerConfig, now: float) -> list[float] | None:
    weights = [node.report.weight(now, balancer.reports) for node in nodes]
    known = [weight for weight in weights if weight]
    if len(known) < 2:
        return None
    median = median_low(known)
    capped = [
        min(weight / median, REPORTED_WEIGHT_CAP) for weight in weights
    ]  # of the median, or their sum might not be finite
    mean = sum(capped) / len(known)
    return [max(weight, _ZERO_WEIGHT) if reported else mean for weight, reported in zip(capped, weights, strict=True)]


def _slow_start_factor(age: float, slow_start: SlowStartConfig) -> float:
    grown: float = (min(max(age, 0.0), slow_start.window) / slow_start.window) ** (1 / slow_start.aggression)
    return max(slow_start.min_weight, grown)
