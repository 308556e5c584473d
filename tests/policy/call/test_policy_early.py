"""Calls made before the service config is known wait for it, and then are as any other."""

from __future__ import annotations

import random
from math import inf
from typing import Any

import pytest

from mesh.codes import Code
from mesh.config.settings import MethodPolicy
from mesh.model import Attempt, Connectivity, Elapsed, Ended, Endpoint, Outcome, Verdict, Wait, Wake
from mesh.policy.call.early import PENDING, EarlyCall, early_flow
from mesh.policy.cluster.cluster import Cluster
from tests.policy.driving import METHOD, cluster_of, set_states

POLICY = MethodPolicy(timeout=3.0, attempt_timeout=1.0)


class Early:
    """A call of a cluster that nothing is known of, begun at 10.0. ``told``: its config is known."""

    def __init__(self, cluster: Cluster, deadline: float = inf, *, wait_for_ready: bool = False) -> None:
        self.told = False
        self.verdict: Verdict | None = None
        self.step: Any = None
        self.call = EarlyCall(METHOD, PENDING, deadline, wait_for_ready=wait_for_ready, apply_policy=self._apply_policy)
        self._flow = early_flow(self.call, cluster, random.Random(1), 10.0)
        self.happens(None)

    def _apply_policy(self, call: EarlyCall) -> None:
        if self.told:
            call.policy = POLICY
            call.deadline = min(call.deadline, 10.0 + POLICY.timeout)

    def happens(self, wake: Wake | None) -> None:
        try:
            self.step = self._flow.send(wake)  # type: ignore[arg-type]
        except StopIteration as stop:
            self.step, self.verdict = None, stop.value

    def waits(self) -> Wait:
        assert isinstance(self.step, Wait), self.step
        return self.step

    def ends(self, code: Code, details: str) -> None:
        assert self.verdict is not None
        assert (self.verdict.outcome.code, self.verdict.outcome.details) == (code, details)
        assert self.call.attempts == []


@pytest.mark.parametrize("deadline", [inf, 20.0])
def test_it_waits_for_the_first_resolution_and_then_has_its_methods_policy(deadline: float) -> None:
    cluster = cluster_of(0)
    early = Early(cluster, deadline)
    assert early.waits().until == (None if deadline == inf else deadline)
    assert early.waits().picker is cluster.picker, "what it waits for replaces the picker"
    early.happens(Elapsed(11.0))
    early.waits()

    early.told = True
    cluster.update([Endpoint("e0")])
    set_states(cluster, Connectivity.READY)
    early.happens(Elapsed(12.5))
    step = early.step
    assert isinstance(step, Attempt)
    assert step.timeout == pytest.approx(0.5), "the method's timeout began with the call"
    assert early.call.started == 10.0
    early.happens(Ended(12.6, 1, Outcome(Code.OK)))
    assert early.verdict is not None
    assert early.verdict.outcome.code == Code.OK


def test_it_ends_at_its_deadline() -> None:
    early = Early(cluster_of(0), 11.0)
    early.happens(Elapsed(11.0))
    early.ends(Code.DEADLINE_EXCEEDED, "test: the resolver has not answered for 1.0 s")


def test_it_ends_at_its_methods_timeout_when_that_is_over_by_then() -> None:
    early = Early(cluster_of(0))
    early.told = True
    early.happens(Elapsed(13.5))
    early.ends(Code.DEADLINE_EXCEEDED, "test: the resolver has not answered for 3.5 s")


def test_it_fails_when_nobody_can_say_who_is_there_unless_it_waits_for_ready() -> None:
    cluster = cluster_of(0)
    failing, waiting = Early(cluster), Early(cluster, wait_for_ready=True)
    cluster.resolver_error("registry refuses", final=True)
    for early in (failing, waiting):
        early.happens(Elapsed(10.5))
    failing.ends(Code.UNAVAILABLE, "test: registry refuses")
    waiting.waits()


def test_a_policy_that_stays_unknown_is_waited_for() -> None:
    call = EarlyCall(METHOD, PENDING, inf)
    assert isinstance(next(early_flow(call, cluster_of(0), random.Random(1), 0.0)), Wait)
