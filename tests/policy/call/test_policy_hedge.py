"""Hedging (A6; docs/correctness.md, H1): a second attempt beside a running one; and what it learns from."""

from __future__ import annotations

import contextlib
import random

import pytest

from mesh.codes import Code
from mesh.config.settings import BudgetConfig, HedgingPolicy, RetryPolicy, ServiceConfig, ThrottleConfig
from mesh.model import Connectivity, Outcome
from mesh.policy.call.hedge import Latencies
from tests.policy.driving import METHOD, Driven, cluster_of, set_states

UNAVAILABLE = frozenset({Code.UNAVAILABLE})
HEDGE = HedgingPolicy(3, delay=1.0, non_fatal_codes=UNAVAILABLE)


def test_a_hedge_is_sent_elsewhere_after_the_delay_and_no_more_than_max_attempts() -> None:
    call = Driven(hedge=HEDGE, deadline=10.0)
    assert call.sends(1, previous=0, until=1.0).timeout == 10.0
    call.elapses()
    assert call.sends(2, previous=1, until=2.0).timeout == 9.0
    call.elapses()
    call.sends(3, previous=2)
    assert len(set(call.addresses)) == call.in_flight == 3


def test_a_hedge_is_not_sent_before_its_time() -> None:
    call = Driven(hedge=HEDGE)
    call.elapses(at=0.5)
    call.waits(until=1.0)


@pytest.mark.parametrize("winner", [1, 2])
def test_the_first_success_is_the_call_and_the_other_is_given_up(winner: int) -> None:
    call = Driven(hedge=HEDGE)
    call.elapses()
    call.succeeds(winner, at=1.5)
    call.ends(Code.OK, of=winner)
    loser = call.call.attempts[2 - winner]
    assert loser.outcome is not None
    assert (loser.outcome.cancelled, loser.ended) == (True, 1.5)
    assert loser.outcome.details == "another attempt answered first"


def test_a_call_that_succeeds_before_the_delay_is_one_attempt() -> None:
    call = Driven(hedge=HEDGE)
    call.succeeds(1, at=0.9)
    call.ends(Code.OK, of=1)
    assert len(call.call.attempts) == 1


def test_a_delay_of_0_sends_all_at_once() -> None:
    call = Driven(hedge=HedgingPolicy(3))
    call.elapses()
    call.elapses()
    call.sends(3)
    assert (call.now, call.in_flight) == (0.0, 3)


def test_a_non_fatal_failure_sends_the_next_hedge_at_once() -> None:
    call = Driven(hedge=HEDGE)
    call.fails(1, Code.UNAVAILABLE, at=0.2)
    call.sends(2, previous=1, until=1.2)


def test_a_fatal_failure_ends_the_call_and_all_its_attempts() -> None:
    call = Driven(hedge=HEDGE)
    call.elapses()
    call.fails(1, Code.NOT_FOUND)
    call.ends(Code.NOT_FOUND, of=1)


def test_when_no_hedge_is_left_a_non_fatal_failure_waits_for_the_others() -> None:
    call = Driven(hedge=HedgingPolicy(2, delay=1.0, non_fatal_codes=UNAVAILABLE))
    call.elapses()
    call.fails(1, Code.UNAVAILABLE)
    call.waits()
    call.fails(2, Code.UNAVAILABLE)
    call.ends(Code.UNAVAILABLE, "failure 2", of=2)


def test_pushback_delays_the_next_hedge() -> None:
    call = Driven(hedge=HEDGE)
    call.elapses()
    call.fails(1, Code.UNAVAILABLE, at=1.5, pushback=5.0)
    call.waits(until=6.5)
    call.elapses()
    call.sends(3, previous=2)


def test_pushback_with_nothing_running_is_waited_out() -> None:
    call = Driven(hedge=HEDGE)
    call.fails(1, Code.UNAVAILABLE, at=0.5, pushback=5.0)
    call.waits(until=5.5)


def test_pushback_past_the_deadline_fails_at_once_when_nothing_runs() -> None:
    call = Driven(hedge=HEDGE, deadline=2.0)
    call.fails(1, Code.UNAVAILABLE, at=0.5, pushback=5.0)
    call.ends(Code.UNAVAILABLE, of=1)


def test_negative_pushback_ends_hedging_but_not_what_runs() -> None:
    call = Driven(hedge=HEDGE)
    call.elapses()
    call.fails(1, Code.UNAVAILABLE, at=1.5, pushback=-1.0)
    call.waits()
    call.succeeds(2)
    call.ends(Code.OK, of=2)


def test_negative_pushback_with_nothing_running_ends_the_call() -> None:
    call = Driven(hedge=HEDGE)
    call.fails(1, Code.UNAVAILABLE, pushback=-1.0)
    call.ends(Code.UNAVAILABLE, of=1)


def test_an_attempt_that_its_own_timeout_ended_is_not_fatal_to_the_others() -> None:
    call = Driven(hedge=HEDGE, attempt_timeout=1.5)
    call.elapses()
    call.fails(1, Code.DEADLINE_EXCEEDED, at=1.5)
    call.sends(3)
    call.succeeds(2)
    call.ends(Code.OK, of=2)


def test_the_headers_of_one_attempt_make_it_the_call() -> None:
    call = Driven(hedge=HEDGE)
    call.elapses()
    call.answers(2, at=1.2)
    call.commits(2)
    assert call.in_flight == 1
    call.succeeds(1)
    call.waits()
    call.fails(2, Code.UNAVAILABLE)
    call.ends(Code.UNAVAILABLE, of=2)


def test_after_the_headers_no_hedge_is_sent() -> None:
    call = Driven(hedge=HEDGE)
    call.answers(1, at=0.5)
    call.commits(1)
    call.overflows(1, at=5.0)
    call.waits()
    assert len(call.call.attempts) == 1


def test_a_failure_that_says_the_server_had_begun_to_answer_is_the_calls() -> None:
    call = Driven(hedge=HEDGE)
    call.fails(1, Code.UNAVAILABLE, committed=True)
    call.ends(Code.UNAVAILABLE)


def test_an_attempt_cancelled_here_ends_the_call() -> None:
    call = Driven(hedge=HEDGE)
    call.elapses()
    call.ended(1, Outcome(Code.CANCELLED, cancelled=True))
    call.ends(Code.CANCELLED, of=1)


def test_a_hedge_that_never_left_goes_elsewhere_and_is_paid_for_once() -> None:
    cluster = cluster_of(config=ServiceConfig(budget=BudgetConfig(0.0, 0.1)))  # one hedge
    call = Driven(hedge=HedgingPolicy(2, delay=1.0), cluster=cluster)
    call.elapses()
    call.never_sends(2)
    call.sends(3, previous=1)
    assert len(set(call.addresses)) == 3


def test_a_hedge_that_no_endpoint_can_take_is_not_sent() -> None:
    call = Driven(hedge=HEDGE)
    set_states(call.cluster, Connectivity.CONNECTING)
    call.elapses()
    call.waits()
    call.succeeds(1)
    call.ends(Code.OK, of=1)


def test_no_budget_no_hedge() -> None:
    cluster = cluster_of(config=ServiceConfig(budget=BudgetConfig(0.0, 0.0)))
    call = Driven(hedge=HEDGE, cluster=cluster)
    call.elapses()
    call.waits()
    call.fails(1, Code.UNAVAILABLE)
    call.ends(Code.UNAVAILABLE, of=1)


def test_hedges_and_retries_share_one_budget() -> None:
    cluster = cluster_of(config=ServiceConfig(budget=BudgetConfig(0.0, 0.1)))  # one for all
    retried = Driven(retry=RetryPolicy(3), cluster=cluster)
    retried.fails(1, Code.UNAVAILABLE)
    hedged = Driven(hedge=HEDGE, cluster=cluster)
    hedged.elapses(at=0.001)
    hedged.elapses(at=1.0)
    hedged.waits()


def test_the_throttle_stops_hedges_at_half_of_its_tokens() -> None:
    cluster = cluster_of(config=ServiceConfig(throttle=ThrottleConfig(4, 0.1)))
    call = Driven(hedge=HEDGE, cluster=cluster)
    call.fails(1, Code.UNAVAILABLE)
    call.sends(2)
    call.fails(2, Code.UNAVAILABLE)
    call.ends(Code.UNAVAILABLE, of=2)
    fatal = Driven(hedge=HEDGE, cluster=cluster)
    fatal.fails(1, Code.NOT_FOUND)
    fatal.ends(Code.NOT_FOUND)
    assert repr(cluster.throttle) == "<Throttle 2/4>"


def test_a_call_under_a_retry_does_not_hedge() -> None:
    call = Driven(hedge=HEDGE, may_retry=False)
    call.sends(1, until=None)


def test_a_hedge_due_after_the_deadline_is_not_waited_for() -> None:
    call = Driven(hedge=HEDGE, deadline=0.5)
    call.sends(1, until=None)


def test_woken_after_the_deadline_no_hedge_is_sent_and_what_runs_is_heard_out() -> None:
    call = Driven(hedge=HEDGE, deadline=2.0)
    call.elapses(at=3.0)
    call.waits()
    call.succeeds(1)
    call.ends(Code.OK, of=1)


def test_a_failure_heard_after_the_deadline_is_the_calls() -> None:
    call = Driven(hedge=HEDGE, deadline=2.0)
    call.elapses(at=3.0)
    call.fails(1, Code.UNAVAILABLE)
    call.ends(Code.UNAVAILABLE, of=1)


# -- the percentile that a method learns

LEARNING = HedgingPolicy(2, delay=1.0, percentile=95.0)


def test_the_fixed_delay_holds_until_enough_has_been_seen() -> None:
    cluster = cluster_of()
    for _ in range(100):
        call = Driven(hedge=LEARNING, cluster=cluster)
        call.sends(1, until=1.0)
        call.succeeds(1, at=0.02)
    until = Driven(hedge=LEARNING, cluster=cluster).sends(1).until
    assert until == pytest.approx(0.02, rel=0.06)


def test_no_hedge_is_earlier_than_a_millisecond() -> None:
    cluster = cluster_of()
    for _ in range(100):
        cluster.latencies(METHOD).record(1e-6)
    assert Driven(hedge=LEARNING, cluster=cluster).sends(1).until == 0.001


def test_methods_learn_apart() -> None:
    cluster = cluster_of()
    assert cluster.latencies("/a") is cluster.latencies("/a")
    assert cluster.latencies("/a") is not cluster.latencies("/b")


def test_no_more_methods_are_remembered_than_a_program_has() -> None:
    cluster = cluster_of()
    first = cluster.latencies("/0")
    for number in range(1, 1000):
        cluster.latencies(f"/{number}")
    assert cluster.latencies("/0") is first
    cluster.latencies("/one more")
    assert cluster.latencies("/0") is not first
    assert len(cluster._latencies) == 1000


def test_a_hedge_that_wins_teaches_how_slow_the_first_attempt_was() -> None:
    # If only the winners' times counted, the slow ones would vanish, and hedges come ever earlier.
    cluster = cluster_of()
    for _ in range(100):
        call = Driven(hedge=LEARNING, cluster=cluster)
        if call.sends(1).until != 1.0:
            break
        call.elapses(at=1.0)
        call.succeeds(2, at=1.01)
    learned = cluster.latencies(METHOD).percentile(50)
    assert learned == pytest.approx(1.01, rel=0.06)


def test_what_a_second_attempt_took_after_the_first_failed_is_not_learned() -> None:
    cluster = cluster_of()
    call = Driven(hedge=HedgingPolicy(2, 1.0, UNAVAILABLE, 95.0), cluster=cluster)
    call.fails(1, Code.UNAVAILABLE)
    call.succeeds(2)
    assert repr(cluster.latencies(METHOD)) == "<Latencies of 0>"


def test_failures_are_not_learned() -> None:
    call = Driven(hedge=LEARNING)
    call.fails(1, Code.NOT_FOUND)
    assert repr(call.cluster.latencies(METHOD)) == "<Latencies of 0>"


def latencies() -> Latencies:
    return Latencies(contextlib.nullcontext())


@pytest.mark.parametrize("percent", [1, 25, 50, 90, 99, 99.9])
def test_a_percentile_is_right_within_its_5_percent(percent: float) -> None:
    rng = random.Random(1)
    times = sorted(rng.lognormvariate(-4, 1) for _ in range(4000))
    learned = latencies()
    for each in times:
        learned.record(each)
    exact = times[int(len(times) * percent / 100)]
    found = learned.percentile(percent)
    assert found is not None
    # A bucket is 5 % wide and its upper end is given; 1 % more for the rank between two samples.
    assert exact * 0.99 <= found <= exact * 1.06


@pytest.mark.parametrize(("seconds", "low", "high"), [(0.0, 1e-5, 1.1e-5), (-1.0, 1e-5, 1.1e-5), (1e9, 600, 700)])
def test_times_out_of_range_are_taken_as_its_ends(seconds: float, low: float, high: float) -> None:
    learned = latencies()
    for _ in range(100):
        learned.record(seconds)
    found = learned.percentile(50)
    assert found is not None
    assert low <= found <= high


def test_old_times_fade() -> None:
    learned = latencies()
    for _ in range(10_000):
        learned.record(1.0)
    for _ in range(20_000):
        learned.record(0.001)
    found = learned.percentile(85)
    assert found == pytest.approx(0.001, rel=0.06)
