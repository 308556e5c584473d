"""What an endpoint's weight is made of: its own, what it reports of its load, and how long it has been ready."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from math import inf, nan

import pytest

from mesh.codes import Code
from mesh.config.settings import BalancerConfig, LoadReportsConfig, MethodPolicy, ServiceConfig, SlowStartConfig
from mesh.model import CallSpec, Connectivity, Endpoint, Outcome
from mesh.policy.cluster.cluster import Cluster
from mesh.policy.cluster.load_report import LoadReport
from mesh.policy.cluster.node import Node
from tests.policy.driving import METHOD, cluster_of, set_states

CALL = CallSpec(METHOD, MethodPolicy(), inf)
REPORTS = LoadReportsConfig(enabled=True)
WEIGHTED = ServiceConfig(balancer=BalancerConfig("weighted_round_robin", reports=REPORTS))
STEADY = BalancerConfig("weighted_round_robin")


def shares(cluster: Cluster, calls: int = 3000) -> dict[str, float]:
    rng = random.Random(1)
    counts: Counter[str] = Counter()
    for _ in range(calls):
        node = cluster.picker.pick(CALL, cluster._swept_at, rng)
        assert node is not None
        counts[node.endpoint.address] += 1
    return {address: counts[address] / calls for address in cluster.nodes}


def of_weights(*weights: int, balancer: BalancerConfig = STEADY) -> Cluster:
    cluster = cluster_of(0, ServiceConfig(balancer=balancer))
    cluster.update(Endpoint(f"e{index}", weight=weight) for index, weight in enumerate(weights))
    set_states(cluster, Connectivity.READY)
    return cluster


# -- an endpoint's own weight


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1, 2), (0.25, 0.25, 0.5)),
        ((0, 1, 1), (0.0, 0.5, 0.5)),
        ((-5, 1, 1), (0.0, 0.5, 0.5)),
        ((0, 0, 0), (1 / 3, 1 / 3, 1 / 3)),
        ((-1, 0, -(2**40)), (1 / 3, 1 / 3, 1 / 3)),
        ((2**32, 1, 1), (1.0, 0.0, 0.0)),
        ((2**32, 2**32, 2**32), (1 / 3, 1 / 3, 1 / 3)),
    ],
)
@pytest.mark.parametrize("name", ["round_robin", "weighted_round_robin", "least_request", "peak_ewma"])
def test_weights_give_the_shares_whatever_they_are(
    weights: tuple[int, ...], expected: tuple[float, ...], name: str
) -> None:
    # 5 standard deviations of 3,000 calls are below 0.046.
    got = shares(of_weights(*weights, balancer=BalancerConfig(name)))
    assert list(got.values()) == pytest.approx(expected, abs=0.046)


def test_pick_first_knows_no_weights() -> None:
    assert shares(of_weights(1, 5, 9, balancer=BalancerConfig("pick_first")))["e0"] == 1.0


def test_one_without_weight_is_used_when_there_is_no_other() -> None:
    cluster = of_weights(0, 1)
    cluster.update_states([("e1", Connectivity.TRANSIENT_FAILURE)])
    assert shares(cluster) == {"e0": 1.0, "e1": 0.0}


def test_an_update_of_a_weight_moves_the_shares() -> None:
    cluster = of_weights(1, 1)
    cluster.update([Endpoint("e0", weight=3), Endpoint("e1", weight=1)])
    assert shares(cluster)["e0"] == pytest.approx(0.75, abs=0.01)


class Busy:
    """Calls through a cluster, so many at a time: as one ends, the next begins. Each takes a random time around its
    endpoint's mean, exponentially distributed, and ends with its endpoint's code."""

    def __init__(self, cluster: Cluster, means: dict[str, float], codes: dict[str, Code] | None = None) -> None:
        self.cluster = cluster
        self.now = 1000.0
        self._means = means
        self._codes = codes or {}
        self._rng = random.Random(7)
        self._turn = 0
        self._running: list[tuple[float, int, Node, float]] = []

    def run(self, calls: int, concurrency: int) -> dict[str, float]:
        """The endpoints' shares of so many calls."""
        counts: Counter[str] = Counter()
        for _ in range(calls):
            self._turn += 1
            node = self.cluster.picker.pick(CALL, self.now, self._rng)
            assert node is not None
            node.start()
            address = node.endpoint.address
            counts[address] += 1
            takes = self._rng.expovariate(1 / self._means.get(address, 0.01))
            heapq.heappush(self._running, (self.now + takes, self._turn, node, self.now))
            while len(self._running) >= concurrency:
                self.now, _, ended, started = heapq.heappop(self._running)
                ended.end(self.now, started, Outcome(self._codes.get(ended.endpoint.address, Code.OK)))
        return {address: counts[address] / calls for address in self.cluster.nodes}


@pytest.mark.parametrize("concurrency", [1, 8, 64])
@pytest.mark.parametrize("weights", [(5, 95), (5, 100, 100), (1, 1, 2, 4, 100), (1, 1000)])
@pytest.mark.parametrize("name", ["peak_ewma", "least_request", "round_robin", "weighted_round_robin"])
def test_weights_give_the_shares_at_any_concurrency(name: str, weights: tuple[int, ...], concurrency: int) -> None:
    # Endpoints take turns on the golden ratio's sequence, which is off by less than log2(n) calls for each of the at
    # most 2 parts of [0, 1) per cell that an endpoint has, so by less than 2 m log2(n) calls with m endpoints: 140 of
    # 10,000 for m = 5. Chance decides only whether another endpoint is far worse, which it isn't here but with a
    # probability below 1 in 1,000: 10 more.
    cluster = of_weights(*weights, balancer=BalancerConfig(name))
    got = Busy(cluster, {}).run(10_000, concurrency)
    assert list(got.values()) == pytest.approx([weight / sum(weights) for weight in weights], abs=0.015)


@pytest.mark.parametrize("name", ["peak_ewma", "least_request"])
def test_an_overloaded_endpoint_gets_less_than_its_weight(name: str) -> None:
    # A hundred times as slow as the other and half of the weight: with its share it would have nearly all of the 64
    # calls in flight. It keeps at most 4 times what the other has, and 8.
    cluster = of_weights(50, 51, balancer=BalancerConfig(name))
    world = Busy(cluster, {"e0": 1.0})
    world.run(1000, 64)
    assert world.run(5000, 64)["e0"] < 0.1


def test_a_failing_endpoint_gets_next_to_nothing_whatever_its_weight() -> None:
    # By default a failure counts as 5 s, which is far above 10 ms for the 2 s that it takes to decay.
    world = Busy(of_weights(95, 5, balancer=BalancerConfig("peak_ewma")), {}, {"e0": Code.UNAVAILABLE})
    assert world.run(5000, 8)["e0"] < 0.05


def test_a_retry_does_not_go_back_because_its_endpoint_is_far_better() -> None:
    cluster = of_weights(1, 2, balancer=BalancerConfig("least_request"))
    idle, full = cluster.nodes.values()
    for _ in range(100):
        full.start()
    for _ in range(50):
        assert cluster.picker.pick(CALL, 0.0, random.Random(1), [idle]) is full


# -- load reports


def reporting(now: float, **utilization: float) -> Cluster:
    """A cluster that has heard reports of 100 calls a second for each of 15 s until ``now``."""
    cluster = cluster_of(3, WEIGHTED)
    for at in range(16):
        for address, value in utilization.items():
            cluster.report(address, now - 15 + at, value, 100.0, 0.0)
    cluster.sweep(now)
    return cluster


def test_a_weight_is_what_an_endpoint_could_do_at_full_use() -> None:
    # A58: 100 calls a second at 80 % of what it has, against 100 at 20 %.
    got = shares(reporting(100.0, e0=0.8, e1=0.4, e2=0.2))
    assert list(got.values()) == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.01)


def said(*reports: tuple[float, float]) -> Cluster:
    """A cluster whose endpoints have reported this use and so many calls a second, for 15 s."""
    cluster = cluster_of(len(reports), WEIGHTED)
    for at in range(16):
        for address, (utilization, qps) in zip(cluster.nodes, reports, strict=True):
            cluster.report(address, 85.0 + at, utilization, qps, 0.0)
    cluster.sweep(100.0)
    return cluster


TRUE = (0.5, 100.0)


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([TRUE, TRUE, (0.000001, 100.0)], [1 / 6, 1 / 6, 4 / 6]),
        ([TRUE, TRUE, (0.5, 1e307)], [1 / 6, 1 / 6, 4 / 6]),
        ([TRUE, TRUE, (0.5, 1e308)], [1 / 3] * 3),
        ([TRUE, TRUE, (1e308, 1e308)], [1 / 3] * 3),
        ([TRUE, TRUE, (1e308, 100.0)], [1 / 2, 1 / 2, 0.0]),
        ([TRUE, TRUE, (5e-324, 5e-324)], [1 / 2.01, 1 / 2.01, 0.01 / 2.01]),
        ([TRUE, (0.000001, 100.0)], [1 / 5, 4 / 5]),
        ([TRUE, (1e308, 100.0)], [4 / 5, 1 / 5]),
        ([TRUE, (5e-324, 1e-310), (5e-324, 1e-310), (0.1, 1e307)], None),
        ([(0.5, 1e307)] * 3, [1 / 3] * 3),
        ([TRUE, (1e308, 1e-308), (1e308, 1e-308)], None),
        # what endpoints of different sizes report stands
        ([(0.8, 100.0), (0.2, 100.0), (0.4, 100.0)], [1 / 7, 4 / 7, 2 / 7]),
    ],
)
def test_no_report_gives_more_than_four_times_the_median(
    reports: list[tuple[float, float]], expected: list[float] | None
) -> None:
    cluster = said(*reports)
    weights = [node.weight for node in cluster.nodes.values()]
    assert all(0 < weight < len(weights) for weight in weights)
    assert sum(weights) == pytest.approx(len(weights))
    if expected is not None:
        assert list(shares(cluster).values()) == pytest.approx(expected, abs=0.01)


def test_configured_weights_are_not_capped() -> None:
    assert shares(of_weights(1, 1, 98))["e2"] == pytest.approx(0.98, abs=0.01)


def test_those_that_report_nothing_get_the_mean() -> None:
    got = shares(reporting(100.0, e0=0.6, e1=0.2))
    assert list(got.values()) == pytest.approx([1 / 6, 3 / 6, 2 / 6], abs=0.01)


def test_a_single_report_weighs_nothing() -> None:
    assert list(shares(reporting(100.0, e0=0.9)).values()) == pytest.approx([1 / 3] * 3, abs=0.01)


def test_failures_make_an_endpoint_lighter() -> None:
    report = LoadReport()
    for now in (0.0, 20.0):
        report.record(now, 0.5, 100.0, 50.0, REPORTS)
    assert report.weight(20.0, REPORTS) == pytest.approx(100 / (0.5 + 0.5))
    assert report.weight(20.0, LoadReportsConfig(True, error_penalty=0.0)) == pytest.approx(200.0)
    assert repr(report) == "<LoadReport utilization=0.5 qps=100>"


def test_reports_count_after_the_blackout_and_until_they_expire() -> None:
    report = LoadReport()
    assert report.weight(0.0, REPORTS) == 0.0
    report.record(100.0, 0.5, 10.0, 0.0, REPORTS)
    assert report.weight(109.9, REPORTS) == 0.0
    assert report.weight(110.0, REPORTS) == 20.0
    assert report.weight(279.9, REPORTS) == 20.0
    assert report.weight(280.0, REPORTS) == 0.0
    report.record(300.0, 0.5, 10.0, 0.0, REPORTS)
    assert report.weight(309.0, REPORTS) == 0.0, "after so long a silence the blackout begins anew"


def test_a_new_connection_begins_the_blackout_anew() -> None:
    cluster = reporting(100.0, e0=0.8, e1=0.2, e2=0.2)
    cluster.update_states([("e0", Connectivity.IDLE)])
    cluster.update_states([("e0", Connectivity.READY)])
    cluster.sweep(101.0)
    assert list(shares(cluster).values()) == pytest.approx([1 / 3] * 3, abs=0.01)


@pytest.mark.parametrize("wrong", [nan, inf, -inf, -1.0])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_report_that_cannot_be_is_none(wrong: float, place: int) -> None:
    utilization, qps, eps = (wrong if place == index else right for index, right in enumerate((0.5, 10.0, 0.0)))
    report = LoadReport()
    report.record(0.0, 0.5, 10.0, 0.0, REPORTS)
    report.record(5.0, utilization, qps, eps, REPORTS)
    assert report.weight(10.0, REPORTS) == 20.0


@pytest.mark.parametrize(("utilization", "qps"), [(0.0, 10.0), (0.5, 0.0)])
def test_a_report_of_nothing_is_none(utilization: float, qps: float) -> None:
    report = LoadReport()
    report.record(0.0, utilization, qps, 0.0, REPORTS)
    assert report.weight(50.0, REPORTS) == 0.0


def test_a_report_from_the_past_does_not_replace_a_newer_one() -> None:
    report = LoadReport()
    for now, utilization in ((0.0, 0.5), (20.0, 0.5), (10.0, 0.1)):
        report.record(now, utilization, 10.0, 0.0, REPORTS)
    assert report.weight(20.0, REPORTS) == 20.0


def test_reports_of_strangers_are_nothing() -> None:
    cluster = cluster_of(2, WEIGHTED)
    cluster.report("stranger", 0.0, 0.5, 10.0, 0.0)
    assert set(cluster.nodes) == {"e0", "e1"}


def test_only_policies_that_say_so_read_reports() -> None:
    assert cluster_of(2, WEIGHTED).reads_reports
    cluster = cluster_of(2)
    assert not cluster.reads_reports
    cluster.reconfigure(WEIGHTED, 1.0)
    assert cluster.reads_reports


@pytest.mark.parametrize("name", ["peak_ewma", "least_request"])
def test_reports_weigh_on_the_power_of_two_choices_too(name: str) -> None:
    cluster = cluster_of(3, ServiceConfig(balancer=BalancerConfig(name, reports=REPORTS)))
    for now in (0.0, 15.0):
        for address, utilization in (("e0", 0.8), ("e1", 0.4), ("e2", 0.2)):
            cluster.report(address, now, utilization, 100.0, 0.0)
    cluster.sweep(15.0)
    assert list(shares(cluster).values()) == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.046)


def test_weights_that_hardly_move_replace_no_picker() -> None:
    cluster = reporting(100.0, e0=0.8, e1=0.4, e2=0.2)
    for address, utilization in (("e0", 0.81), ("e1", 0.41), ("e2", 0.2)):
        cluster.report(address, 100.5, utilization, 100.0, 0.0)
    assert not cluster.sweep(101.5)
    cluster.report("e2", 102.0, 0.8, 100.0, 0.0)
    assert cluster.sweep(103.0)


# -- slow start


def warming(slow_start: SlowStartConfig, balancer: BalancerConfig = STEADY) -> Cluster:
    """Two that have long been ready, and one that was found READY at 1000.0."""
    cluster = cluster_of(2, ServiceConfig(balancer=balancer, slow_start=slow_start))
    cluster.sweep(1000.0)
    cluster.update([Endpoint("e0"), Endpoint("e1"), Endpoint("e2")])
    cluster.update_states([("e2", Connectivity.READY)])
    return cluster


@pytest.mark.parametrize(
    ("age", "aggression", "weight"),
    [
        *((0.0, 1.0, 0.1), (2.0, 1.0, 0.1), (5.0, 1.0, 0.25), (10.0, 1.0, 0.5), (20.0, 1.0, 1.0), (60.0, 1.0, 1.0)),
        *((5.0, 2.0, 0.5), (10.0, 0.5, 0.25)),
    ],
)
@pytest.mark.parametrize("name", ["weighted_round_robin", "round_robin", "peak_ewma", "least_request"])
def test_a_fresh_endpoint_gets_less_at_first(age: float, aggression: float, weight: float, name: str) -> None:
    cluster = warming(SlowStartConfig(20.0, aggression), BalancerConfig(name))
    cluster.sweep(1000.0 + age)
    assert shares(cluster)["e2"] == pytest.approx(weight / (2 + weight), abs=0.044)


def test_without_slow_start_it_gets_its_share_at_once() -> None:
    cluster = warming(SlowStartConfig())
    assert shares(cluster)["e2"] == pytest.approx(1 / 3, abs=0.01)


def test_when_all_are_fresh_they_share_alike() -> None:
    cluster = cluster_of(3, ServiceConfig(balancer=STEADY, slow_start=SlowStartConfig(20.0, min_weight=0.0)))
    assert list(shares(cluster).values()) == pytest.approx([1 / 3] * 3, abs=0.01)


def test_one_that_starts_from_nothing_is_used_when_there_is_no_other() -> None:
    cluster = warming(SlowStartConfig(20.0, min_weight=0.0))
    assert shares(cluster)["e2"] == 0.0
    cluster.update_states([("e0", Connectivity.IDLE), ("e1", Connectivity.IDLE)])
    assert shares(cluster)["e2"] == 1.0
