"""Pickers: each chooses an endpoint for an attempt. They are immutable and replaced whole on every change, as in gRPC.

``pick(call, now, rng, tried)`` returns a node that isn't in ``tried``, if there is one; None only when the picker has
no nodes at all. ``tried`` has the nodes of the call's attempts so far, in order. A call's first pick is O(1) in
endpoints, O(log n) on a ring. Of the call only the metadata is read.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from math import inf

from mesh.model import CallSpec
from mesh.policy.cluster.node import IsBusier, Node, busier_by_peak_ewma, far_busier_by_peak_ewma

GOLDEN_RATIO = 0.6180339887498949
"""The golden ratio's fractional part. Its multiples modulo 1 are spread evenly, and so is every run of them."""


class Picker:
    """The base, and the picker without endpoints, which picks nothing.

    ``queue``: calls wait for another picker instead of failing at once. ``error``: why there are no endpoints.
    ``unresolved``: the resolver has returned nothing yet, so a call whose deadline passes fails as UNAVAILABLE.
    ``note``: what is unusual about its picks, for ``explain()`` ("panic: ...").
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
        """The node for the next attempt."""
        return None

    def __repr__(self) -> str:
        name = type(self).__name__
        if not self.nodes:
            return f"<{name} {'queue' if self.queue else self.error}>"
        return f"<{name} {len(self.nodes)} ready{f' {self.note}' if self.note else ''}>"


class PickFirst(Picker):
    """The first endpoint, for as long as it can be called."""

    __slots__ = ()

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        node = self.nodes[0]
        return node if node not in tried else untried(self.nodes, rng, tried)


class RoundRobin(Picker):
    """Each in turn, from a random start, so that many clients don't pick in lockstep."""

    __slots__ = ("_turn",)

    def __init__(self, nodes: Sequence[Node], rng: random.Random) -> None:
        super().__init__(nodes)
        # next() of a count is atomic: threads share it without a lock.
        self._turn = itertools.count(rng.randrange(len(nodes)))

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        nodes = self.nodes
        node = nodes[next(self._turn) % len(nodes)]
        return node if node not in tried else untried(nodes, rng, tried)


class AliasSampler:
    """Samples nodes by weight: O(1) per sample, O(n) to build (the alias method, Vose 1991)."""

    __slots__ = ("_aliases", "_nodes", "_own_share")

    def __init__(self, nodes: Sequence[Node]) -> None:
        count, total = len(nodes), sum(node.weight for node in nodes)
        self._nodes = nodes
        self._own_share = [node.weight / total * count for node in nodes]  # of its cell
        self._aliases = list(nodes)  # whose the rest of each cell is
        underfull = [index for index, share in enumerate(self._own_share) if share < 1]
        overfull = [index for index, share in enumerate(self._own_share) if share >= 1]
        while underfull and overfull:
            giver, taker = overfull[-1], underfull.pop()
            self._aliases[taker] = nodes[giver]
            self._own_share[giver] -= 1 - self._own_share[taker]
            if self._own_share[giver] < 1:
                underfull.append(overfull.pop())
        for index in (*underfull, *overfull):  # left over from rounding
            self._own_share[index] = 1.0

    def sample(self, point: float) -> Node:
        """The node at a point from 0 to 1 (exclusive): each has a part of that interval in proportion to its weight."""
        point *= len(self._nodes)
        cell = int(point)
        return self._nodes[cell] if point - cell < self._own_share[cell] else self._aliases[cell]


class WeightedRoundRobin(Picker):
    """Each in turn, in proportion to its weight, evenly interleaved; from a random start."""

    __slots__ = ("_sampler", "_start", "_turn")

    def __init__(self, nodes: Sequence[Node], rng: random.Random) -> None:
        super().__init__(nodes)
        self._sampler = AliasSampler(self.nodes)
        self._start = rng.random()
        self._turn = itertools.count()

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        node = self._sampler.sample((self._start + next(self._turn) * GOLDEN_RATIO) % 1.0)
        return node if node not in tried else untried(self.nodes, rng, tried)


class ConfiguredWeights(WeightedRoundRobin):
    """For weights that operators set: exact shares at any concurrency, by ``WeightedRoundRobin``. Comparing loads can't
    give them: of a light and a heavy endpoint the light one is idle more often, and would get more than its share
    (12.8 % instead of 5 % at 8 concurrent calls).

    A call goes to a randomly chosen other endpoint only when its own is overloaded or failing, compared to that one.
    """

    __slots__ = ("_is_far_busier",)

    def __init__(
        self, nodes: Sequence[Node], rng: random.Random, is_far_busier: IsBusier = far_busier_by_peak_ewma
    ) -> None:
        super().__init__(nodes, rng)
        self._is_far_busier = is_far_busier

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:
        node = super().pick(call, now, rng, tried)
        other = self._sampler.sample(rng.random())
        if other is node:
            # Any of the others: an endpoint with nearly all of the weight would be sampled again and again.
            other = self.nodes[int(rng.random() * (len(self.nodes) - 1))]
            if other is node:
                other = self.nodes[-1]
        return other if self._is_far_busier(node, other) and other not in tried else node


class PowerOfTwo(Picker):
    """The less busy of two distinct random nodes (power of two choices; docs/correctness.md, B2).

    Of two equally busy nodes the first is picked, which is random too. The busier one is picked when it is idle and was
    last observed ``starvation`` seconds before the other (Kratos), so that its outdated average gets corrected.
    """

    __slots__ = ("_is_busier", "_starvation")

    def __init__(
        self, nodes: Sequence[Node], is_busier: IsBusier = busier_by_peak_ewma, starvation: float = inf
    ) -> None:
        super().__init__(nodes)
        self._is_busier = is_busier
        self._starvation = starvation

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        nodes = self.nodes
        count = len(nodes)
        draw = rng.random  # int(draw() * n) costs a quarter of randrange(n), and is as uniform for any n here
        first = nodes[int(draw() * count)]
        if count > 1:
            # Drawn from all but the last; drawing the first again means the last, so the two differ.
            second = nodes[int(draw() * (count - 1))]
            if second is first:
                second = nodes[-1]
            if self._is_busier(first, second):
                first, second = second, first
            starved = second.stamp + self._starvation < first.stamp and not second.in_flight
            if (starved or first in tried) and second not in tried:
                return second
        return first if first not in tried else untried(nodes, rng, tried)


class LeastLoadedOfN(Picker):
    """``PowerOfTwo`` for more than two choices (A48's choiceCount), and for computed weights, from load reports or slow
    start. (Weights that operators set give exact shares: ``ConfiguredWeights``.)

    The first node is sampled by weight, the others uniformly. Of nodes that are equally busy per unit of weight the
    first is picked, so the weights give the shares; a heavy one that is busier loses to any other.
    """

    __slots__ = ("_choices", "_is_busier", "_sampler", "_starvation")

    def __init__(
        self,
        nodes: Sequence[Node],
        is_busier: IsBusier = busier_by_peak_ewma,
        starvation: float = inf,
        choices: int = 2,
    ) -> None:
        super().__init__(nodes)
        self._is_busier = is_busier
        self._starvation = starvation
        self._choices = choices if len(nodes) > 1 else 1
        self._sampler = AliasSampler(self.nodes)

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        nodes = self.nodes
        best = self._sampler.sample(rng.random())
        for _ in range(self._choices - 1):
            other = nodes[int(rng.random() * (len(nodes) - 1))]
            if other is best:
                other = nodes[-1]
            if other in tried:
                continue
            if best in tried or self._is_busier(best, other):
                best, other = other, best
            if other.stamp + self._starvation < best.stamp and not other.in_flight and other not in tried:
                return other
        return best if best not in tried else untried(nodes, rng, tried)


class ProbingPicker(Picker):
    """Another picker, and ejected nodes whose breaker is HALF_OPEN: each of them gets one call as a probe. It is never
    a call's second attempt, so that a call risks at most one probe."""

    __slots__ = ("_inner", "_probes")

    def __init__(self, inner: Picker, probes: Sequence[Node]) -> None:
        super().__init__(inner.nodes)
        self.note = inner.note
        self._inner = inner
        # next() of an iterator is atomic: exactly one thread gets each node.
        self._probes: Iterator[Node] = iter(tuple(probes))

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node | None:
        if not tried:
            node = next(self._probes, None)
            if node is not None and node.probe(now):  # else: a previous picker that is still in use has sent it
                return node
        return self._inner.pick(call, now, rng, tried)


def untried(nodes: Sequence[Node], rng: random.Random, tried: Sequence[Node]) -> Node:
    """A random node that wasn't tried; when all were, the one tried longest ago (docs/correctness.md, R7)."""
    fresh = [node for node in nodes if node not in tried]
    return rng.choice(fresh) if fresh else max(nodes, key=tried[::-1].index)
