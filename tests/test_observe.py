"""What ``explain()`` tells of a call: while it runs, when it is over, and in words."""

from __future__ import annotations

import pytest

from mesh.codes import Code
from mesh.config.settings import HedgingPolicy, RetryPolicy
from mesh.observe import AttemptRecord, Explanation, explain
from tests.policy.driving import METHOD, Driven, cluster_of

TARGET = "mesh:///weft.test.v1.Test"
ONCE = RetryPolicy(2, initial_backoff=1.0, max_backoff=1.0)


def explained(call: Driven) -> Explanation:
    return explain(call.call, TARGET, call.verdict, call.now)


def test_a_call_that_runs_has_no_end_yet() -> None:
    call = Driven(cluster=cluster_of(1), now=5.0)
    call.elapses(at=6.0)
    assert explained(call) == Explanation(
        METHOD, TARGET, "RUNNING", "", None, (AttemptRecord(1, "e0", 0.0, None, "RUNNING", ""),)
    )
    assert str(explained(call)) == f"{METHOD} to {TARGET}: RUNNING\n  attempt 1 to e0 at +0.0 ms: RUNNING"


def test_a_call_that_retried_tells_of_both_attempts() -> None:
    call = Driven(retry=ONCE, cluster=cluster_of(1), now=100.0)
    call.fails(1, Code.UNAVAILABLE, at=100.25, pushback=0.5)
    call.elapses()
    call.succeeds(2, at=100.8)
    explanation = explained(call)
    assert (explanation.code, explanation.details) == ("OK", "")
    assert explanation.seconds == pytest.approx(0.8)
    first, second = explanation.attempts
    assert (first.number, first.code, first.details, first.seconds) == (1, "UNAVAILABLE", "failure 1", 0.25)
    assert (second.number, second.code, second.started) == (2, "OK", 0.75)
    assert str(explanation).splitlines() == [
        f"{METHOD} to {TARGET}: OK after 800.0 ms",
        "  attempt 1 to e0 at +0.0 ms: UNAVAILABLE after 250.0 ms: failure 1",
        "  attempt 2 to e0 at +750.0 ms: OK after 50.0 ms",
    ]


def test_an_attempt_that_never_left_says_so() -> None:
    call = Driven(cluster=cluster_of(2))
    call.never_sends(1, at=0.001)
    call.succeeds(2, at=0.002)
    assert [attempt.code for attempt in explained(call).attempts] == ["NEVER_SENT", "OK"]
    assert "NEVER_SENT after 1.0 ms: no connection" in str(explained(call))


def test_a_call_that_the_mesh_itself_ended_has_no_attempt() -> None:
    call = Driven(deadline=1.0, now=2.0)
    assert str(explained(call)) == (
        f"{METHOD} to {TARGET}: DEADLINE_EXCEEDED after 0.0 ms: the deadline had passed before the call was sent"
    )
    assert explained(call).attempts == ()


def test_the_loser_of_a_hedge_was_cancelled_because_another_won() -> None:
    call = Driven(hedge=HedgingPolicy(2, delay=1.0))
    call.elapses()
    call.succeeds(2, at=1.5)
    loser, winner = explained(call).attempts
    assert (loser.code, loser.seconds, loser.details) == ("CANCELLED", 1.5, "another attempt answered first")
    assert (winner.code, winner.started, winner.seconds) == ("OK", 1.0, 0.5)


def test_an_explanation_is_of_its_instant() -> None:
    call = Driven(cluster=cluster_of(1))
    before = explained(call)
    call.succeeds(1)
    assert before.attempts[0].code == "RUNNING"
    assert explained(call).attempts[0].code == "OK"
