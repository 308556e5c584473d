"""Which endpoint to take: immutable pickers over the endpoints that may be called, swapped whole on every change
(gRPC's).

A picker's grammar: ``pick(now, rng, tried)`` returns a node, one that is not in ``tried`` if there is one; None only
when the picker has no node at all. ``tried`` has the nodes of the call's attempts so far, in their order. The first
pick of a call is O(1) in endpoints.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from mesh.config import BalancerConfig
from mesh.policy.load import Node, busier


class Picker:
    """Over no endpoints at all: picks nothing.

    ``queue``: whether calls wait for a better picker rather than fail at once. ``error``: why there are none, for the
    caller to read. ``unresolved``: nobody could say who is there, so a call whose deadline comes meanwhile ends as
    UNAVAILABLE.
    """

    __slots__ = ("error", "nodes", "queue", "unresolved")

    def __init__(
        self, nodes: Sequence[Node] = (), *, queue: bool = True, error: str = "", unresolved: bool = False
    ) -> None:
        self.nodes = tuple(nodes)
        self.queue = queue
        self.error = error
        self.unresolved = unresolved

    def pick(self, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node | None:  # noqa: ARG002
        """The node that takes the next attempt."""
        return None

    def __repr__(self) -> str:
        name = type(self).__name__
        return (
            f"<{name} {len(self.nodes)} ready>" if self.nodes else f"<{name} {'queue' if self.queue else self.error}>"
        )


class RoundRobin(Picker):
    """Each in turn, from a random start so that many clients don't move in step."""

    __slots__ = ("_turn",)

    def __init__(self, nodes: Sequence[Node], rng: random.Random) -> None:
        super().__init__(nodes)
        # next() of a count is atomic: threads share the turn without a lock.
        self._turn = itertools.count(rng.randrange(len(nodes)))

    def pick(self, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        nodes = self.nodes
        node = nodes[next(self._turn) % len(nodes)]
        return node if node not in tried else _another(nodes, rng, tried)


class PowerOfTwo(Picker):
    """Two distinct nodes at random, the less busy one takes it (P2C: Mitzenmacher 2001; A48 and Finagle).

    Of two alike the first drawn is taken, which is chance again.
    """

    __slots__ = ()

    def pick(self, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        nodes = self.nodes
        count = len(nodes)
        draw = rng.random  # int(draw() * n) costs a quarter of randrange(n), and is as even for any n here
        first = nodes[int(draw() * count)]
        if count > 1:
            # Drawn among all but the last; landing on the first means the last, so the two differ.
            second = nodes[int(draw() * (count - 1))]
            if second is first:
                second = nodes[-1]
            if second not in tried and (first in tried or busier(first, second)):
                first = second
        return first if first not in tried else _another(nodes, rng, tried)


def _another(nodes: Sequence[Node], rng: random.Random, tried: Sequence[Node]) -> Node:
    """One at random that was not tried; when all were, the one tried longest ago (FIELD 6.9: begin anew, don't get
    stuck)."""
    fresh = [node for node in nodes if node not in tried]
    return rng.choice(fresh) if fresh else max(nodes, key=tried[::-1].index)


def picker_for(config: BalancerConfig, nodes: Sequence[Node], rng: random.Random) -> Picker:
    """A picker over the nodes that may be called (at least one), as the config names it."""
    return RoundRobin(nodes, rng) if config.name == "round_robin" else PowerOfTwo(nodes)
