"""Which endpoint to take: immutable pickers over the endpoints that may be called, swapped whole on every change
(gRPC's).

A picker's grammar: ``pick(call, now, rng, tried)`` returns a node, one that is not in ``tried`` if there is one; None
only when the picker has no node at all. ``tried`` has the nodes of the call's attempts so far, in their order. The
first pick of a call is O(1) in endpoints, O(log n) on a ring. Of the call only its metadata is read.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from math import inf

from mesh.model import CallSpec
from mesh.policy.cluster.node import Busier, Node, busier, far_busier

STEP = 0.6180339887498949
"""The golden ratio's fraction: its multiples, modulo 1, lie more evenly than chance would have them, in every order."""


class Picker:
    """Over no endpoints at all: picks nothing.

    ``queue``: whether calls wait for a better picker rather than fail at once. ``error``: why there are none, for the
    caller to read. ``unresolved``: nobody could say who is there, so a call whose deadline comes meanwhile ends as
    UNAVAILABLE. ``note``: what is unusual about it, for ``explain()`` ("panic: ...").
    """

    __slots__ = ("error", "nodes", "note", "queue", "unresolved")

    def __init__(
        self, nodes: Sequence[Node] = (), *, queue: bool = True, error: str = "", unresolved: bool = False
    ) -> None:
        self.nodes = tuple(nodes)
        self.queue = queue
        self.error = error
        self.unresolved = unresolved
        self.note = ""

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node | None:  # noqa: ARG002
        """The node that takes the next attempt."""
        return None

    def __repr__(self) -> str:
        name = type(self).__name__
        if not self.nodes:
            return f"<{name} {'queue' if self.queue else self.error}>"
        return f"<{name} {len(self.nodes)} ready{f' {self.note}' if self.note else ''}>"


class PickFirst(Picker):
    """The first of them, until it can't be called any more."""

    __slots__ = ()

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        node = self.nodes[0]
        return node if node not in tried else another(self.nodes, rng, tried)


class RoundRobin(Picker):
    """Each in turn, from a random start so that many clients don't move in step."""

    __slots__ = ("_turn",)

    def __init__(self, nodes: Sequence[Node], rng: random.Random) -> None:
        super().__init__(nodes)
        # next() of a count is atomic: threads share the turn without a lock.
        self._turn = itertools.count(rng.randrange(len(nodes)))

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        nodes = self.nodes
        node = nodes[next(self._turn) % len(nodes)]
        return node if node not in tried else another(nodes, rng, tried)


class Shares:
    """Draws nodes by their weights: O(1) a draw, O(n) to make (the alias method, Vose 1991)."""

    __slots__ = ("_nodes", "_others", "_whole")

    def __init__(self, nodes: Sequence[Node]) -> None:
        count, total = len(nodes), sum(node.weight for node in nodes)
        self._nodes = nodes
        self._whole = [node.weight / total * count for node in nodes]  # of a cell, how much is the node's own
        self._others = list(nodes)  # and whose the rest is
        poor = [index for index, share in enumerate(self._whole) if share < 1]
        rich = [index for index, share in enumerate(self._whole) if share >= 1]
        while poor and rich:
            giver, taker = rich[-1], poor.pop()
            self._others[taker] = nodes[giver]
            self._whole[giver] -= 1 - self._whole[taker]
            if self._whole[giver] < 1:
                poor.append(rich.pop())
        for index in (*poor, *rich):  # what rounding has left
            self._whole[index] = 1.0

    def at(self, point: float) -> Node:
        """The node at a point from 0 to 1 (exclusive): each has as much of that line as its weight gives it."""
        point *= len(self._nodes)
        cell = int(point)
        return self._nodes[cell] if point - cell < self._whole[cell] else self._others[cell]


class WeightedRoundRobin(Picker):
    """Each in turn as often as its weight gives it, spread evenly; from a random start."""

    __slots__ = ("_shares", "_start", "_turn")

    def __init__(self, nodes: Sequence[Node], rng: random.Random) -> None:
        super().__init__(nodes)
        self._shares = Shares(self.nodes)
        self._start = rng.random()
        self._turn = itertools.count()

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        node = self._shares.at((self._start + next(self._turn) * STEP) % 1.0)
        return node if node not in tried else another(self.nodes, rng, tried)


class Weighted(WeightedRoundRobin):
    """By weights that operators set, which give the shares whatever the concurrency: each in turn as
    ``WeightedRoundRobin``. Comparing loads cannot do that: of a light and a heavy endpoint the light one is idle more
    often, and is taken more often than its share (12.8 % instead of 5 % at 8 concurrent calls).

    A call leaves its turn only for an endpoint next to which its own is far worse: overloaded, or failing.
    """

    __slots__ = ("_far",)

    def __init__(self, nodes: Sequence[Node], rng: random.Random, far: Busier = far_busier) -> None:
        super().__init__(nodes, rng)
        self._far = far

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:
        node = super().pick(call, now, rng, tried)
        other = self._shares.at(rng.random())
        if other is node:
            # Any of the others: an endpoint of nearly all the weight would be drawn again and again.
            other = self.nodes[int(rng.random() * (len(self.nodes) - 1))]
            if other is node:
                other = self.nodes[-1]
        return other if self._far(node, other) and other not in tried else node


class PowerOfTwo(Picker):
    """Two distinct nodes at random, the less busy one takes it (P2C; docs/correctness.md, B2).

    Of two alike the first drawn is taken, which is chance again. The busier one is taken when it is idle and nothing
    was heard from it for ``starvation`` seconds before the other was (Kratos), so that what is remembered of it can be
    corrected.
    """

    __slots__ = ("_busier", "_starvation")

    def __init__(self, nodes: Sequence[Node], busier: Busier = busier, starvation: float = inf) -> None:
        super().__init__(nodes)
        self._busier = busier
        self._starvation = starvation

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        nodes = self.nodes
        count = len(nodes)
        draw = rng.random  # int(draw() * n) costs a quarter of randrange(n), and is as even for any n here
        first = nodes[int(draw() * count)]
        if count > 1:
            # Drawn among all but the last; landing on the first means the last, so the two differ.
            second = nodes[int(draw() * (count - 1))]
            if second is first:
                second = nodes[-1]
            if self._busier(first, second):
                first, second = second, first
            starved = second.stamp + self._starvation < first.stamp and not second.in_flight
            if (starved or first in tried) and second not in tried:
                return second
        return first if first not in tried else another(nodes, rng, tried)


class Choices(Picker):
    """As ``PowerOfTwo``, for more choices than two (A48's choiceCount), and for weights that were computed: from load
    reports, or by slow start. (Those that operators set give exact shares, see ``Weighted``.)

    The first is drawn as often as its weight gives it, and the others alike: of endpoints as busy as each other, for
    each unit of weight, the first is taken, so weights give the shares; a heavy one that is busier gives way to any.
    """

    __slots__ = ("_busier", "_choices", "_shares", "_starvation")

    def __init__(
        self, nodes: Sequence[Node], busier: Busier = busier, starvation: float = inf, choices: int = 2
    ) -> None:
        super().__init__(nodes)
        self._busier = busier
        self._starvation = starvation
        self._choices = choices if len(nodes) > 1 else 1
        self._shares = Shares(self.nodes)

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        nodes = self.nodes
        best = self._shares.at(rng.random())
        for _ in range(self._choices - 1):
            other = nodes[int(rng.random() * (len(nodes) - 1))]
            if other is best:
                other = nodes[-1]
            if other in tried:
                continue
            if best in tried or self._busier(best, other):
                best, other = other, best
            if other.stamp + self._starvation < best.stamp and not other.in_flight and other not in tried:
                return other
        return best if best not in tried else another(nodes, rng, tried)


class Probing(Picker):
    """Another picker, and nodes that come back from ejection: each of them takes one call first, to show what it is
    worth. Never a call's second attempt: the call has paid already."""

    __slots__ = ("_due", "_inner")

    def __init__(self, inner: Picker, due: Sequence[Node]) -> None:
        super().__init__(inner.nodes)
        self.note = inner.note
        self._inner = inner
        # next() of an iterator is atomic: among threads, exactly one gets each.
        self._due: Iterator[Node] = iter(tuple(due))

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node | None:
        if not tried:
            node = next(self._due, None)
            if node is not None and node.probe(now):  # else: a picker before this one, still in use, had it
                return node
        return self._inner.pick(call, now, rng, tried)


def another(nodes: Sequence[Node], rng: random.Random, tried: Sequence[Node]) -> Node:
    """One at random that was not tried; when all were, the one tried longest ago (docs/correctness.md, R7)."""
    fresh = [node for node in nodes if node not in tried]
    return rng.choice(fresh) if fresh else max(nodes, key=tried[::-1].index)
