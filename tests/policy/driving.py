"""Drives a flow by hand in virtual time, so that a test reads as a case of A6 does:

    call = Driven(retry=RetryPolicy(3))
    call.sends(1)
    call.fails(1, Code.UNAVAILABLE, at=0.1)
    call.waits(until=(0.12, 0.13))
    call.elapses()
    call.sends(2, previous=1)
    call.succeeds(2)
    call.ends(Code.OK)

Each word either tells the flow what happened (fails, succeeds, elapses, answers, overflows) or holds what the flow
then does (sends, waits, commits, cancels, ends).
"""

from __future__ import annotations

import contextlib
import random
from math import inf

import pytest

from mesh.codes import Code
from mesh.config.settings import NEVER_HEDGE, HedgingPolicy, MethodPolicy, RetryPolicy, ServiceConfig
from mesh.model import (
    Attempt,
    CallSpec,
    Cancel,
    Commit,
    Connectivity,
    Elapsed,
    Ended,
    Endpoint,
    Headers,
    Metadatum,
    Outcome,
    Overflow,
    Step,
    Verdict,
    Wait,
    Wake,
)
from mesh.policy.call.flow import call_flow
from mesh.policy.cluster.cluster import Cluster

METHOD = "/weft.test.v1.Test/Do"
ANY = -1.0


def cluster_of(ready: int = 3, config: ServiceConfig | None = None, *, seed: int = 1, now: float = 0.0) -> Cluster:
    """A cluster of so many endpoints (e0, e1, ...), all READY."""
    cluster = Cluster("test", config or ServiceConfig(), random.Random(seed), now, contextlib.nullcontext)
    if ready:
        cluster.update(Endpoint(f"e{index}") for index in range(ready))
        set_states(cluster, Connectivity.READY)
    return cluster


def set_states(cluster: Cluster, state: Connectivity) -> None:
    """Put all endpoints into ``state``."""
    cluster.update_states([(address, state) for address in cluster.nodes])


class Driven:
    """One call and its flow, driven by hand. ``now`` is where its time stands; ``step`` what it does there."""

    def __init__(
        self,
        *,
        retry: RetryPolicy | None = None,
        hedge: HedgingPolicy = NEVER_HEDGE,
        deadline: float = inf,
        attempt_timeout: float = inf,
        receive_timeout: float = inf,
        wait_for_ready: bool = False,
        may_retry: bool = True,
        metadata: tuple[Metadatum, ...] | None = None,
        cluster: Cluster | None = None,
        seed: int = 1,
        now: float = 0.0,
    ) -> None:
        self.cluster = cluster or cluster_of(seed=seed, now=now)
        policy = MethodPolicy(
            retry=retry, hedge=hedge, attempt_timeout=attempt_timeout, receive_timeout=receive_timeout
        )
        self.call = CallSpec(METHOD, policy, deadline, metadata, wait_for_ready, may_retry)
        self.now = now
        self.verdict: Verdict | None = None
        self.step: Step | None = None
        self._flow = call_flow(self.call, self.cluster, random.Random(seed), now)
        self._advance(None)

    # -- what happened

    def happens(self, wake: Wake) -> None:
        """Send any wake-up."""
        assert self.verdict is None, "the call is over"
        self.now = wake.now
        self._advance(wake)

    def ended(self, number: int, outcome: Outcome, at: float | None = None) -> None:
        self.happens(Ended(self._at(at), number, outcome))

    def fails(
        self,
        number: int,
        code: Code,
        at: float | None = None,
        *,
        pushback: float | None = None,
        committed: bool = False,
    ) -> None:
        self.ended(number, Outcome(code, f"failure {number}", pushback=pushback, committed=committed), at)

    def succeeds(self, number: int, at: float | None = None) -> None:
        self.ended(number, Outcome(Code.OK), at)

    def is_cancelled(self, number: int, at: float | None = None) -> None:
        """Its cancellation by this side is reported."""
        self.ended(number, Outcome(Code.CANCELLED, "cancelled", cancelled=True), at)

    def never_sends(self, number: int, at: float | None = None) -> None:
        self.ended(number, Outcome(Code.UNAVAILABLE, "no connection", never_sent=True), at)

    def answers(self, number: int, at: float | None = None) -> None:
        """The server's headers are here."""
        self.happens(Headers(self._at(at), number))

    def overflows(self, number: int, at: float | None = None) -> None:
        self.happens(Overflow(self._at(at), number))

    def elapses(self, at: float | None = None) -> None:
        """Time passes: until the step's end, or until ``at``."""
        assert isinstance(self.step, Attempt | Wait)
        if at is None:
            assert self.step.until is not None, "the step waits for an event, not for a time"
            at = self.step.until
        self.happens(Elapsed(at))

    def close(self) -> None:
        """The caller gives the call up."""
        self._flow.close()

    # -- what the flow does then

    def sends(self, number: int, *, previous: int | None = None, until: float | None = ANY) -> Attempt:
        """It starts an attempt, and waits until an instant; None: until something happens."""
        step = self.step
        assert isinstance(step, Attempt), step
        assert step.number == number
        assert step.started == self.now
        if until != ANY:
            assert step.until == (None if until is None else pytest.approx(until))
        if previous is not None:
            assert step.previous == previous
        return step

    def waits(self, until: float | tuple[float, float] | None = None) -> Wait:
        """It waits: until an instant, one between two, or (None) until something happens."""
        step = self.step
        assert isinstance(step, Wait), step
        if isinstance(until, tuple):
            assert step.until is not None
            assert until[0] <= step.until <= until[1]
        else:
            assert step.until == (None if until is None else pytest.approx(until))
        return step

    def commits(self, number: int) -> None:
        assert isinstance(self.step, Commit), self.step
        assert self.step.number == number

    def cancels(self, number: int) -> None:
        assert isinstance(self.step, Cancel), self.step
        assert self.step.number == number

    def ends(self, code: Code, details: str | None = None, *, of: int | None = None) -> Verdict:
        """The call is over, with the outcome of attempt ``of`` if given; nothing is in flight."""
        verdict = self.verdict
        assert verdict is not None, self.step
        assert verdict.outcome.code == code
        if details is not None:
            assert details in verdict.outcome.details
        if of is not None:
            assert verdict.attempt is self.call.attempts[of - 1]
        assert self.in_flight == 0
        return verdict

    # -- what can be seen

    @property
    def in_flight(self) -> int:
        return sum(node.in_flight for node in self.cluster.nodes.values())

    @property
    def addresses(self) -> list[str]:
        """Where the attempts went, in their order."""
        return [attempt.endpoint.address for attempt in self.call.attempts]

    def _at(self, at: float | None) -> float:
        return self.now if at is None else at

    def _advance(self, wake: Wake | None) -> None:
        try:
            self.step = self._flow.send(wake)  # type: ignore[arg-type]
        except StopIteration as stop:
            self.step, self.verdict = None, stop.value
