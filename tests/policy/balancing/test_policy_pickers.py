"""Which endpoint takes a call: one suite for every picker, and what peak EWMA calls busy."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from math import inf, sqrt

import pytest

from mesh.codes import Code
from mesh.config.settings import BalancerConfig, MethodPolicy
from mesh.model import CallSpec, Endpoint, Outcome
from mesh.policy.balancing.pickers import LeastLoadedOfN, Picker, PowerOfTwo, RoundRobin, WeightedRoundRobin
from mesh.policy.balancing.policies import BALANCERS, PickerBuildInfo, build_picker
from mesh.policy.cluster.node import Node, busier_by_in_flight, busier_by_peak_ewma

OK = Outcome(Code.OK)
CALL = CallSpec("/weft.test.v1.Test/Do", MethodPolicy(), inf)

# Every policy that picks, under the names that the tests show. A new one is a line here.
POLICIES = {
    "pick_first": BalancerConfig("pick_first", shuffle=True),
    "round_robin": BalancerConfig("round_robin"),
    "weighted_round_robin": BalancerConfig("weighted_round_robin"),
    "least_request": BalancerConfig("least_request", starvation=inf),
    "least_request of 4": BalancerConfig("least_request", starvation=inf, choices=4),
    "peak_ewma": BalancerConfig("peak_ewma"),
    "ring_hash": BalancerConfig("ring_hash", hash_header="user"),
    "ring_hash, bounded": BalancerConfig("ring_hash", hash_header="user", load_factor=1.25),
}
assert {config.name for config in POLICIES.values()} == set(BALANCERS)
BALANCERS_BY_SHARE = [name for name in POLICIES if name != "pick_first"]
WEIGHTED = [name for name in BALANCERS_BY_SHARE if name != "round_robin"]


def nodes_of(count: int) -> list[Node]:
    return [Node(Endpoint(f"e{index}"), contextlib.nullcontext(), decay=10.0) for index in range(count)]


def weighted(*weights: float) -> list[Node]:
    """Nodes of these weights, as the cluster weighs them: against a mean of 1."""
    nodes = nodes_of(len(weights))
    for node, weight in zip(nodes, weights, strict=True):
        node.weight = weight * len(weights) / sum(weights)
    return nodes


def picker_of(policy: str, nodes: list[Node], seed: int = 1) -> Picker:
    return build_picker(PickerBuildInfo(POLICIES[policy], nodes, random.Random(seed)))


def picked(picker: Picker, now: float, rng: random.Random, tried: list[Node] | None = None) -> Node:
    node = picker.pick(CALL, now, rng, tried or [])
    assert node is not None
    return node


def spread(policy: str, share: float, calls: int, nodes: int) -> float:
    """How far a count may be from its share of so many calls.

    Each goes to an endpoint with p = share: the count has a standard deviation of sqrt(N p (1 - p)), and is beyond 5 of
    them with a chance of 6e-7, whatever the seed. On a ring the share itself is the length of m of M arcs, whose
    standard deviation is share × sqrt((1 - share) / m); m is the endpoint's entries, its share of 1024.
    """
    chance = 5 * sqrt(calls * share * (1 - share))
    if not policy.startswith("ring_hash") or nodes == 1:
        return chance
    return chance + 5 * calls * share * sqrt((1 - share) / (share * 1024))


# -- every picker


@pytest.mark.parametrize("policy", BALANCERS_BY_SHARE)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_alike_endpoints_get_alike_shares(policy: str, count: int) -> None:
    calls = 400 * count
    picker, rng = picker_of(policy, nodes_of(count)), random.Random(2)
    counts = Counter(picked(picker, 0.0, rng) for _ in range(calls))
    assert len(counts) == count
    assert all(abs(each - 400) <= spread(policy, 1 / count, calls, count) for each in counts.values())


@pytest.mark.parametrize("policy", ["round_robin", "weighted_round_robin", "least_request", "peak_ewma"])
def test_shares_of_alike_endpoints_are_even_where_calls_take_time(policy: str) -> None:
    # 10,000 calls, 12 at once, over 5 endpoints. Taking turns is even to a call in five; of two the one with less in
    # flight evens out what chance does: the largest share is within 5 % of the mean.
    nodes, rng = nodes_of(5), random.Random(3)
    picker = picker_of(policy, nodes)
    counts: Counter[Node] = Counter()
    running: list[Node] = []
    for turn in range(10_000):
        node = picked(picker, turn * 0.001, rng)
        node.start()
        counts[node] += 1
        running.append(node)
        if len(running) > 12:
            running.pop(0).end(turn * 0.001, (turn - 12) * 0.001, OK)
    assert max(counts.values()) / 2000 <= 1.05


@pytest.mark.parametrize("policy", WEIGHTED)
@pytest.mark.parametrize("weights", [(1, 2, 5), (1, 1, 1, 17), (3, 3)])
def test_shares_follow_weights(policy: str, weights: tuple[int, ...]) -> None:
    nodes, rng = weighted(*weights), random.Random(4)
    picker = picker_of(policy, nodes)
    calls = 8000
    counts = Counter(picked(picker, 0.0, rng) for _ in range(calls))
    for node, weight in zip(nodes, weights, strict=True):
        share = weight / sum(weights)
        assert abs(counts[node] - calls * share) <= spread(policy, share, calls, len(nodes)), (node, counts)


@pytest.mark.parametrize("policy", ["least_request", "peak_ewma", "weighted_round_robin"])
def test_shares_follow_weights_where_calls_take_time(policy: str) -> None:
    # The share of a node that weighs 4 of 6 is 2/3: 5 standard deviations of 6,000 calls are 183, and comparing loads
    # only makes it evener.
    nodes, rng = weighted(1, 1, 4), random.Random(5)
    picker = picker_of(policy, nodes)
    counts: Counter[Node] = Counter()
    running: list[Node] = []
    for turn in range(6000):
        node = picked(picker, turn * 0.001, rng)
        node.start()
        counts[node] += 1
        running.append(node)
        if len(running) > 24:
            running.pop(0).end(turn * 0.001, (turn - 24) * 0.001, OK)
    assert abs(counts[nodes[2]] - 4000) <= 183


@pytest.mark.parametrize("policy", POLICIES)
def test_a_weight_of_next_to_nothing_and_one_of_nearly_all_break_nothing(policy: str) -> None:
    nodes, rng = weighted(1e-18, 1, 2**32), random.Random(6)
    picker = picker_of(policy, nodes)
    for _ in range(300):
        tried: list[Node] = []
        for _ in nodes:
            tried.append(picked(picker, 0.0, rng, tried))
        assert set(tried) == set(nodes)


@pytest.mark.parametrize("policy", POLICIES)
def test_many_clients_do_not_start_at_the_same_endpoint(policy: str) -> None:
    # 900 clients, 3 endpoints (docs/correctness.md, J1).
    starts = Counter(
        picked(picker_of(policy, nodes_of(3), seed), 0.0, random.Random(seed)).endpoint.address for seed in range(900)
    )
    assert all(abs(count - 300) <= spread(policy, 1 / 3, 900, 3) for count in starts.values())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", [2, 3, 9])
def test_what_was_tried_is_left_out_while_there_is_another(policy: str, count: int) -> None:
    nodes, rng = nodes_of(count), random.Random(3)
    picker = picker_of(policy, nodes)
    for _ in range(100):
        tried: list[Node] = []
        for _ in nodes:
            tried.append(picked(picker, 0.0, rng, tried))
        assert set(tried) == set(nodes)
        assert picked(picker, 0.0, rng, tried) is tried[0]


@pytest.mark.parametrize("policy", [name for name in POLICIES if "of 4" not in name])
def test_those_not_tried_share_a_retry_alike(policy: str) -> None:
    # 1,000 retries over 2. Round robin passes the tried one's turn on, pick_first draws one of the others.
    nodes, rng = nodes_of(3), random.Random(4)
    picker = picker_of(policy, nodes)
    first = picked(picker, 0.0, rng) if policy == "pick_first" else nodes[1]
    counts = Counter(picked(picker, 0.0, rng, [first]) for _ in range(1000))
    assert set(counts) == set(nodes) - {first}
    assert all(abs(count - 500) <= spread(policy, 1 / 2, 1000, 2) for count in counts.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_tried_may_have_left(policy: str) -> None:
    gone, *nodes = nodes_of(3)
    assert picked(picker_of(policy, nodes), 0.0, random.Random(1), [gone]) in nodes


@pytest.mark.parametrize("policy", POLICIES)
def test_the_only_endpoint_is_picked_tried_or_not(policy: str) -> None:
    nodes, rng = nodes_of(1), random.Random(1)
    picker = picker_of(policy, nodes)
    assert picked(picker, 0.0, rng) is picked(picker, 0.0, rng, nodes) is nodes[0]


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ("round_robin", "RoundRobin"),
        ("peak_ewma", "PowerOfTwo"),
        ("least_request of 4", "LeastLoadedOfN"),
        ("ring_hash", "RingHash"),
        ("pick_first", "PickFirst"),
    ],
)
def test_a_picker_says_what_it_is(policy: str, name: str) -> None:
    picker = picker_of(policy, nodes_of(2))
    assert repr(picker) == f"<{name} 2 ready>"
    picker.note = "panic"
    assert repr(picker) == f"<{name} 2 ready panic>"


def test_over_no_endpoints_nothing_is_picked() -> None:
    assert Picker().pick(CALL, 0.0, random.Random(1)) is None
    assert repr(Picker()) == "<Picker queue>"
    assert repr(Picker(queue=False, error="all down")) == "<Picker all down>"


# -- round robin, pick first


def test_round_robin_takes_each_in_turn() -> None:
    nodes, rng = nodes_of(4), random.Random(1)
    picker = RoundRobin(nodes, rng)
    first = [picked(picker, 0.0, rng) for _ in nodes]
    assert set(first) == set(nodes)
    assert [picked(picker, 0.0, rng) for _ in nodes] == first


def test_weighted_turns_are_spread_over_time() -> None:
    # Of a weight of 1 in 4, not four times in a row after twelve others: in any 40 turns it has 10, give or take 2.
    nodes, rng = weighted(1, 3), random.Random(1)
    picker = WeightedRoundRobin(nodes, rng)
    turns = [picked(picker, 0.0, rng) is nodes[0] for _ in range(400)]
    assert all(8 <= sum(turns[at : at + 40]) <= 12 for at in range(360))


def test_pick_first_keeps_what_is_in_use() -> None:
    nodes, rng = nodes_of(3), random.Random(1)
    config = BalancerConfig("pick_first")
    picker = build_picker(PickerBuildInfo(config, nodes[1:], rng))
    assert picked(picker, 0.0, rng) is nodes[1]
    picker = build_picker(PickerBuildInfo(config, nodes, rng, picker))
    assert picked(picker, 0.0, rng) is nodes[1]
    assert picked(build_picker(PickerBuildInfo(config, [nodes[0], nodes[2]], rng, picker)), 0.0, rng) is nodes[0]


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


@pytest.mark.parametrize("make", [PowerOfTwo, LeastLoadedOfN])
def test_an_idle_endpoint_of_which_nothing_was_heard_is_tried_once(make: type[PowerOfTwo | LeastLoadedOfN]) -> None:
    # The starvation guard: slow once, it would not be picked again before its average has decayed.
    slow, fast = nodes_of(2)
    for node, seconds in ((slow, 5.0), (fast, 0.001)):
        node.start()
        node.end(100.0, 100.0 - seconds, OK)
    picker, rng = make([slow, fast], busier_by_peak_ewma, 10.0), random.Random(1)
    assert all(picked(picker, 105.0, rng) is fast for _ in range(100))
    fast.start()
    fast.end(110.1, 110.0, OK)
    drawn = [picked(picker, 111.0, rng) for _ in range(20)]
    assert slow in drawn
    slow.start()
    assert all(picked(picker, 111.0, rng) is fast for _ in range(100)), "one call finds out; the others needn't wait"


def test_the_starvation_guard_does_not_send_a_retry_back() -> None:
    slow, fast = nodes_of(2)
    fast.start()
    fast.end(110.0, 109.9, OK)
    picker, rng = PowerOfTwo([slow, fast], busier_by_peak_ewma, 10.0), random.Random(1)
    assert all(picked(picker, 111.0, rng, [slow]) is fast for _ in range(50))


def test_after_a_quiet_time_nobody_was_starved() -> None:
    slow, fast = nodes_of(2)
    for node, seconds in ((slow, 5.0), (fast, 0.001)):
        node.start()
        node.end(100.0, 100.0 - seconds, OK)
    picker, rng = PowerOfTwo([slow, fast], busier_by_peak_ewma, 10.0), random.Random(1)
    assert all(picked(picker, 120.0, rng) is fast for _ in range(100))


def test_of_more_choices_the_least_busy_is_taken() -> None:
    # The idle one of 3 is missing from a first draw with 2/3, and from three that differ from what was best with 1/2
    # each: 1/12 together. 5 standard deviations of 1,000 calls are below 44.
    nodes, rng = nodes_of(3), random.Random(1)
    for node in nodes[1:]:
        node.start()
    picker = LeastLoadedOfN(nodes, busier_by_in_flight, choices=4)
    assert sum(picked(picker, 0.0, rng) is nodes[0] for _ in range(1000)) >= 916 - 44


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
    assert node.latency(20.0) == pytest.approx(node.cost / 2.71828, rel=1e-4)  # it decays unobserved


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
    assert busier_by_peak_ewma(slow, fast)
    assert not busier_by_peak_ewma(fast, slow)
    for _ in range(4):
        fast.start()
    assert busier_by_peak_ewma(fast, slow)


@pytest.mark.parametrize("seconds", [0.1, 0.15])
def test_of_latencies_alike_the_one_with_more_in_flight_is_busier(seconds: float) -> None:
    one, other = nodes_of(2)
    for node, took in ((one, 0.1), (other, seconds)):
        node.start()
        node.end(1.0, 1.0 - took, OK)
    assert not busier_by_peak_ewma(one, other)
    assert not busier_by_peak_ewma(other, one)
    one.start()
    assert busier_by_peak_ewma(one, other)


def test_an_old_peak_weighs_less() -> None:
    old, new = nodes_of(2)
    old.start()
    old.end(0.0, 0.0 - 5.0, OK)
    new.start()
    new.end(60.0, 60.0 - 0.1, OK)
    assert busier_by_peak_ewma(new, old)
    assert not busier_by_peak_ewma(old, new)


def test_a_race_lost_raises_the_average_and_never_lowers_it() -> None:
    # A hedge that another attempt beat: how slow it would have been isn't known, but that it was slower than this.
    (node,) = nodes_of(1)
    node.start()
    node.end_superseded(10.0, 9.5)
    assert (node.in_flight, node.cost, node.stamp) == (0, 0.5, 10.0)
    node.start()
    node.end_superseded(10.1, 10.0)
    assert node.cost == 0.5
    node.start()
    node.end_superseded(9.0, 5.0)
    assert (node.cost, node.stamp) == (4.0, 10.0)


def test_an_endpoint_that_loses_every_race_does_not_look_idle() -> None:
    fast, slow = nodes_of(2)
    picker, rng = PowerOfTwo([fast, slow]), random.Random(1)
    counts: Counter[Node] = Counter()
    for turn in range(1000):
        now = turn * 0.1
        first = picked(picker, now, rng)
        counts[first] += 1
        first.start()
        if first is fast:
            fast.end(now + 0.01, now, OK)
        else:  # hedged after 50 ms, and the hedge wins
            fast.start()
            fast.end(now + 0.06, now + 0.05, OK)
            slow.end_superseded(now + 0.06, now)
    assert counts[slow] <= 100
