"""Endpoints that answer badly: when they are left out, for how long, how many at most, and how they come back."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from math import inf

import pytest

from mesh.codes import Code
from mesh.config.settings import (
    BalancerConfig,
    FailurePercentageConfig,
    HedgingPolicy,
    MethodPolicy,
    OutlierDetectionConfig,
    RetryPolicy,
    ServiceConfig,
    SuccessRateConfig,
)
from mesh.model import CallSpec, Connectivity, Endpoint, Outcome
from mesh.observe import explain
from mesh.policy.cluster.breaker import FAILURE_CODES, Breaker, Event, State
from mesh.policy.cluster.cluster import Cluster
from mesh.policy.cluster.node import Node
from mesh.policy.cluster.outlier import outliers
from tests.policy.driving import METHOD, Driven, cluster_of, set_states

OK = Outcome(Code.OK)
FAILED = Outcome(Code.UNAVAILABLE)
CALL = CallSpec(METHOD, MethodPolicy(), inf)
ROUND_ROBIN = BalancerConfig("round_robin")
IN_A_ROW = OutlierDetectionConfig(success_rate=None, failure_percentage=None)


def cluster_with(ejection: OutlierDetectionConfig = IN_A_ROW, count: int = 5, now: float = 0.0) -> Cluster:
    return cluster_of(count, ServiceConfig(balancer=ROUND_ROBIN, outlier_detection=ejection), now=now)


def answers(node: Node, *outcomes: Outcome, now: float = 1.0) -> None:
    for outcome in outcomes:
        node.start()
        node.end(now, now - 0.01, outcome)


def fails(cluster: Cluster, *addresses: str, times: int = 5, now: float = 1.0) -> None:
    for address in addresses:
        answers(cluster.nodes[address], *[FAILED] * times, now=now)


def picks(cluster: Cluster, now: float = 1.0, calls: int = 60) -> set[str]:
    """Where calls go."""
    return {address_of(cluster, now) for _ in range(calls)}


def address_of(cluster: Cluster, now: float, tried: Iterable[Node] = ()) -> str:
    node = cluster.picker.pick(CALL, now, random.Random(1), list(tried))
    assert node is not None
    return node.endpoint.address


# -- the breaker


# What each event makes of each state; where a state is missing, the event changes nothing.
MOVES = {
    Event.TRIP: {State.CLOSED: State.OPEN},
    Event.EXPIRED: {State.OPEN: State.HALF_OPEN},
    Event.RECONNECTED: {State.OPEN: State.HALF_OPEN},
    Event.PROBE: {State.HALF_OPEN: State.PROBING},
    Event.PROBE_SUCCEEDED: {State.PROBING: State.CLOSED},
    Event.PROBE_FAILED: {State.PROBING: State.OPEN},
    Event.PROBE_IGNORED: {State.PROBING: State.HALF_OPEN},
}


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", list(Event))
def test_each_event_moves_a_breaker_in_the_states_that_it_is_for(state: State, event: Event) -> None:
    breaker = Breaker(OutlierDetectionConfig())
    breaker.state = state
    after = MOVES[event].get(state, state)
    assert breaker.apply(event) == (after is not state)
    assert breaker.state is after
    assert repr(breaker) == f"<Breaker {after.value}>"


@pytest.mark.parametrize("code", list(Code))
def test_which_failures_count_against_an_endpoint(code: Code) -> None:
    against = {Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS}
    assert (code in FAILURE_CODES) == (code in against)
    cluster = cluster_with()
    answers(cluster.nodes["e0"], *[Outcome(code)] * 5)
    assert cluster.sweep(1.0) == (code in against)


@pytest.mark.parametrize(
    ("config", "outcomes", "reason"),
    [
        (OutlierDetectionConfig(consecutive_failures=3), "UUU", "consecutive failures"),
        (OutlierDetectionConfig(consecutive_failures=3), "UUOUU", ""),
        (OutlierDetectionConfig(consecutive_failures=0), "UUUUUUUUUU", ""),
        (
            OutlierDetectionConfig(consecutive_failures=9, consecutive_gateway_errors=3),
            "UDU",
            "consecutive gateway errors",
        ),
        (OutlierDetectionConfig(consecutive_failures=9, consecutive_gateway_errors=3), "UUIU", ""),
        (OutlierDetectionConfig(consecutive_failures=9, consecutive_timeouts=2), "DD", "consecutive timeouts"),
        (OutlierDetectionConfig(consecutive_failures=9, consecutive_timeouts=2), "DUD", ""),
    ],
)
def test_failures_in_a_row(config: OutlierDetectionConfig, outcomes: str, reason: str) -> None:
    codes = {"U": Code.UNAVAILABLE, "D": Code.DEADLINE_EXCEEDED, "I": Code.INTERNAL, "O": Code.OK}
    cluster = cluster_with(replace(config, success_rate=None, failure_percentage=None))
    answers(cluster.nodes["e0"], *[Outcome(codes[letter]) for letter in outcomes])
    assert cluster.sweep(1.0) == bool(reason)
    assert dict(cluster.ejections.counts) == ({f"ejected: {reason}": 1} if reason else {})


def test_three_timeouts_in_a_row_are_enough_by_default() -> None:
    # Each costs a caller its whole timeout; other failures come at once, and may be five.
    cluster = cluster_with(OutlierDetectionConfig())
    timeout = Outcome(Code.DEADLINE_EXCEEDED)
    answers(cluster.nodes["e0"], timeout, timeout, OK, timeout, timeout)
    assert not cluster.sweep(1.0)
    answers(cluster.nodes["e0"], timeout)
    assert cluster.sweep(1.0)
    assert dict(cluster.ejections.counts) == {"ejected: consecutive timeouts": 1}


def test_streams_that_last_to_their_deadline_count_neither_way() -> None:
    cluster = cluster_with(OutlierDetectionConfig())
    for call in range(20):
        driven = Driven(cluster=cluster, deadline=call + 0.5, now=float(call))
        driven.answers(1)
        driven.commits(1)
        driven.fails(1, Code.DEADLINE_EXCEEDED, at=call + 0.5)
        driven.ends(Code.DEADLINE_EXCEEDED)
    assert not cluster.sweep(30.0)
    assert all(node.cost == node.failures == node.in_flight == 0 for node in cluster.nodes.values())


def test_cancels_and_what_never_left_break_no_row_and_begin_none() -> None:
    cluster = cluster_with()
    for ignored in (Outcome(Code.CANCELLED, cancelled=True), Outcome(Code.UNAVAILABLE, never_sent=True)):
        answers(cluster.nodes["e0"], *[FAILED] * 2, ignored, ignored)
    assert not cluster.sweep(1.0)
    answers(cluster.nodes["e0"], FAILED)
    assert cluster.sweep(1.0)


# -- what becomes of an endpoint


def test_an_endpoint_that_fails_five_times_in_a_row_is_left_out_and_keeps_its_connection() -> None:
    # docs/correctness.md, E2.
    cluster = cluster_with()
    fails(cluster, "e0")
    assert cluster.sweep(1.0)
    assert picks(cluster) == {"e1", "e2", "e3", "e4"}
    assert cluster.states["e0"] == Connectivity.READY
    assert repr(cluster) == "<Cluster test 5/5 ready, 1 ejected>"
    assert repr(cluster.nodes["e0"]).endswith(" open>")
    assert repr(cluster.ejections) == "<Ejections 1 ejected>"


def test_the_pool_is_woken_when_there_is_something_to_eject_and_not_before() -> None:
    cluster = cluster_with()
    events: list[str] = []
    cluster.on_breaker_event = lambda: events.append("!")
    fails(cluster, "e0", times=4)
    assert events == []
    fails(cluster, "e0", times=1)
    assert events == ["!"]


def test_an_ejection_lasts_its_time_longer_each_time_and_jittered() -> None:
    # docs/correctness.md, J1: without jitter many clients would come back in step.
    longest = []
    for seed in range(50):
        cluster = cluster_of(5, ServiceConfig(balancer=ROUND_ROBIN, outlier_detection=IN_A_ROW), seed=seed)
        now = 1.0
        for times in (1, 2, 3):
            fails(cluster, "e0", now=now)
            cluster.sweep(now)
            until = cluster.nodes["e0"].breaker.until
            assert 30.0 * times <= until - now <= 30.0 * times * 1.2
            longest.append((until - now) / times)
            assert not cluster.sweep(until - 0.01)
            assert cluster.sweep(until)
            probe = Driven(cluster=cluster, now=until)
            assert probe.addresses == ["e0"]
            probe.succeeds(1)
            cluster.sweep(until)
            now = until
    assert len(set(longest)) > 100


def test_no_ejection_is_longer_than_the_longest() -> None:
    cluster = cluster_with()
    cluster.nodes["e0"].breaker.ejection_multiplier = 1000
    fails(cluster, "e0")
    cluster.sweep(1.0)
    assert 300.0 <= cluster.nodes["e0"].breaker.until - 1.0 <= 300.0 * 1.2


def test_each_clean_interval_makes_the_next_ejection_shorter() -> None:
    cluster = cluster_with()
    node = cluster.nodes["e0"]
    node.breaker.ejection_multiplier = 2
    for now, times in ((10.0, 1), (20.0, 0), (30.0, 0)):
        cluster.sweep(now)
        assert node.breaker.ejection_multiplier == times


def test_an_ejected_endpoint_that_leaves_is_forgotten() -> None:
    cluster = cluster_with()
    fails(cluster, "e0")
    cluster.sweep(1.0)
    cluster.update([Endpoint("e1"), Endpoint("e2")])
    assert cluster.ejections.ejected == {}
    cluster.update([Endpoint("e0"), Endpoint("e1")])
    set_states(cluster, Connectivity.READY)
    assert picks(cluster) == {"e0", "e1"}


def test_what_an_endpoint_that_has_left_still_tells_is_nothing() -> None:
    cluster = cluster_with()
    node = cluster.nodes["e0"]
    cluster.update([Endpoint(f"e{index}") for index in range(1, 5)])
    answers(node, *[FAILED] * 5)
    assert not cluster.sweep(1.0)


# -- half-open: how it comes back


def returning(now: float = 40.0) -> Cluster:
    """A cluster whose e0 was ejected and has done its time at ``now``."""
    cluster = cluster_with()
    fails(cluster, "e0")
    cluster.sweep(1.0)
    assert cluster.sweep(now)
    return cluster


def test_exactly_one_real_request_probes_a_returning_endpoint() -> None:
    # docs/correctness.md, E5.
    cluster = returning()
    taken = Counter(address_of(cluster, 40.0) for _ in range(41))
    assert taken["e0"] == 1
    assert cluster.nodes["e0"].breaker.state is State.PROBING


def test_two_pickers_in_use_at_once_send_one_probe() -> None:
    # A picker is replaced while a thread still picks from the one before.
    cluster = returning()
    before = cluster.picker
    cluster.update_states([("e4", Connectivity.IDLE)])
    assert address_of(cluster, 40.0) == "e0"
    node = before.pick(CALL, 40.0, random.Random(1))
    assert node is not None
    assert node.endpoint.address != "e0"


def test_the_probe_is_never_a_retry() -> None:
    cluster = returning()
    assert address_of(cluster, 40.0, [cluster.nodes["e1"]]) != "e0"
    assert address_of(cluster, 40.0) == "e0"


def test_a_probe_that_succeeds_brings_the_endpoint_back() -> None:
    cluster = returning()
    call = Driven(cluster=cluster, now=40.0)
    assert call.addresses == ["e0"]
    call.succeeds(1, at=40.1)
    assert cluster.sweep(40.1)
    assert picks(cluster) == {"e0", "e1", "e2", "e3", "e4"}
    assert cluster.ejections.counts["returned"] == 1
    assert not cluster.sweep(40.2)


def test_a_probe_that_fails_keeps_it_out_for_longer() -> None:
    cluster = returning()
    call = Driven(cluster=cluster, now=40.0)
    call.fails(1, Code.UNAVAILABLE, at=40.1)
    assert cluster.sweep(40.1)
    assert picks(cluster, 40.1) == {"e1", "e2", "e3", "e4"}
    assert 60.0 <= cluster.nodes["e0"].breaker.until - 40.1 <= 60.0 * 1.2
    assert cluster.ejections.counts["probe failed"] == 1


@pytest.mark.parametrize("how", ["cancelled", "given up", "never sent"])
def test_a_probe_that_says_nothing_frees_its_slot_for_another(how: str) -> None:
    # docs/correctness.md, E5.
    cluster = returning()
    call = Driven(cluster=cluster, now=40.0)
    if how == "given up":
        call.close()
    elif how == "cancelled":
        call.ended(1, Outcome(Code.CANCELLED, cancelled=True), at=40.1)
    else:
        call.never_sends(1, at=40.1)
    assert cluster.sweep(40.1)
    assert address_of(cluster, 41.0) == "e0"
    assert address_of(cluster, 41.0) != "e0"


def test_only_the_probe_decides_not_what_was_sent_before() -> None:
    cluster = cluster_with()
    node = cluster.nodes["e0"]
    for _ in range(3):  # sent before the ejection, answered after
        node.start()
    fails(cluster, "e0")
    cluster.sweep(1.0)
    cluster.sweep(40.0)
    call = Driven(cluster=cluster, now=40.0)
    node.end(40.1, 0.5, OK)
    node.end(40.1, 0.5, FAILED)
    node.ignore(0.5)
    assert node.breaker.state is State.PROBING
    call.succeeds(1, at=40.2)
    assert repr(node.breaker) == "<Breaker closed>"


def test_a_hedge_that_beats_the_probe_frees_its_slot() -> None:
    cluster = returning()
    call = Driven(cluster=cluster, hedge=HedgingPolicy(2, delay=1.0), now=40.0)
    call.elapses()
    call.succeeds(2, at=41.5)
    assert call.addresses[0] == "e0"
    assert cluster.nodes["e0"].breaker.state is State.HALF_OPEN


def test_a_new_connection_is_probed_at_once() -> None:
    cluster = cluster_with()
    fails(cluster, "e0")
    cluster.sweep(1.0)
    cluster.update_states([("e0", Connectivity.IDLE)])
    cluster.update_states([("e0", Connectivity.READY)])
    assert address_of(cluster, 2.0) == "e0"


def test_one_that_comes_and_goes_is_not() -> None:
    # A server that accepts connections and health checks and then fails its calls: a health server that lies.
    cluster = cluster_with()
    cluster.nodes["e0"].breaker.ejection_multiplier = 2
    fails(cluster, "e0")
    cluster.sweep(1.0)
    cluster.update_states([("e0", Connectivity.CONNECTING)])
    cluster.update_states([("e0", Connectivity.READY)])
    assert picks(cluster) == {"e1", "e2", "e3", "e4"}


# -- how many at most


@pytest.mark.parametrize(
    ("count", "percent", "most"),
    [(3, 67, 2), (3, 10, 1), (3, 100, 3), (3, 0, 0), (2, 100, 0), (1, 100, 0), (5, 40, 2), (10, 10, 1), (20, 10, 2)],
)
def test_the_share_ejected_is_checked_as_it_would_be_after(count: int, percent: float, most: int) -> None:
    # docs/correctness.md, E1: checked before, 67 % of 3 hosts ejected all three. One may always be, of three or more.
    cluster = cluster_with(replace(IN_A_ROW, max_percent=percent), count)
    for address in list(cluster.nodes):
        fails(cluster, address)
        cluster.sweep(1.0)
    assert len(cluster.ejections.ejected) == most
    assert cluster.ejections.counts["kept: consecutive failures"] == count - most


def test_one_that_could_not_be_ejected_is_when_another_is_back() -> None:
    cluster = cluster_with(count=4)
    fails(cluster, "e0", "e1")
    cluster.sweep(1.0)
    (first,) = cluster.ejections.ejected
    cluster.sweep(40.0)
    Driven(cluster=cluster, now=40.0).succeeds(1)
    cluster.sweep(40.0)
    other = "e1" if first == "e0" else "e0"
    fails(cluster, other, times=10, now=40.0)
    cluster.sweep(40.0)
    assert list(cluster.ejections.ejected) == [other]


# -- panic


def panicking() -> Cluster:
    cluster = cluster_with(replace(IN_A_ROW, max_percent=100.0), count=4)
    fails(cluster, "e0", "e1", "e2")
    cluster.sweep(1.0)
    return cluster


def test_with_fewer_than_half_left_all_are_used_and_it_is_said() -> None:
    # docs/correctness.md, E6.
    cluster = panicking()
    assert picks(cluster) == {"e0", "e1", "e2", "e3"}
    assert cluster.panic
    assert repr(cluster) == "<Cluster test 4/4 ready, 3 ejected, panic>"
    call = Driven(cluster=cluster)
    call.succeeds(1)
    said = str(explain(call.call, "test", call.verdict, 1.0))
    assert "(panic: 3 of 4 endpoints are ejected; ignoring ejections)" in said


def test_panic_ends_when_enough_are_back() -> None:
    cluster = panicking()
    cluster.sweep(40.0)
    for _ in range(3):
        Driven(cluster=cluster, now=40.0).succeeds(1)
        cluster.sweep(40.0)
    assert not cluster.panic
    assert cluster.picker.note == ""


def test_half_left_is_no_panic() -> None:
    cluster = cluster_with(replace(IN_A_ROW, max_percent=50.0), count=4)
    fails(cluster, "e0", "e1")
    cluster.sweep(1.0)
    assert (cluster.panic, picks(cluster)) == (False, {"e2", "e3"})


def test_without_a_threshold_only_the_last_one_is_kept_from_leaving() -> None:
    cluster = cluster_with(replace(IN_A_ROW, max_percent=100.0, panic_threshold=0.0), count=3)
    fails(cluster, "e0", "e1")
    cluster.sweep(1.0)
    assert picks(cluster) == {"e2"}
    fails(cluster, "e2")
    cluster.sweep(1.0)
    assert picks(cluster) == {"e0", "e1", "e2"}


def test_endpoints_without_a_connection_are_no_reason_to_panic() -> None:
    # docs/correctness.md, E3.
    cluster = cluster_with(count=5)
    fails(cluster, "e0")
    cluster.sweep(1.0)
    cluster.update_states([("e1", Connectivity.TRANSIENT_FAILURE), ("e2", Connectivity.TRANSIENT_FAILURE)])
    assert (cluster.panic, picks(cluster)) == (False, {"e3", "e4"})


# -- a dry run


def test_a_dry_run_counts_what_it_would_do_and_does_nothing() -> None:
    cluster = cluster_with(replace(OutlierDetectionConfig(), dry_run=True))
    fails(cluster, "e0")
    assert not cluster.sweep(1.0)
    assert picks(cluster) == {"e0", "e1", "e2", "e3", "e4"}
    for index in range(5):
        answers(cluster.nodes[f"e{index}"], *[FAILED if index == 0 else OK] * 100)
    cluster.sweep(10.0)
    assert cluster.ejections.counts["would eject: consecutive failures"] >= 1
    assert cluster.ejections.counts["would eject: failure percentage"] == 1
    assert cluster.ejections.ejected == {}


# -- A50's two algorithms


def rated(*failures: int, calls: int = 100) -> dict[Node, tuple[int, int]]:
    nodes = [Node(Endpoint(f"e{index}"), contextlib.nullcontext()) for index in range(len(failures))]
    return {node: (calls - failed, failed) for node, failed in zip(nodes, failures, strict=True)}


def named(counts: dict[Node, tuple[int, int]], config: OutlierDetectionConfig) -> list[tuple[str, str]]:
    return [(node.endpoint.address, reason) for node, reason in outliers(counts, config, random.Random(1))]


RATE = OutlierDetectionConfig(failure_percentage=None)
SHARE = OutlierDetectionConfig(success_rate=None)


def test_success_rate_far_below_the_others() -> None:
    # Rates 1, 1, 1, 1, 0.5: mean 0.9, deviation 0.2, so 0.5 is 2 of them below; with 1.9 it is out, with 2.1 not.
    assert named(rated(0, 0, 0, 0, 50), RATE) == [("e4", "success rate")]
    less = replace(RATE, success_rate=SuccessRateConfig(stdev_factor=2.1))
    assert named(rated(0, 0, 0, 0, 50), less) == []


def test_when_all_fail_alike_none_is_an_outlier() -> None:
    assert named(rated(50, 50, 50, 50, 50), RATE) == []


def test_failure_percentage_is_above_its_threshold_not_at_it() -> None:
    # docs/correctness.md, E4: A50's comments say ">=", its algorithm says ">".
    assert named(rated(0, 85, 86, 0, 0), SHARE) == [("e2", "failure percentage")]


@pytest.mark.parametrize("config", [RATE, SHARE])
def test_with_too_few_endpoints_or_calls_nothing_is_said(config: OutlierDetectionConfig) -> None:
    assert named(rated(0, 0, 0, 100), config) == []
    assert named(rated(0, 0, 0, 0, 49, calls=49), config) == []
    assert named({}, config) == []
    none = OutlierDetectionConfig(
        success_rate=SuccessRateConfig(minimum_hosts=0, request_volume=0),
        failure_percentage=FailurePercentageConfig(minimum_hosts=0, request_volume=0),
    )
    assert named({}, none) == []
    assert named(rated(0, 0, 0, 0, 0, calls=0), none) == []


def test_those_that_are_out_of_the_count_do_not_weigh_on_the_mean() -> None:
    counts = rated(0, 0, 0, 0, 0, 50)
    counts[next(iter(counts))] = (1, 9)
    assert named(counts, RATE) == [("e5", "success rate")]


@pytest.mark.parametrize("enforcement", [0.0, 50.0, 100.0])
def test_of_those_found_a_percentage_is_ejected(enforcement: float) -> None:
    # 400 times with p = 1/2: 5 standard deviations are 50.
    config = OutlierDetectionConfig(
        success_rate=SuccessRateConfig(enforcement=enforcement),
        failure_percentage=FailurePercentageConfig(enforcement=enforcement),
    )
    rng, counts = random.Random(1), rated(0, 0, 0, 0, 90)
    found = Counter(reason for _ in range(400) for _, reason in outliers(counts, config, rng))
    for reason in ("success rate", "failure percentage"):
        assert abs(found[reason] - 4 * enforcement) <= (50 if enforcement == 50.0 else 0)


def test_every_interval_begins_a_new_count() -> None:
    cluster = cluster_with(OutlierDetectionConfig(consecutive_failures=0))
    for index in range(5):
        answers(cluster.nodes[f"e{index}"], *[OK] * 60, *[FAILED if index == 0 else OK] * 40)
    assert not cluster.sweep(9.9)
    assert cluster.sweep(10.0)
    assert list(cluster.ejections.ejected) == ["e0"]
    assert cluster.ejections.counts == {"ejected: success rate": 1}
    cluster.sweep(20.0)
    assert cluster.nodes["e1"].take_counts() == (0, 0)


def test_an_endpoint_that_both_algorithms_find_is_ejected_once() -> None:
    cluster = cluster_with(replace(OutlierDetectionConfig(consecutive_failures=0), max_percent=100.0))
    for index in range(5):
        answers(cluster.nodes[f"e{index}"], *[FAILED if index == 0 else OK] * 100)
    cluster.sweep(10.0)
    assert cluster.ejections.counts == {"ejected: success rate": 1}
    assert cluster.nodes["e0"].breaker.ejection_multiplier == 1


def test_other_settings_hold_from_when_they_come_and_who_is_out_stays_out() -> None:
    cluster = cluster_with()
    fails(cluster, "e0")
    cluster.sweep(1.0)
    cluster.reconfigure(
        ServiceConfig(balancer=ROUND_ROBIN, outlier_detection=replace(IN_A_ROW, consecutive_failures=2, interval=1.0)),
        2.0,
    )
    assert list(cluster.ejections.ejected) == ["e0"]
    assert picks(cluster) == {"e1", "e2", "e3", "e4"}
    cluster.sweep(40.0)
    Driven(cluster=cluster, now=40.0).succeeds(1)
    cluster.sweep(40.0)
    fails(cluster, "e3", times=2, now=40.0)
    cluster.sweep(40.0)
    assert list(cluster.ejections.ejected) == ["e3"]


# -- what a caller sees


def test_a_replica_that_fails_at_once_gets_next_to_nothing_and_no_caller_sees_it() -> None:
    # 1,000 calls a second over 3; one fails at once. By peak EWMA and by ejection, and under round robin by ejection
    # alone, it has at most 2 % of the attempts after the first second.
    for balancer in (BalancerConfig(), ROUND_ROBIN):
        cluster = cluster_of(3, ServiceConfig(balancer=balancer))
        attempts: Counter[str] = Counter()
        for turn in range(5000):
            now = turn / 1000
            if turn % 100 == 0:
                cluster.sweep(now)
            call = Driven(cluster=cluster, retry=RetryPolicy(3), seed=turn, now=now)
            while call.verdict is None:
                number = len(call.call.attempts)
                if call.call.attempts[-1].ended is not None:
                    call.elapses()
                elif call.addresses[-1] == "e0":
                    call.fails(number, Code.UNAVAILABLE)
                else:
                    call.succeeds(number, at=call.now + 0.001)
            call.ends(Code.OK)
            if now >= 1.0:
                attempts.update(call.addresses)
        assert attempts["e0"] / attempts.total() <= 0.02


def test_a_replica_that_fails_half_its_calls_is_ejected_within_ten_seconds() -> None:
    # One of 5 under round robin, at 500 calls a second: a row of five comes every 62 of its calls, so within 10 s there
    # is none with a chance of (1 - 1/62)^1000 < 1e-7; and success rate would find it at the end of the interval.
    cluster = cluster_with(OutlierDetectionConfig())
    rng = random.Random(1)
    failed = 0
    for turn in range(10_000):
        now = turn / 500
        if turn % 50 == 0:
            cluster.sweep(now)
        call = Driven(cluster=cluster, retry=RetryPolicy(3), seed=turn, now=now)
        while call.verdict is None:
            number = len(call.call.attempts)
            if call.call.attempts[-1].ended is not None:
                call.elapses()
            elif call.addresses[-1] == "e0" and rng.random() < 0.5:
                call.fails(number, Code.UNAVAILABLE)
            else:
                call.succeeds(number, at=call.now + 0.001)
        failed += call.verdict.outcome.code != Code.OK
        if turn == 5000:
            assert "e0" in cluster.ejections.ejected
    assert failed / 10_000 <= 0.001
