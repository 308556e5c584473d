"""The balancing policies by name. A new one needs a file with its picker, a line here, one in ``config/parse.py`` and
one in the proto, and a case in the distribution tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mesh.config.settings import BalancerConfig
from mesh.policy.balancing.pickers import (
    ConfiguredWeights,
    LeastLoadedOfN,
    Picker,
    PickFirst,
    PowerOfTwo,
    RoundRobin,
    WeightedRoundRobin,
)
from mesh.policy.balancing.ring_hash import RingHash
from mesh.policy.cluster.node import (
    IsBusier,
    Node,
    busier_by_in_flight,
    busier_by_peak_ewma,
    far_busier_by_in_flight,
    far_busier_by_peak_ewma,
)


class PickerBuildInfo(NamedTuple):
    """What a picker is built from.

    ``nodes``: the endpoints that may be called, at least one. ``previous``: the picker that is replaced.
    ``outstanding`` returns how many calls are in flight in all. ``total``: how many endpoints there are, including
    those that can't be called.
    """

    config: BalancerConfig
    nodes: Sequence[Node]
    rng: random.Random
    previous: Picker = Picker()
    outstanding: Callable[[], int] = lambda: 0
    total: int = 0


def build_picker(info: PickerBuildInfo) -> Picker:
    """The picker of the policy that the config names."""
    return BALANCERS[info.config.name](info)


def _round_robin(info: PickerBuildInfo) -> Picker:
    return (RoundRobin if _weights_are_equal(info.nodes) else WeightedRoundRobin)(info.nodes, info.rng)


def _least_loaded(is_busier: IsBusier, is_far_busier: IsBusier) -> Callable[[PickerBuildInfo], Picker]:
    def make(info: PickerBuildInfo) -> Picker:
        config = info.config
        if _weights_are_configured(info.nodes):
            return ConfiguredWeights(info.nodes, info.rng, is_far_busier)
        if config.choices == 2 and _weights_are_equal(info.nodes):
            return PowerOfTwo(info.nodes, is_busier, config.starvation)
        return LeastLoadedOfN(info.nodes, is_busier, config.starvation, config.choices)

    return make


def _pick_first(info: PickerBuildInfo) -> Picker:
    # The one in use stays, also when one before it recovers (gRPC's pick_first).
    in_use = info.previous.nodes[0] if isinstance(info.previous, PickFirst) else None
    nodes = info.rng.sample(info.nodes, len(info.nodes)) if info.config.shuffle else info.nodes
    return PickFirst(sorted(nodes, key=lambda node: node is not in_use))


def _ring_hash(info: PickerBuildInfo) -> Picker:
    config = info.config
    total = info.total or len(info.nodes)
    return RingHash(
        info.nodes, total, config.hash_header, config.min_ring, config.max_ring, config.load_factor, info.outstanding
    )


def _weights_are_configured(nodes: Sequence[Node]) -> bool:
    """Whether operators have given the endpoints different weights."""
    weight = nodes[0].endpoint.weight
    return any(node.endpoint.weight != weight for node in nodes)


def _weights_are_equal(nodes: Sequence[Node]) -> bool:
    weight = nodes[0].weight
    return all(node.weight == weight for node in nodes)


BALANCERS: dict[str, Callable[[PickerBuildInfo], Picker]] = {
    "least_request": _least_loaded(busier_by_in_flight, far_busier_by_in_flight),
    "peak_ewma": _least_loaded(busier_by_peak_ewma, far_busier_by_peak_ewma),
    "pick_first": _pick_first,
    "ring_hash": _ring_hash,
    "round_robin": _round_robin,
    "weighted_round_robin": _round_robin,
}
