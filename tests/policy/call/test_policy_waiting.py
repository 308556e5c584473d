"""Calls while no endpoint can take them: who waits, who fails at once, and in which words; and calls given up."""

from __future__ import annotations

from math import inf

import pytest

from mesh.codes import Code
from mesh.config.settings import HedgingPolicy, MethodPolicy, RetryPolicy
from mesh.model import Connectivity, Endpoint, Outcome
from mesh.policy.call.deadline import deadline_of
from tests.policy.driving import Driven, cluster_of, set_states


def test_a_call_waits_for_an_endpoint_while_one_is_connecting() -> None:
    cluster = cluster_of()
    set_states(cluster, Connectivity.CONNECTING)
    call = Driven(cluster=cluster, deadline=5.0)
    assert call.waits(until=5.0).picker is cluster.picker
    set_states(cluster, Connectivity.READY)
    call.elapses(at=1.0)
    assert call.sends(1).timeout == 4.0


def test_without_a_deadline_it_waits_for_an_endpoint_alone() -> None:
    cluster = cluster_of()
    set_states(cluster, Connectivity.IDLE)
    call = Driven(cluster=cluster)
    assert call.waits(until=None).picker is cluster.picker


def test_it_waits_on_when_woken_for_nothing() -> None:
    cluster = cluster_of()
    set_states(cluster, Connectivity.CONNECTING)
    call = Driven(cluster=cluster, deadline=5.0)
    call.elapses(at=1.0)
    call.waits(until=5.0)


def test_waiting_ends_at_the_deadline_and_says_what_for() -> None:
    cluster = cluster_of()
    set_states(cluster, Connectivity.CONNECTING)
    call = Driven(cluster=cluster, deadline=5.0)
    call.elapses()
    call.ends(
        Code.DEADLINE_EXCEEDED, "test: 0 of 3 endpoints connected after 5.0 s: e0 CONNECTING for 5.0 s, e1 CONNECTING"
    )
    assert call.call.attempts == []


def test_a_call_fails_at_once_when_all_endpoints_have_failed() -> None:
    cluster = cluster_of()
    set_states(cluster, Connectivity.TRANSIENT_FAILURE)
    cluster.causes = {"e1": "connection refused"}
    call = Driven(cluster=cluster, deadline=5.0)
    call.ends(Code.UNAVAILABLE, "test: 0 of 3 endpoints connected: e1: connection refused, e0 TRANSIENT_FAILURE for")


def test_a_call_that_waits_for_ready_waits_though_all_have_failed() -> None:
    cluster = cluster_of()
    set_states(cluster, Connectivity.TRANSIENT_FAILURE)
    call = Driven(cluster=cluster, deadline=5.0, wait_for_ready=True)
    call.waits(until=5.0)
    set_states(cluster, Connectivity.READY)
    call.elapses(at=1.0)
    call.sends(1)


def test_a_call_that_waits_for_ready_ends_at_its_deadline() -> None:
    cluster = cluster_of()
    set_states(cluster, Connectivity.TRANSIENT_FAILURE)
    call = Driven(cluster=cluster, deadline=5.0, wait_for_ready=True)
    call.elapses()
    call.ends(Code.DEADLINE_EXCEEDED, "0 of 3 endpoints connected after 5.0 s: e0 TRANSIENT_FAILURE for 5.0 s")


def test_while_the_registry_is_away_calls_wait_and_then_name_it() -> None:
    cluster = cluster_of(0)
    cluster.resolver_error("registry 10.0.0.1:50050 is unavailable", final=False)
    call = Driven(cluster=cluster, deadline=5.0)
    call.waits(until=5.0)
    call.elapses()
    call.ends(Code.UNAVAILABLE, "test: registry 10.0.0.1:50050 is unavailable")


def test_before_anything_is_known_calls_wait() -> None:
    cluster = cluster_of(0)
    call = Driven(cluster=cluster, deadline=5.0)
    call.waits(until=5.0)
    call.elapses()
    call.ends(Code.DEADLINE_EXCEEDED, "test: the resolver has not answered for 5.0 s")


def test_a_final_word_from_the_resolver_fails_calls_at_once() -> None:
    cluster = cluster_of(0)
    cluster.resolver_error("no such host", final=True)
    Driven(cluster=cluster).ends(Code.UNAVAILABLE, "test: no such host")


def test_a_service_without_instances_fails_calls_at_once() -> None:
    cluster = cluster_of(0)
    cluster.update([], "registry R has no instances of 'S'")
    Driven(cluster=cluster).ends(Code.UNAVAILABLE, "test: registry R has no instances of 'S'")


@pytest.mark.parametrize("deadline", [1.0, 0.5, -3.0])
def test_a_call_whose_deadline_has_passed_is_never_sent(deadline: float) -> None:
    call = Driven(deadline=deadline, now=1.0)
    call.ends(Code.DEADLINE_EXCEEDED, "the deadline had passed before the call was sent")
    assert call.call.attempts == []


def test_a_call_that_waited_too_long_is_never_sent() -> None:
    cluster = cluster_of()
    set_states(cluster, Connectivity.CONNECTING)
    call = Driven(cluster=cluster, deadline=5.0)
    set_states(cluster, Connectivity.READY)
    call.elapses(at=5.0)
    call.ends(Code.DEADLINE_EXCEEDED, "test: not sent within 5.0 s; ready endpoints: 3")


def test_an_endpoint_that_leaves_the_set_gives_back_what_was_in_flight_there() -> None:
    call = Driven(cluster=cluster_of(1))
    node = call.cluster.nodes["e0"]
    call.cluster.update([Endpoint("new")])
    call.succeeds(1)
    call.ends(Code.OK)
    assert node.in_flight == 0


# -- a call that is given up


def test_a_call_given_up_before_its_first_step_is_nothing() -> None:
    cluster = cluster_of()
    set_states(cluster, Connectivity.CONNECTING)
    call = Driven(cluster=cluster)
    call.close()
    assert call.in_flight == 0


def test_a_call_given_up_frees_what_is_in_flight_and_says_so() -> None:
    call = Driven(hedge=HedgingPolicy(2, delay=1.0))
    call.elapses()
    assert call.in_flight == 2
    call.close()
    assert call.in_flight == 0
    for attempt in call.call.attempts:
        assert attempt.ended is None
        assert attempt.outcome is not None
        assert (attempt.outcome.cancelled, attempt.outcome.details) == (True, "the call was cancelled")


def test_a_call_given_up_in_backoff_frees_nothing_twice() -> None:
    call = Driven(retry=RetryPolicy(3))
    call.fails(1, Code.UNAVAILABLE)
    call.close()
    assert call.in_flight == 0


def test_a_call_given_up_counts_for_nothing() -> None:
    call = Driven(cluster=cluster_of(1))
    call.close()
    assert call.cluster.nodes["e0"].cost == 0.0
    assert repr(call.call.attempts[0]).startswith("<Attempt 1 to e0 <Outcome CANCELLED")


def test_a_call_whose_attempt_was_committed_can_be_given_up() -> None:
    call = Driven()
    call.answers(1)
    call.close()
    assert call.in_flight == 0


def test_closing_a_call_that_is_over_is_harmless() -> None:
    call = Driven()
    call.ended(1, Outcome(Code.OK))
    call.close()
    call.ends(Code.OK)


# -- the deadline of a call


@pytest.mark.parametrize(
    ("timeout", "inherited", "policy", "expected"),
    [
        (None, None, MethodPolicy(), inf),
        (3.0, None, MethodPolicy(), 103.0),
        (None, None, MethodPolicy(default_timeout=2.0), 102.0),
        (3.0, None, MethodPolicy(default_timeout=2.0), 103.0),
        (None, None, MethodPolicy(timeout=1.0), 101.0),
        (3.0, None, MethodPolicy(timeout=1.0), 101.0),
        (3.0, None, MethodPolicy(timeout=9.0), 103.0),
        (None, 104.0, MethodPolicy(), 104.0),
        (3.0, 104.0, MethodPolicy(), 103.0),
        (5.0, 104.0, MethodPolicy(), 104.0),
        (5.0, 104.0, MethodPolicy(timeout=1.0), 101.0),
        (-1.0, None, MethodPolicy(), 99.0),
        (0.0, None, MethodPolicy(), 100.0),
    ],
)
def test_a_calls_deadline_is_the_earliest_of_all_that_bound_it(
    timeout: float | None, inherited: float | None, policy: MethodPolicy, expected: float
) -> None:
    assert deadline_of(100.0, timeout, inherited, policy) == expected
