"""What a client refuses to send: which calls, in which words, and that it counts against nobody."""

from __future__ import annotations

import contextlib
import gc
import random
from collections import Counter
from math import inf

import pytest

from mesh.codes import Code
from mesh.config.settings import AdaptiveThrottleConfig, MethodPolicy, OverloadConfig, RetryPolicy, ServiceConfig
from mesh.criticality import Criticality, criticality_in
from mesh.model import CallSpec, Outcome
from mesh.observe import explain
from mesh.policy.call.overload import AdaptiveThrottle, ClientAdmission
from mesh.policy.cluster.cluster import Cluster
from tests.policy.driving import METHOD, Driven, cluster_of

SHEDDABLE = (("weft-criticality", "SHEDDABLE"),)
SHEDDABLE_PLUS = (("weft-criticality", "SHEDDABLE_PLUS"),)
CRITICAL_PLUS = (("weft-criticality", "CRITICAL_PLUS"),)
ADAPTIVE = OverloadConfig(adaptive=AdaptiveThrottleConfig())


def limited(limit: float = 10, *, dry_run: bool = False) -> Cluster:
    return cluster_of(3, ServiceConfig(overload=OverloadConfig(limit, dry_run=dry_run)))


def begun(cluster: Cluster, count: int) -> list[Driven]:
    return [Driven(cluster=cluster) for _ in range(count)]


# -- calls outstanding (A32)


def test_a_call_beyond_the_limit_is_refused_here_and_is_told_why() -> None:
    cluster = limited()
    running = begun(cluster, 10)
    call = Driven(cluster=cluster, retry=RetryPolicy(3))
    assert call.verdict is not None
    assert call.verdict.outcome.code == Code.UNAVAILABLE
    assert call.call.attempts == []
    said = (
        "refused by the client: 10 calls are outstanding, and the limit for CRITICAL calls is 10 "
        "(overload.maxOutstanding in the service config)"
    )
    assert said in str(explain(call.call, "test", call.verdict, 0.0))
    assert cluster.admission.counts == {"refused: outstanding": 1}
    assert repr(cluster.admission) == "<ClientAdmission 10/10 outstanding>"
    running[0].succeeds(1)
    begun(cluster, 1)


def test_a_refusal_counts_against_no_endpoint_and_earns_no_retries() -> None:
    cluster = limited()
    running = begun(cluster, 10)
    before = [repr(node) for node in cluster.nodes.values()]
    for call in begun(cluster, 100):
        assert call.verdict is not None
    assert [repr(node) for node in cluster.nodes.values()] == before
    assert all(node.failures == 0 for node in cluster.nodes.values())
    for call in running:
        call.succeeds(1)
    # 10 a second for 10 s, and a tenth of the 10 calls that were let through.
    assert sum(cluster.budget.withdraw(0.0) for _ in range(200)) == 101


@pytest.mark.parametrize("how", ["succeeds", "fails", "is given up", "is cancelled", "runs out of time"])
def test_however_a_call_ends_its_place_is_free_once(how: str) -> None:
    # docs/correctness.md, B1.
    cluster = limited()
    call = Driven(cluster=cluster, deadline=5.0)
    assert len(cluster.admission.outstanding) == 1
    if how == "succeeds":
        call.succeeds(1)
    elif how == "fails":
        call.fails(1, Code.INTERNAL)
    elif how == "is given up":
        call.close()
    elif how == "is cancelled":
        call.ended(1, Outcome(Code.CANCELLED, cancelled=True))
    else:
        call.fails(1, Code.DEADLINE_EXCEEDED, at=5.0)
    call.close()
    assert len(cluster.admission.outstanding) == 0


def test_a_call_that_nobody_holds_any_more_frees_its_place() -> None:
    cluster = limited()
    begun(cluster, 5)
    gc.collect()
    assert len(cluster.admission.outstanding) == 0


def test_a_call_that_waits_for_a_retry_is_outstanding() -> None:
    cluster = limited()
    call = Driven(cluster=cluster, retry=RetryPolicy(3))
    call.fails(1, Code.UNAVAILABLE)
    assert len(cluster.admission.outstanding) == 1


@pytest.mark.parametrize(
    ("metadata", "place"),
    [(None, 10), (CRITICAL_PLUS, 10), (SHEDDABLE_PLUS, 9), (SHEDDABLE, 8), ((("weft-criticality", "?"),), 10)],
)
def test_the_least_important_are_refused_first(metadata: tuple[tuple[str, str], ...] | None, place: int) -> None:
    cluster = limited()
    running = [*begun(cluster, place - 1), Driven(cluster=cluster, metadata=metadata)]
    assert all(call.verdict is None for call in running)
    assert Driven(cluster=cluster, metadata=metadata).verdict is not None


def test_criticality_is_read_among_other_metadata() -> None:
    assert criticality_in([("a", "b"), ("weft-criticality", "SHEDDABLE")]) is Criticality.SHEDDABLE
    assert criticality_in(()) is criticality_in(None) is Criticality.CRITICAL


def test_by_default_there_is_no_limit() -> None:
    admission = ClientAdmission(OverloadConfig())
    assert admission.limit == inf
    admission.configure(OverloadConfig(7))
    assert admission.limit == 7


def test_a_dry_run_counts_what_it_would_refuse() -> None:
    cluster = limited(dry_run=True)
    assert all(call.verdict is None for call in begun(cluster, 15))
    assert cluster.admission.counts == {"would refuse: outstanding": 5}


def test_another_limit_keeps_the_count() -> None:
    cluster = limited()
    running = begun(cluster, 10)
    cluster.reconfigure(ServiceConfig(overload=OverloadConfig(20)), 1.0)
    running += begun(cluster, 10)
    assert all(call.verdict is None for call in running)
    assert begun(cluster, 1)[0].verdict is not None


# -- the adaptive throttle (Google SRE)


def throttled(k: float = 2.0, window: float = 120.0) -> AdaptiveThrottle:
    return AdaptiveThrottle(window, k, contextlib.nullcontext())


@pytest.mark.parametrize(
    ("requests", "accepts", "expected"),
    [(0, 0, 0.0), (100, 100, 0.0), (100, 50, 0.0), (100, 40, 20 / 101), (100, 0, 100 / 101)],
)
def test_the_chance_is_that_of_the_book(requests: int, accepts: int, expected: float) -> None:
    # p = max(0, (requests - K accepts) / (requests + 1)), K = 2.
    counts = throttled()
    for _ in range(requests):
        counts.request(1.0)
    for _ in range(requests - accepts):
        counts.refused(1.0)
    assert counts.request(1.0) == pytest.approx(expected)


def test_calls_in_flight_do_not_look_refused() -> None:
    # docs/correctness.md, O1: counted as accepted until the service refuses, or the first calls would refuse the next.
    counts = throttled()
    assert all(counts.request(0.0) == 0.0 for _ in range(1000))


@pytest.mark.parametrize(("later", "forgotten"), [(110.0, False), (126.0, True), (10_000.0, True)])
def test_what_is_older_than_the_window_is_forgotten(later: float, forgotten: bool) -> None:
    counts = throttled()
    for _ in range(100):
        counts.request(1.0)
        counts.refused(1.0)
    assert (counts.request(later) == 0.0) == forgotten


def test_instants_out_of_order_count_for_the_present() -> None:
    counts = throttled()
    counts.request(1000.0)
    assert counts.request(1.0) == 0.0
    counts.refused(1.0)
    counts.refused(1.0)
    assert counts.request(1000.0) == pytest.approx(2 / 3)


def test_a_refusal_that_comes_after_its_window_turns_nothing_negative() -> None:
    counts = throttled(window=24.0)
    for _ in range(10):
        counts.request(0.0)
    for _ in range(10):
        counts.refused(100.0)
    assert 0.0 <= counts.request(100.0) <= 1.0
    assert 0.0 <= counts.request(200.0) <= 1.0


def outcome_of(cluster: Cluster, rng: random.Random, accepted: float, now: float, metadata: object = None) -> str:
    call = CallSpec(METHOD, MethodPolicy(retry=RetryPolicy(1)), inf, metadata)  # type: ignore[arg-type]
    driven = Driven(cluster=cluster, seed=rng.getrandbits(32), now=now, metadata=call.metadata)  # type: ignore[arg-type]
    if driven.verdict is not None:
        return "refused here"
    if rng.random() < accepted:
        driven.succeeds(1)
        return "accepted"
    driven.fails(1, Code.RESOURCE_EXHAUSTED)
    return "refused there"


def overloaded(accepted: float, config: OverloadConfig = ADAPTIVE, metadata: object = None) -> Counter[str]:
    """What became of the last 2,000 of 4,000 calls in a minute to a service that accepts this share."""
    cluster, rng = cluster_of(3, ServiceConfig(overload=config)), random.Random(1)
    ends = [outcome_of(cluster, rng, accepted, turn * 0.015, metadata) for turn in range(4000)]
    return Counter(ends[2000:])


def test_while_the_service_accepts_half_nothing_is_refused_here() -> None:
    # At a share of exactly 1/2 p is 0 on average; 0.6 leaves room for chance: 5 standard deviations of 2,000 are 0.055.
    assert overloaded(0.6)["refused here"] == 0


def test_of_what_is_refused_there_a_tenth_is_still_sent() -> None:
    # Of 2,000 with p = 0.9: 5 standard deviations of 200 are 67 (docs/correctness.md, O1).
    assert abs(overloaded(0.0)["refused there"] - 200) <= 67


def test_the_rest_finds_out_that_the_service_is_back() -> None:
    cluster, rng = cluster_of(3, ServiceConfig(overload=ADAPTIVE)), random.Random(1)
    for turn in range(1000):
        outcome_of(cluster, rng, 0.0, turn * 0.05)
    # What was refused must leave the window, and each window's accepts then allow twice as many: two windows, and some.
    ends = [outcome_of(cluster, rng, 1.0, 50.0 + turn * 0.05) for turn in range(7000)]
    assert "refused here" in ends[:100]
    assert "refused here" not in ends[-400:]


def test_a_refusal_by_the_throttle_says_so() -> None:
    cluster, rng = cluster_of(3, ServiceConfig(overload=ADAPTIVE)), random.Random(1)
    for _ in range(200):
        outcome_of(cluster, rng, 0.0, 1.0)
    refused = next(
        call.verdict.outcome for seed in range(100) if (call := Driven(cluster=cluster, seed=seed, now=1.0)).verdict
    )
    assert refused.code == Code.RESOURCE_EXHAUSTED
    assert refused.details.startswith("refused by the client: the service refuses CRITICAL calls, so 90% of them")
    assert cluster.admission.counts["refused: throttle"] > 0


def test_the_throttle_holds_back_the_least_important_first() -> None:
    # The service accepts 40 %: K = 2 × 0.6 for SHEDDABLE holds back, K = 4 for CRITICAL_PLUS does not.
    refused = [overloaded(0.4, metadata=metadata)["refused here"] for metadata in (CRITICAL_PLUS, None, SHEDDABLE)]
    assert refused[0] == 0 < refused[1] < refused[2]


def test_a_throttle_in_a_dry_run_refuses_nothing() -> None:
    ends = overloaded(0.0, OverloadConfig(adaptive=AdaptiveThrottleConfig(), dry_run=True))
    assert ends == {"refused there": 2000}


@pytest.mark.parametrize("how", ["given up in the queue", "never sent", "not found"])
def test_what_the_service_did_not_refuse_is_accepted(how: str) -> None:
    cluster = cluster_of(3, ServiceConfig(overload=ADAPTIVE))
    for turn in range(50):
        call = Driven(cluster=cluster, now=1.0, deadline=2.0, seed=turn)
        assert call.verdict is None
        if how == "not found":
            call.fails(1, Code.NOT_FOUND)
        elif how == "never sent":
            call.never_sends(1)
            call.close()
        else:
            call.close()


def test_other_settings_of_the_throttle_begin_anew() -> None:
    cluster, rng = cluster_of(3, ServiceConfig(overload=ADAPTIVE)), random.Random(1)
    running = Driven(cluster=cluster, now=1.0)
    for _ in range(100):
        outcome_of(cluster, rng, 0.0, 1.0)
    cluster.reconfigure(ServiceConfig(), 1.0)
    assert {outcome_of(cluster, rng, 1.0, 1.0) for _ in range(100)} == {"accepted"}
    running.fails(1, Code.UNAVAILABLE)
    waiting = cluster_of(0, ServiceConfig(overload=ADAPTIVE))
    call = Driven(cluster=waiting)
    call.close()
    assert len(waiting.admission.outstanding) == 0
