"""Attempts that a server refused (HTTP/2's REFUSED_STREAM) go again once, and cost nothing (A6, FIELD 6.5)."""

from __future__ import annotations

from mesh.config import RetryPolicy
from mesh.model import Code, Outcome
from tests.policy.driving import Driven, cluster_of

REFUSED = Outcome(Code.UNAVAILABLE, refused=True)


def test_what_was_refused_goes_elsewhere_once_without_leave_to_retry() -> None:
    call = Driven(may_retry=False)
    call.ended(1, REFUSED)
    call.sends(2, previous=0)
    assert len(set(call.addresses)) == 2
    call.ended(2, REFUSED)
    call.ends(Code.UNAVAILABLE, of=2)


def test_what_was_refused_is_no_attempt_of_the_policys() -> None:
    call = Driven(retry=RetryPolicy(2), cluster=cluster_of(8))
    call.ended(1, REFUSED)
    call.sends(2, previous=0)
    call.ended(2, REFUSED)  # a failure like another now
    call.elapses()
    call.sends(3, previous=1)
    call.succeeds(3)
    call.ends(Code.OK, of=3)


def test_what_was_refused_after_the_server_had_begun_to_answer_is_a_failure() -> None:
    call = Driven()
    call.ended(1, Outcome(Code.UNAVAILABLE, refused=True, committed=True))
    call.ends(Code.UNAVAILABLE, of=1)


def test_it_is_seen_in_an_outcomes_words() -> None:
    assert repr(REFUSED) == "<Outcome UNAVAILABLE refused>"
