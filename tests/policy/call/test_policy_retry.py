"""Retries, as A6 and docs/correctness.md have them: what is tried again, when, where, and what it costs."""

from __future__ import annotations

import random
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.codes import Code
from mesh.config.settings import BudgetConfig, RetryPolicy, ServiceConfig, ThrottleConfig
from mesh.model import Connectivity, Elapsed, Outcome, Wait
from mesh.policy.call.backoff import Backoff
from tests.policy.driving import Driven, cluster_of, set_states

THREE = RetryPolicy(3)
FIVE = RetryPolicy(5, initial_backoff=1.0, max_backoff=100.0, multiplier=2.0)
NO_BUDGET = ServiceConfig(budget=BudgetConfig(0.0, 0.0))


def test_a_call_that_succeeds_is_one_attempt() -> None:
    call = Driven(retry=THREE, metadata=(("k", "v"),))
    attempt = call.sends(1, previous=0)
    assert (attempt.timeout, attempt.metadata, call.in_flight) == (None, (("k", "v"),), 1)
    call.succeeds(1, at=0.5)
    call.ends(Code.OK, of=1)
    assert (attempt.ended, attempt.outcome) == (0.5, call.verdict and call.verdict.outcome)


def test_a_retryable_failure_is_followed_by_a_backoff_and_an_attempt_elsewhere() -> None:
    call = Driven(retry=THREE)
    call.sends(1, previous=0)
    call.fails(1, Code.UNAVAILABLE, at=0.1)
    call.waits(until=(0.1 + 0.8 * 0.025, 0.1 + 1.2 * 0.025))
    assert call.in_flight == 0
    call.elapses()
    call.sends(2, previous=1)
    call.fails(2, Code.UNAVAILABLE)
    call.elapses()
    call.sends(3, previous=2)
    assert len(set(call.addresses)) == 3
    call.succeeds(3)
    call.ends(Code.OK, of=3)


def test_at_most_max_attempts_are_sent_and_the_last_failure_is_the_calls() -> None:
    call = Driven(retry=THREE)
    for number in (1, 2, 3):
        call.sends(number)
        call.fails(number, Code.UNAVAILABLE)
        if number < 3:
            call.elapses()
    call.ends(Code.UNAVAILABLE, "failure 3", of=3)


@pytest.mark.parametrize("code", [code for code in Code if code not in (Code.OK, Code.UNAVAILABLE)])
def test_a_code_that_the_policy_does_not_name_ends_the_call(code: Code) -> None:
    call = Driven(retry=THREE)
    call.fails(1, code)
    call.ends(code, of=1)


def test_the_codes_that_the_policy_names_are_retried() -> None:
    call = Driven(retry=RetryPolicy(3, retryable_codes=frozenset({Code.ABORTED, Code.INTERNAL})))
    call.fails(1, Code.ABORTED)
    call.elapses()
    call.fails(2, Code.INTERNAL)
    call.elapses()
    call.fails(3, Code.UNAVAILABLE)
    call.ends(Code.UNAVAILABLE)


@pytest.mark.parametrize("retry", [None, RetryPolicy(1)])
def test_without_a_policy_nothing_is_retried(retry: RetryPolicy | None) -> None:
    call = Driven(retry=retry)
    call.fails(1, Code.UNAVAILABLE)
    call.ends(Code.UNAVAILABLE)


def test_a_call_under_a_retry_does_not_retry() -> None:
    call = Driven(retry=THREE, may_retry=False)
    call.fails(1, Code.UNAVAILABLE)
    call.ends(Code.UNAVAILABLE)


# -- backoff


def test_backoff_grows_by_the_multiplier_up_to_its_maximum() -> None:
    policy = RetryPolicy(5, initial_backoff=1.0, max_backoff=5.0, multiplier=2.0)
    backoff, rng = Backoff(policy), random.Random(1)
    for expected in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert 0.8 * expected <= backoff.delay(rng) <= 1.2 * expected
    assert repr(backoff) == "<Backoff next=5s>"


def test_backoff_is_spread_over_all_of_its_jitter() -> None:
    # 1,000 draws from U(0.8, 1.2): that none lies in the outermost 2 % at one end has a chance of 0.98^1000 < 2e-9.
    rng = random.Random(1)
    delays = [Backoff(RetryPolicy(2, initial_backoff=1.0, max_backoff=1.0)).delay(rng) for _ in range(1000)]
    assert 0.8 <= min(delays) < 0.808
    assert 1.192 < max(delays) <= 1.2


def test_an_initial_backoff_above_the_maximum_is_cut() -> None:
    assert Backoff(RetryPolicy(2, initial_backoff=9.0, max_backoff=1.0)).delay(random.Random(1)) <= 1.2


@given(st.floats(1e-9, 1e12), st.floats(1e-9, 1e12), st.floats(1e-6, 1e300))
def test_no_backoff_is_infinite_or_beyond_its_maximum(initial: float, maximum: float, multiplier: float) -> None:
    backoff, rng = Backoff(RetryPolicy(5, initial, maximum, multiplier)), random.Random(1)
    assert all(0 <= backoff.delay(rng) <= maximum * 1.2000001 for _ in range(50))


# -- pushback (docs/correctness.md, R2)


def test_pushback_of_0_retries_at_once() -> None:
    call = Driven(retry=FIVE)
    call.fails(1, Code.UNAVAILABLE, at=1.0, pushback=0.0)
    call.sends(2, previous=1)
    assert call.now == 1.0


def test_pushback_is_waited_out_exactly_without_jitter() -> None:
    call = Driven(retry=THREE)
    call.fails(1, Code.UNAVAILABLE, at=1.0, pushback=7.5)
    assert call.waits(until=8.5).until == 8.5


def test_negative_pushback_stops() -> None:
    call = Driven(retry=THREE)
    call.fails(1, Code.UNAVAILABLE, pushback=-1.0)
    call.ends(Code.UNAVAILABLE, of=1)


def test_pushback_does_not_make_a_fatal_code_retryable() -> None:
    call = Driven(retry=THREE)
    call.fails(1, Code.NOT_FOUND, pushback=0.0)
    call.ends(Code.NOT_FOUND)


def test_pushback_begins_the_backoff_anew() -> None:
    call = Driven(retry=FIVE)
    call.fails(1, Code.UNAVAILABLE)
    call.waits(until=(0.8, 1.2))
    call.elapses(at=2.0)
    call.fails(2, Code.UNAVAILABLE)
    call.waits(until=(2 + 1.6, 2 + 2.4))
    call.elapses(at=10.0)
    call.fails(3, Code.UNAVAILABLE, pushback=1.0)
    call.waits(until=11.0)
    call.elapses()
    call.fails(4, Code.UNAVAILABLE)
    call.waits(until=(11.8, 12.2))


def test_pushback_does_not_raise_the_number_of_attempts() -> None:
    call = Driven(retry=THREE)
    for number in (1, 2, 3):
        call.fails(number, Code.UNAVAILABLE, pushback=0.0)
    call.ends(Code.UNAVAILABLE, of=3)


# -- one deadline over all of it (docs/correctness.md, D1)


def test_a_backoff_that_would_reach_the_deadline_is_not_slept() -> None:
    call = Driven(retry=FIVE, deadline=1.0)
    call.fails(1, Code.UNAVAILABLE, at=0.5)
    call.ends(Code.UNAVAILABLE, "failure 1", of=1)
    assert call.now == 0.5


def test_a_pushback_that_would_reach_the_deadline_is_not_slept() -> None:
    call = Driven(retry=FIVE, deadline=5.0)
    call.fails(1, Code.UNAVAILABLE, at=1.0, pushback=4.0)
    call.ends(Code.UNAVAILABLE, of=1)


def test_each_attempt_gets_what_is_left_of_the_deadline() -> None:
    call = Driven(retry=THREE, deadline=10.0)
    assert call.sends(1).timeout == 10.0
    call.fails(1, Code.UNAVAILABLE, at=3.0, pushback=1.0)
    call.elapses()
    assert call.sends(2).timeout == 6.0


def test_an_attempts_own_timeout_holds_inside_the_deadline() -> None:
    call = Driven(retry=THREE, deadline=10.0, attempt_timeout=4.0)
    assert call.sends(1).timeout == 4.0
    call.fails(1, Code.UNAVAILABLE, at=3.0, pushback=5.0)
    call.elapses()
    assert call.sends(2).timeout == 2.0


def test_an_attempts_own_timeout_holds_without_a_deadline() -> None:
    assert Driven(attempt_timeout=4.0).sends(1).timeout == 4.0


def test_an_attempt_that_its_own_timeout_ended_is_retried_whatever_the_codes_say() -> None:
    call = Driven(retry=THREE, deadline=10.0, attempt_timeout=0.1, now=0.3)
    call.fails(1, Code.DEADLINE_EXCEEDED, at=0.3 + 0.1)
    call.elapses()
    call.sends(2)


def test_a_deadline_exceeded_that_the_server_gave_early_is_not_the_attempts_timeout() -> None:
    call = Driven(retry=THREE, deadline=10.0, attempt_timeout=1.0)
    call.fails(1, Code.DEADLINE_EXCEEDED, at=0.5)
    call.ends(Code.DEADLINE_EXCEEDED)


def test_an_attempt_that_does_not_begin_to_answer_in_time_is_cancelled_and_retried_whatever_the_codes_say() -> None:
    call = Driven(retry=THREE, receive_timeout=0.1)
    assert call.sends(1, until=0.1).timeout is None
    call.elapses(at=0.05)
    call.waits(until=0.1)
    call.elapses()
    call.cancels(1)
    call.is_cancelled(1, at=0.11)
    call.elapses()
    call.sends(2, previous=1)


def test_an_attempt_that_has_begun_to_answer_may_last() -> None:
    call = Driven(retry=THREE, receive_timeout=0.1)
    call.answers(1, at=0.05)
    call.commits(1)
    call.happens(Elapsed(0.2))
    call.waits()
    call.succeeds(1, at=9.0)
    call.ends(Code.OK, of=1)


def test_without_attempts_left_a_late_answer_is_deadline_exceeded() -> None:
    call = Driven(receive_timeout=0.1)
    call.elapses()
    call.cancels(1)
    call.answers(1)  # too late: it is cancelled
    call.waits()
    call.is_cancelled(1)
    call.ends(Code.DEADLINE_EXCEEDED, "no response within perAttemptRecvTimeout, 0.1 s", of=1)


def test_an_attempt_that_ended_just_before_it_is_cancelled_keeps_its_outcome() -> None:
    call = Driven(retry=THREE, receive_timeout=0.1)
    call.elapses()
    call.cancels(1)
    call.succeeds(1)
    call.ends(Code.OK, of=1)


def test_an_attempt_that_the_calls_deadline_ended_is_final() -> None:
    call = Driven(retry=THREE, deadline=1.0, attempt_timeout=1.0)
    call.fails(1, Code.DEADLINE_EXCEEDED, at=1.0)
    call.ends(Code.DEADLINE_EXCEEDED, of=1)


def test_woken_after_the_deadline_a_retry_is_not_sent() -> None:
    call = Driven(retry=FIVE, deadline=2.0)
    call.fails(1, Code.UNAVAILABLE)
    call.elapses(at=2.0)
    call.ends(Code.UNAVAILABLE, "failure 1", of=1)
    assert len(call.call.attempts) == 1


def test_woken_too_early_a_retry_still_waits_for_its_time() -> None:
    call = Driven(retry=FIVE)
    call.fails(1, Code.UNAVAILABLE)
    until = call.waits(until=(0.8, 1.2)).until
    call.elapses(at=0.1)
    assert call.waits(until=(0.8, 1.2)).until == until


# -- budget and throttle (docs/correctness.md, R5 and R6)


def test_an_empty_budget_ends_the_call_with_its_failure() -> None:
    call = Driven(retry=THREE, cluster=cluster_of(config=NO_BUDGET))
    call.fails(1, Code.UNAVAILABLE)
    call.ends(Code.UNAVAILABLE, of=1)


def test_a_retry_in_backoff_has_been_taken_from_the_budget() -> None:
    cluster = cluster_of(config=ServiceConfig(budget=BudgetConfig(0.0, 0.1)))  # a reserve of one
    first, second = Driven(retry=FIVE, cluster=cluster), Driven(retry=FIVE, cluster=cluster)
    first.fails(1, Code.UNAVAILABLE)
    second.fails(1, Code.UNAVAILABLE)
    first.waits(until=(0.8, 1.2))
    second.ends(Code.UNAVAILABLE)


def test_a_retry_that_is_not_made_costs_nothing() -> None:
    cluster = cluster_of(config=ServiceConfig(budget=BudgetConfig(0.0, 0.1)))
    refused = Driven(retry=FIVE, deadline=0.5, cluster=cluster)
    refused.fails(1, Code.UNAVAILABLE)
    refused.ends(Code.UNAVAILABLE)
    other = Driven(retry=FIVE, cluster=cluster)
    other.fails(1, Code.UNAVAILABLE)
    other.waits(until=(0.8, 1.2))


def throttled(tokens: float, ratio: float = 0.5) -> ServiceConfig:
    return ServiceConfig(throttle=ThrottleConfig(tokens, ratio))


def test_the_throttle_stops_retries_at_half_of_its_tokens() -> None:
    cluster = cluster_of(config=throttled(4))
    call = Driven(retry=FIVE, cluster=cluster)
    call.fails(1, Code.UNAVAILABLE)  # 3 of 4
    call.elapses()
    call.fails(2, Code.UNAVAILABLE)  # 2 of 4: half is not above half
    call.ends(Code.UNAVAILABLE, of=2)


def test_successes_open_the_throttle_again() -> None:
    cluster = cluster_of(config=throttled(4))
    for _ in range(2):
        Driven(cluster=cluster, retry=FIVE).fails(1, Code.UNAVAILABLE)
    for _ in range(3):
        Driven(cluster=cluster).succeeds(1)
    call = Driven(retry=FIVE, cluster=cluster)  # 3.5, and 2.5 after this failure
    call.fails(1, Code.UNAVAILABLE)
    call.waits(until=(0.8, 1.2))


@pytest.mark.parametrize(
    ("code", "pushback", "tokens"),
    [
        (Code.UNAVAILABLE, None, 3),
        (Code.UNAVAILABLE, -1.0, 3),
        (Code.NOT_FOUND, -1.0, 3),
        (Code.NOT_FOUND, None, 4),
        (Code.NOT_FOUND, 1.0, 4),
    ],
)
def test_only_what_a_retry_is_for_or_may_not_follow_takes_a_token(
    code: Code, pushback: float | None, tokens: int
) -> None:
    cluster = cluster_of(config=throttled(4))
    Driven(retry=FIVE, cluster=cluster).fails(1, code, pushback=pushback)
    assert repr(cluster.throttle) == f"<Throttle {tokens}/4>"


def test_a_failure_takes_a_token_also_when_it_is_final() -> None:
    cluster = cluster_of(config=throttled(4))
    Driven(retry=FIVE, cluster=cluster).fails(1, Code.UNAVAILABLE, committed=True)
    call = Driven(retry=FIVE, cluster=cluster)
    call.answers(1)
    call.fails(1, Code.UNAVAILABLE)
    Driven(retry=FIVE, cluster=cluster, may_retry=False).fails(1, Code.UNAVAILABLE)
    assert repr(cluster.throttle) == "<Throttle 1/4>"


def test_a_method_without_retries_takes_no_token() -> None:
    cluster = cluster_of(config=throttled(4))
    Driven(cluster=cluster).fails(1, Code.UNAVAILABLE)
    assert repr(cluster.throttle) == "<Throttle 4/4>"


# -- transparent retries (docs/correctness.md, R3)


def test_what_was_never_sent_goes_elsewhere_at_once_and_costs_nothing() -> None:
    call = Driven(retry=THREE, cluster=cluster_of(config=throttled(4)))
    call.never_sends(1)
    call.sends(2, previous=0)
    call.never_sends(2)
    call.sends(3, previous=0)
    assert len(set(call.addresses)) == 3
    assert repr(call.cluster.throttle) == "<Throttle 4/4>"
    call.succeeds(3)
    call.ends(Code.OK, of=3)


def test_what_was_never_sent_is_no_attempt_of_the_policys() -> None:
    call = Driven(retry=RetryPolicy(2), cluster=cluster_of(8))
    call.never_sends(1)
    call.never_sends(2)
    call.fails(3, Code.UNAVAILABLE)
    call.elapses()
    call.sends(4, previous=1)
    call.never_sends(4)
    call.sends(5, previous=1)
    call.fails(5, Code.UNAVAILABLE)
    call.ends(Code.UNAVAILABLE, of=5)


def test_what_was_never_sent_is_sent_again_without_policy_budget_or_leave_to_retry() -> None:
    call = Driven(may_retry=False, cluster=cluster_of(config=NO_BUDGET))
    call.never_sends(1)
    call.sends(2)


def test_what_no_endpoint_can_send_is_tried_again_after_a_pause_and_does_not_spin() -> None:
    call = Driven(cluster=cluster_of(2), deadline=1.0)
    call.never_sends(1)
    call.never_sends(2)
    call.waits(until=0.01)
    call.elapses()
    call.sends(3, previous=0)
    call.never_sends(3, at=0.995)
    call.ends(Code.DEADLINE_EXCEEDED)


def test_what_no_endpoint_can_send_fails_in_the_end_also_without_a_deadline() -> None:
    call = Driven(cluster=cluster_of(2), wait_for_ready=True)
    call.never_sends(1)
    number = 2
    while call.verdict is None:
        call.never_sends(number)
        if isinstance(call.step, Wait):
            call.elapses()
        number += 1
    verdict = call.ends(Code.UNAVAILABLE, "no connection", of=10)
    assert verdict.outcome.never_sent
    assert call.now == pytest.approx(0.01 + 0.02 + 0.04 + 0.08 + 0.16 + 0.32 + 0.64 + 1.28)


def test_what_no_endpoint_can_send_is_retried_in_the_end_as_the_policy_says() -> None:
    call = Driven(retry=RetryPolicy(2), cluster=cluster_of(1))
    for number in range(1, 10):
        call.never_sends(number)
        call.elapses()
    call.sends(10, previous=0)
    call.never_sends(10)
    call.ends(Code.UNAVAILABLE, of=10)


def test_what_was_never_sent_waits_for_an_endpoint_when_all_are_lost() -> None:
    call = Driven(deadline=1.0)
    set_states(call.cluster, Connectivity.CONNECTING)
    call.never_sends(1, at=0.1)
    assert call.waits(until=1.0).picker is call.cluster.picker


def test_a_failure_is_the_calls_when_no_endpoint_is_left_for_the_retry() -> None:
    call = Driven(retry=THREE)
    call.fails(1, Code.UNAVAILABLE)
    set_states(call.cluster, Connectivity.TRANSIENT_FAILURE)
    call.elapses()
    call.ends(Code.UNAVAILABLE, "failure 1", of=1)


def test_a_retry_waits_for_an_endpoint_and_ends_at_the_deadline_with_its_failure() -> None:
    call = Driven(retry=THREE, deadline=1.0)
    call.fails(1, Code.UNAVAILABLE)
    set_states(call.cluster, Connectivity.CONNECTING)
    call.elapses()
    call.waits(until=1.0)
    call.elapses()
    call.ends(Code.UNAVAILABLE, "failure 1", of=1)


# -- where to (docs/correctness.md, R7)


@pytest.mark.parametrize("seed", range(5))
def test_every_endpoint_is_tried_before_one_is_tried_again(seed: int) -> None:
    policy = RetryPolicy(5, initial_backoff=0.01, max_backoff=0.01)
    call = Driven(retry=policy, cluster=cluster_of(2), seed=seed)
    for number in (1, 2, 3, 4):
        call.fails(number, Code.UNAVAILABLE)
        call.elapses()
    first, second = call.addresses[:2]
    assert call.addresses == [first, second, first, second, first]
    assert first != second


def test_the_only_endpoint_is_tried_again() -> None:
    call = Driven(retry=THREE, cluster=cluster_of(1))
    call.fails(1, Code.UNAVAILABLE)
    call.elapses()
    call.sends(2)
    assert call.addresses == ["e0", "e0"]


# -- commit (docs/correctness.md, R1)


def test_a_failure_after_the_headers_is_final() -> None:
    call = Driven(retry=THREE)
    call.answers(1)
    call.commits(1)
    call.fails(1, Code.UNAVAILABLE)
    call.ends(Code.UNAVAILABLE, of=1)


def test_a_failure_after_more_was_sent_than_is_kept_is_final() -> None:
    call = Driven(retry=THREE)
    call.overflows(1)
    call.commits(1)
    call.fails(1, Code.UNAVAILABLE, pushback=0.0)
    call.ends(Code.UNAVAILABLE)


def test_a_failure_that_says_the_server_had_begun_to_answer_is_final() -> None:
    call = Driven(retry=THREE)
    call.fails(1, Code.UNAVAILABLE, committed=True)
    call.ends(Code.UNAVAILABLE)


def test_what_was_handed_over_is_never_sent_again_even_if_it_never_left() -> None:
    call = Driven(retry=THREE)
    call.overflows(1)
    call.never_sends(1)
    call.ends(Code.UNAVAILABLE, of=1)


def test_an_attempt_is_handed_over_once() -> None:
    call = Driven(retry=THREE)
    call.overflows(1)
    call.commits(1)
    call.answers(1)
    call.waits()
    call.answers(1)
    call.waits()
    call.succeeds(1)
    call.ends(Code.OK, of=1)


def test_an_attempt_handed_over_that_succeeds_is_the_call() -> None:
    call = Driven(retry=THREE, deadline=5.0)
    call.answers(1, at=1.0)
    call.commits(1)
    assert call.in_flight == 1
    call.succeeds(1, at=4.0)
    call.ends(Code.OK, of=1)


# -- cancels


def test_an_attempt_that_was_cancelled_ends_the_call_whatever_the_policy() -> None:
    call = Driven(retry=RetryPolicy(3, retryable_codes=frozenset({Code.CANCELLED})))
    call.ended(1, Outcome(Code.CANCELLED, cancelled=True))
    call.ends(Code.CANCELLED, of=1)


def test_a_cancel_that_the_server_sent_is_a_code_like_others() -> None:
    call = Driven(retry=RetryPolicy(3, retryable_codes=frozenset({Code.CANCELLED})))
    call.fails(1, Code.CANCELLED)
    call.elapses()
    call.sends(2)


# -- waking up


def test_a_wake_up_for_an_attempt_that_is_over_changes_nothing() -> None:
    call = Driven(retry=FIVE)
    call.fails(1, Code.UNAVAILABLE)
    until = call.waits(until=(0.8, 1.2)).until
    call.fails(1, Code.NOT_FOUND)
    call.answers(1)
    call.overflows(7)
    assert call.waits(until=(0.8, 1.2)).until == until
    assert call.in_flight == 0


def test_spurious_wake_ups_leave_an_attempt_running() -> None:
    call = Driven(retry=THREE, deadline=9.0)
    for at in (0.0, 1.0, 20.0):
        call.elapses(at=at)
        call.waits()
    assert call.in_flight == 1
    call.succeeds(1)
    call.ends(Code.OK)


def test_without_a_deadline_an_attempt_has_no_end() -> None:
    call = Driven(deadline=inf)
    assert call.sends(1, until=None).timeout is None
