"""The balancing policies by name. A new one is a file with its picker, a line here, one in ``config/parse.py`` and one
in the proto, and a case in the distribution suite."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mesh.config.settings import BalancerConfig
from mesh.policy.balancing.pickers import (
    Choices,
    Picker,
    PickFirst,
    PowerOfTwo,
    RoundRobin,
    Weighted,
    WeightedRoundRobin,
)
from mesh.policy.balancing.ring_hash import Ring
from mesh.policy.cluster.node import Busier, Node, busier, far_busier, far_fuller, fuller


class Given(NamedTuple):
    """What a picker is made of.

    ``nodes`` are those that may be called, at least one; ``before`` is the picker that is replaced; ``outstanding``
    tells how many calls are in flight in all; ``of`` is how many endpoints there are with those that may not be called.
    """

    config: BalancerConfig
    nodes: Sequence[Node]
    rng: random.Random
    before: Picker = Picker()
    outstanding: Callable[[], int] = lambda: 0
    of: int = 0


def picker_for(given: Given) -> Picker:
    """A picker as the config names it."""
    return BALANCERS[given.config.name](given)


def _in_turn(given: Given) -> Picker:
    return (RoundRobin if _alike(given.nodes) else WeightedRoundRobin)(given.nodes, given.rng)


def _by(compare: Busier, far: Busier) -> Callable[[Given], Picker]:
    def make(given: Given) -> Picker:
        config = given.config
        if _configured(given.nodes):
            return Weighted(given.nodes, given.rng, far)
        if config.choices == 2 and _alike(given.nodes):
            return PowerOfTwo(given.nodes, compare, config.starvation)
        return Choices(given.nodes, compare, config.starvation, config.choices)

    return make


def _first(given: Given) -> Picker:
    # The one in use stays in use, also when one before it comes back (gRPC's pick_first).
    in_use = given.before.nodes[0] if isinstance(given.before, PickFirst) else None
    nodes = given.rng.sample(given.nodes, len(given.nodes)) if given.config.shuffle else given.nodes
    return PickFirst(sorted(nodes, key=lambda node: node is not in_use))


def _on_a_ring(given: Given) -> Picker:
    config = given.config
    of = given.of or len(given.nodes)
    return Ring(
        given.nodes, of, config.hash_header, config.min_ring, config.max_ring, config.load_factor, given.outstanding
    )


def _configured(nodes: Sequence[Node]) -> bool:
    """Whether the weights that operators gave the endpoints differ."""
    weight = nodes[0].endpoint.weight
    return any(node.endpoint.weight != weight for node in nodes)


def _alike(nodes: Sequence[Node]) -> bool:
    weight = nodes[0].weight
    return all(node.weight == weight for node in nodes)


BALANCERS: dict[str, Callable[[Given], Picker]] = {
    "least_request": _by(fuller, far_fuller),
    "peak_ewma": _by(busier, far_busier),
    "pick_first": _first,
    "ring_hash": _on_a_ring,
    "round_robin": _in_turn,
    "weighted_round_robin": _in_turn,
}
