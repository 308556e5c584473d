"""What holds for every call, whatever happens to it: the laws at the head of policy/call/flow.py, on random events."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh.codes import Code
from mesh.config.settings import HedgingPolicy, RetryPolicy
from mesh.model import Attempt, Cancel, Commit, Connectivity, Elapsed, Ended, Endpoint, Headers, Outcome, Overflow, Wait
from tests.policy.driving import Driven, cluster_of

CODES = frozenset({Code.UNAVAILABLE, Code.ABORTED})
RETRIES = st.builds(RetryPolicy, st.integers(1, 5), st.just(0.5), st.just(2.0), st.just(2.0), st.just(CODES))
HEDGES = st.builds(
    HedgingPolicy, st.integers(1, 5), st.sampled_from([0.0, 0.7]), st.just(CODES), st.sampled_from([0.0, 90.0])
)
OUTCOMES = st.builds(
    Outcome,
    st.sampled_from([Code.OK, Code.UNAVAILABLE, Code.ABORTED, Code.NOT_FOUND, Code.DEADLINE_EXCEEDED]),
    pushback=st.sampled_from([None, None, 0.0, 1.0, -1.0]),
    committed=st.booleans(),
    never_sent=st.booleans(),
    cancelled=st.sampled_from([False, False, False, True]),
)
NUMBERS = st.integers(1, 9)
DELAYS = st.sampled_from([0.0, 0.01, 0.5, 3.0])


class AnyCall(RuleBasedStateMachine):
    """A call to which everything happens, in any order, also what makes no sense."""

    @initialize(
        retry=RETRIES,
        hedge=HEDGES,
        hedged=st.booleans(),
        deadline=st.sampled_from([inf, 4.0, 0.0]),
        attempt_timeout=st.sampled_from([inf, 0.5]),
        receive_timeout=st.sampled_from([inf, 0.4]),
        wait_for_ready=st.booleans(),
        may_retry=st.booleans(),
        endpoints=st.integers(0, 3),
        seed=st.integers(0, 9),
    )
    def begin(
        self,
        retry: RetryPolicy,
        hedge: HedgingPolicy,
        hedged: bool,
        deadline: float,
        attempt_timeout: float,
        receive_timeout: float,
        wait_for_ready: bool,
        may_retry: bool,
        endpoints: int,
        seed: int,
    ) -> None:
        self.cluster = cluster_of(endpoints)
        self.nodes = dict(self.cluster.nodes)
        self.limit = (hedge.max_attempts if hedged else retry.max_attempts) if may_retry else 1
        self.deadline = deadline
        self.running: set[int] = set()
        self.committed = 0
        self.closed = False
        self.driven = Driven(
            retry=None if hedged else retry,
            hedge=hedge if hedged else HedgingPolicy(1),
            deadline=deadline,
            attempt_timeout=attempt_timeout,
            receive_timeout=receive_timeout,
            wait_for_ready=wait_for_ready,
            may_retry=may_retry,
            cluster=self.cluster,
            seed=seed,
        )
        self._look()

    def going(self) -> bool:
        return self.driven.verdict is None and not self.closed

    def _look(self) -> None:
        """What a driver would do with the step."""
        step, driven = self.driven.step, self.driven
        if driven.verdict is not None:
            self.running.clear()
        elif isinstance(step, Attempt):
            assert driven.now < self.deadline, "sent after the deadline"
            assert not self.committed, "sent beside an attempt that is the call"
            assert step.timeout is None or 0 < step.timeout <= self.deadline - driven.now
            self.running.add(step.number)
        elif isinstance(step, Commit):
            assert not self.committed, "handed over twice"
            assert step.number in self.running
            self.committed = step.number
            self.running = {step.number}
        elif isinstance(step, Cancel):
            assert not self.committed, "cancels the call"
            assert step.number in self.running
        else:
            assert isinstance(step, Wait)
            if step.until is None:
                assert self.running or (step.picker is not None and self.deadline == inf), "waits for nothing"
            elif not self.running:
                assert step.until <= self.deadline, "sleeps past the deadline"

    @precondition(going)
    @rule(number=NUMBERS, outcome=OUTCOMES, delay=DELAYS)
    def an_attempt_ends(self, number: int, outcome: Outcome, delay: float) -> None:
        self.running.discard(number)
        self.driven.happens(Ended(self.driven.now + delay, number, outcome))
        self._look()

    @precondition(going)
    @rule(number=NUMBERS, delay=DELAYS, overflow=st.booleans())
    def the_server_answers(self, number: int, delay: float, overflow: bool) -> None:
        self.driven.happens((Overflow if overflow else Headers)(self.driven.now + delay, number))
        self._look()

    @precondition(going)
    @rule(delay=DELAYS)
    def time_passes(self, delay: float) -> None:
        self.driven.happens(Elapsed(self.driven.now + delay))
        self._look()

    @precondition(going)
    @rule()
    def the_step_is_waited_out(self) -> None:
        step = self.driven.step
        if isinstance(step, Attempt | Wait) and step.until is not None:
            self.driven.happens(Elapsed(max(step.until, self.driven.now)))
            self._look()

    @precondition(going)
    @rule(state=st.sampled_from([Connectivity.READY, Connectivity.CONNECTING, Connectivity.TRANSIENT_FAILURE]))
    def endpoints_change_state(self, state: Connectivity) -> None:
        self.cluster.update_states([(address, state) for address in self.cluster.nodes])

    @precondition(going)
    @rule(count=st.integers(0, 4))
    def the_endpoint_set_changes(self, count: int) -> None:
        self.cluster.update(Endpoint(f"e{index}") for index in range(count))
        self.cluster.update_states([(f"e{count - 1}", Connectivity.READY)])
        self.nodes.update({f"{id(node)}": node for node in self.cluster.nodes.values()})

    @rule()
    def the_caller_gives_up(self) -> None:
        self.driven.close()
        self.closed = True
        self.running.clear()

    @invariant()
    def what_is_in_flight_is_what_runs(self) -> None:
        in_flight = [node.in_flight for node in {id(node): node for node in self.nodes.values()}.values()]
        assert all(count >= 0 for count in in_flight)
        assert sum(in_flight) == len(self.running)

    @invariant()
    def no_more_is_sent_than_the_policy_says(self) -> None:
        left = [
            attempt
            for attempt in self.driven.call.attempts
            if attempt.outcome is None or not attempt.outcome.never_sent or attempt.outcome.cancelled
        ]
        assert len(left) <= self.limit

    @invariant()
    def every_attempt_is_told_how_many_came_before(self) -> None:
        for index, attempt in enumerate(self.driven.call.attempts):
            assert attempt.number == index + 1
            assert attempt.previous < max(self.limit, 1)

    def teardown(self) -> None:
        if hasattr(self, "driven"):
            self.driven.close()
            assert sum(node.in_flight for node in {id(node): node for node in self.nodes.values()}.values()) == 0


TestAnyCall = AnyCall.TestCase
TestAnyCall.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)
TestAnyCall.pytestmark = [pytest.mark.slow]  # type: ignore[attr-defined]
