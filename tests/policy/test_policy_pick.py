"""Which endpoint takes a call: one suite for every picker, and what peak EWMA calls busy."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from math import inf, sqrt

import pytest

from mesh.config import BalancerConfig, MethodPolicy
from mesh.model import CallSpec, Code, Endpoint, Outcome
from mesh.policy.balancers import Given, picker_for
from mesh.policy.load import Node, busier
from mesh.policy.pick import Picker, PowerOfTwo, RoundRobin

OK = Outcome(Code.OK)
CALL = CallSpec("/weft.test.v1.Test/Do", MethodPolicy(), inf)
BALANCERS = ["round_robin", "peak_ewma"]


def nodes_of(count: int) -> list[Node]:
    return [Node(Endpoint(f"e{index}"), contextlib.nullcontext()) for index in range(count)]


def picker_of(balancer: str, nodes: list[Node], seed: int = 1) -> Picker:
    return picker_for(Given(BalancerConfig(balancer), nodes, random.Random(seed)))


def picked(picker: Picker, now: float, rng: random.Random, tried: list[Node] | None = None) -> Node:
    node = picker.pick(CALL, now, rng, tried or [])
    assert node is not None
    return node


# -- every picker


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_alike_endpoints_get_alike_shares(balancer: str, count: int) -> None:
    # Each of N calls goes to an endpoint with p = 1/count: the count of one has a standard deviation of
    # sqrt(N p (1 - p)), and beyond 5 of them with a chance of 6e-7 (an endpoint and run), whatever the seed.
    calls = 400 * count
    picker, rng = picker_of(balancer, nodes_of(count)), random.Random(2)
    counts = Counter(picked(picker, 0.0, rng) for _ in range(calls))
    bound = 5 * sqrt(calls / count * (1 - 1 / count))
    assert len(counts) == count
    assert all(abs(each - calls / count) <= bound for each in counts.values())


@pytest.mark.parametrize("balancer", BALANCERS)
def test_many_clients_do_not_start_at_the_same_endpoint(balancer: str) -> None:
    # As above: 900 clients, 3 endpoints, 5 standard deviations are 5 sqrt(200) < 71.
    starts = Counter(
        picked(picker_of(balancer, nodes_of(3), seed), 0.0, random.Random(seed)).endpoint.address for seed in range(900)
    )
    assert all(abs(count - 300) <= 71 for count in starts.values())


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("count", [2, 3, 9])
def test_what_was_tried_is_left_out_while_there_is_another(balancer: str, count: int) -> None:
    nodes, rng = nodes_of(count), random.Random(3)
    picker = picker_of(balancer, nodes)
    for _ in range(100):
        tried: list[Node] = []
        for _ in nodes:
            tried.append(picked(picker, 0.0, rng, tried))
        assert set(tried) == set(nodes)
        assert picked(picker, 0.0, rng, tried) is tried[0]


@pytest.mark.parametrize("balancer", BALANCERS)
def test_those_not_tried_share_a_retry_alike(balancer: str) -> None:
    # 1,000 retries over 2: 5 standard deviations are 5 sqrt(250) < 80. Round robin passes the tried one's turn on.
    nodes, rng = nodes_of(3), random.Random(4)
    picker = picker_of(balancer, nodes)
    counts = Counter(picked(picker, 0.0, rng, [nodes[1]]) for _ in range(1000))
    assert set(counts) == {nodes[0], nodes[2]}
    assert all(abs(count - 500) <= 80 for count in counts.values())


@pytest.mark.parametrize("balancer", BALANCERS)
def test_what_was_tried_may_have_left(balancer: str) -> None:
    gone, *nodes = nodes_of(3)
    assert picked(picker_of(balancer, nodes), 0.0, random.Random(1), [gone]) in nodes


@pytest.mark.parametrize("balancer", BALANCERS)
def test_the_only_endpoint_is_picked_tried_or_not(balancer: str) -> None:
    nodes, rng = nodes_of(1), random.Random(1)
    picker = picker_of(balancer, nodes)
    assert picked(picker, 0.0, rng) is picked(picker, 0.0, rng, nodes) is nodes[0]


@pytest.mark.parametrize(("balancer", "name"), [("round_robin", "RoundRobin"), ("peak_ewma", "PowerOfTwo")])
def test_a_picker_says_what_it_is(balancer: str, name: str) -> None:
    assert repr(picker_of(balancer, nodes_of(2))) == f"<{name} 2 ready>"


def test_over_no_endpoints_nothing_is_picked() -> None:
    assert Picker().pick(CALL, 0.0, random.Random(1)) is None
    assert repr(Picker()) == "<Picker queue>"
    assert repr(Picker(queue=False, error="all down")) == "<Picker all down>"


# -- round robin


def test_round_robin_takes_each_in_turn() -> None:
    nodes, rng = nodes_of(4), random.Random(1)
    picker = RoundRobin(nodes, rng)
    first = [picked(picker, 0.0, rng) for _ in nodes]
    assert set(first) == set(nodes)
    assert [picked(picker, 0.0, rng) for _ in nodes] == first


# -- peak EWMA


class Simulated:
    """Endpoints that answer in their own time, with so many calls at once, in virtual time."""

    def __init__(self, *times: float, codes: dict[int, Code] | None = None, seed: int = 5) -> None:
        self.nodes = nodes_of(len(times))
        self.times = dict(zip(self.nodes, times, strict=True))
        self.codes = {self.nodes[index]: code for index, code in (codes or {}).items()}
        self.picker = PowerOfTwo(self.nodes)
        self.rng = random.Random(seed)
        self.counts: Counter[Node] = Counter()
        self.now = 0.0

    def run(self, calls: int, every: float, *, cancelled: bool = False) -> list[float]:
        """The share of each endpoint in ``calls``, one of which begins each ``every`` seconds."""
        self.counts.clear()
        running: list[tuple[float, float, Node]] = []
        for _ in range(calls):
            self.now += every
            for end, begin, node in [each for each in running if each[0] <= self.now]:
                code = self.codes.get(node, Code.OK)
                node.end(end, begin, Outcome(code, cancelled=cancelled and code != Code.OK))
            running = [each for each in running if each[0] > self.now]
            node = picked(self.picker, self.now, self.rng)
            node.start()
            self.counts[node] += 1
            running.append((self.now + self.times[node], self.now, node))
        for end, begin, node in running:
            node.end(end, begin, OK)
        assert all(node.in_flight == 0 for node in self.nodes)
        return [self.counts[node] / calls for node in self.nodes]


def test_a_slow_endpoint_is_avoided() -> None:
    world = Simulated(0.010, 0.010, 0.500)
    world.run(500, every=0.01)
    assert world.run(2000, every=0.01)[2] <= 0.05


def test_an_endpoint_that_has_recovered_comes_back() -> None:
    world = Simulated(0.010, 0.010, 0.500)
    world.run(500, every=0.01)
    world.times[world.nodes[2]] = 0.010
    world.run(5000, every=0.01)  # 50 s: five times the decay
    # A third of 2,000 calls, 5 standard deviations of it: 5 sqrt(2000 × 2/9) / 2000 < 0.053.
    assert world.run(2000, every=0.01)[2] == pytest.approx(1 / 3, abs=0.053)


def test_an_endpoint_that_fails_fast_gets_next_to_nothing_after_its_first_failures() -> None:
    world = Simulated(0.010, 0.010, 0.001, codes={2: Code.UNAVAILABLE})
    world.run(100, every=0.01)
    assert world.run(3000, every=0.01)[2] <= 0.02


def test_fast_and_failing_for_reasons_of_the_request_is_fast() -> None:
    world = Simulated(0.010, 0.010, 0.010, codes={2: Code.NOT_FOUND})
    world.run(100, every=0.02)
    assert world.run(2000, every=0.02)[2] == pytest.approx(1 / 3, abs=0.053)


def test_cancels_do_not_make_an_endpoint_look_slow_or_fast() -> None:
    world = Simulated(0.002, 0.002, 0.001, codes={2: Code.CANCELLED})
    assert world.run(2000, every=0.02, cancelled=True)[2] == pytest.approx(1 / 3, abs=0.053)
    assert world.nodes[2].cost == 0.0


def test_latencies_within_the_noise_do_not_starve_an_endpoint() -> None:
    world = Simulated(0.001, 0.001, 0.002)
    world.run(200, every=0.01)
    assert world.run(2000, every=0.01)[2] == pytest.approx(1 / 3, abs=0.053)


def test_the_two_choices_are_distinct() -> None:
    # Were one node drawn twice, it would take the call however busy: with two nodes, the busy one must get none.
    idle, busy = nodes_of(2)
    for _ in range(10):
        busy.start()
    rng = random.Random(6)
    for nodes in ([idle, busy], [busy, idle]):
        picker = PowerOfTwo(nodes)
        assert all(picked(picker, 0.0, rng) is idle for _ in range(200))


def test_every_pair_is_drawn_alike() -> None:
    # With one busy node of n, it is drawn into a pair but never taken; the others share alike. 6 nodes, 5,000 calls:
    # 5 standard deviations of a fifth are 5 sqrt(5000 × 0.16) < 142.
    busy, *others = nodes_of(6)
    busy.start()
    for position in (0, 3, 5):
        nodes = list(others)
        nodes.insert(position, busy)
        picker, rng = PowerOfTwo(nodes), random.Random(7)
        counts = Counter(picked(picker, 0.0, rng) for _ in range(5000))
        assert counts[busy] == 0
        assert all(abs(counts[node] - 1000) <= 142 for node in others)


# -- what is remembered of an endpoint


def test_a_peak_is_believed_at_once_and_forgotten_slowly() -> None:
    (node,) = nodes_of(1)
    for now, seconds in ((0.0, 0.1), (0.0, 1.0)):
        node.start()
        node.end(now, now - seconds, OK)
    assert node.cost == 1.0
    node.start()
    node.end(10.0, 10.0 - 0.1, OK)  # one decay time later: 1/e of the old, the rest of the new
    assert node.cost == pytest.approx(1 / 2.71828 + (1 - 1 / 2.71828) * 0.1, rel=1e-4)
    assert repr(node) == f"<Node e0 in_flight=0 cost={node.cost * 1000:.1f}ms>"


SLOW = {
    Code.UNAVAILABLE,
    Code.DEADLINE_EXCEEDED,
    Code.RESOURCE_EXHAUSTED,
    Code.INTERNAL,
    Code.UNKNOWN,
    Code.DATA_LOSS,
}


@pytest.mark.parametrize("code", list(Code))
def test_which_failures_count_as_slow(code: Code) -> None:
    node = Node(Endpoint("e0"), contextlib.nullcontext(), penalty=3.0)
    node.start()
    node.end(1.0, 1.0 - 0.25, Outcome(code))
    assert node.cost == pytest.approx(3.0 if code in SLOW else 0.25)


def test_a_failure_slower_than_the_penalty_counts_as_it_is() -> None:
    (node,) = nodes_of(1)
    node.start()
    node.end(1.0, 1.0 - 9.0, Outcome(Code.DEADLINE_EXCEEDED))
    assert node.cost == 9.0


@pytest.mark.parametrize(
    "outcome",
    [Outcome(Code.CANCELLED, cancelled=True), Outcome(Code.UNAVAILABLE, never_sent=True)],
    ids=["cancelled", "never sent"],
)
def test_what_says_nothing_of_the_endpoint_leaves_its_memory(outcome: Outcome) -> None:
    (node,) = nodes_of(1)
    node.start()
    node.end(5.0, 5.0 - 1.0, outcome)
    assert (node.in_flight, node.cost, node.stamp) == (0, 0.0, 0.0)


def test_answers_out_of_order_do_not_inflate_the_average() -> None:
    (node,) = nodes_of(1)
    for now in (100.0, 0.0, 50.0):
        node.start()
        node.end(now, now - 1.0, OK)
    assert (node.cost, node.stamp) == (1.0, 100.0)


def test_busier_weighs_latency_with_what_is_in_flight() -> None:
    fast, slow = nodes_of(2)
    for node, seconds in ((fast, 0.1), (slow, 0.4)):
        node.start()
        node.end(1.0, 1.0 - seconds, OK)
    assert busier(slow, fast)
    assert not busier(fast, slow)
    for _ in range(4):
        fast.start()
    assert busier(fast, slow)


@pytest.mark.parametrize("seconds", [0.1, 0.15])
def test_of_latencies_alike_the_one_with_more_in_flight_is_busier(seconds: float) -> None:
    one, other = nodes_of(2)
    for node, took in ((one, 0.1), (other, seconds)):
        node.start()
        node.end(1.0, 1.0 - took, OK)
    assert not busier(one, other)
    assert not busier(other, one)
    one.start()
    assert busier(one, other)


def test_an_old_peak_weighs_less() -> None:
    old, new = nodes_of(2)
    old.start()
    old.end(0.0, 0.0 - 5.0, OK)
    new.start()
    new.end(60.0, 60.0 - 0.1, OK)
    assert busier(new, old)
    assert not busier(old, new)
