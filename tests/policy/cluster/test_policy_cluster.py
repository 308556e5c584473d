"""The endpoints of a service: whose memory is kept, which state they have together, and what calls are told."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mesh.codes import Code
from mesh.config.settings import (
    NEVER_HEDGE,
    BalancerConfig,
    BudgetConfig,
    HedgingPolicy,
    OutlierDetectionConfig,
    OverloadConfig,
    ServiceConfig,
    ThrottleConfig,
)
from mesh.model import Attempt, Connectivity, Endpoint, Outcome
from mesh.policy.balancing.pickers import PowerOfTwo, RoundRobin
from mesh.policy.balancing.policies import BALANCERS
from mesh.policy.cluster.breaker import State
from mesh.policy.cluster.cluster import Cluster
from mesh.policy.cluster.node import Node
from tests.policy.driving import Driven, cluster_of, set_states

IDLE, CONNECTING, READY, FAILED = (
    Connectivity.IDLE,
    Connectivity.CONNECTING,
    Connectivity.READY,
    Connectivity.TRANSIENT_FAILURE,
)


def endpoints(names: str) -> list[Endpoint]:
    return [Endpoint(name) for name in names]


def ready(cluster: Cluster) -> str:
    return "".join(sorted(node.endpoint.address for node in cluster.picker.nodes))


@pytest.mark.parametrize(
    ("states", "whole"),
    [
        ((READY,), READY),
        ((READY, FAILED, CONNECTING, IDLE), READY),
        ((CONNECTING, FAILED, IDLE), CONNECTING),
        ((IDLE, FAILED), IDLE),
        ((FAILED, FAILED), FAILED),
        ((), CONNECTING),
    ],
)
def test_the_state_of_the_whole(states: tuple[Connectivity, ...], whole: Connectivity) -> None:
    cluster = cluster_of(0)
    if states:
        cluster.update(Endpoint(f"e{index}") for index in range(len(states)))
        cluster.update_states((f"e{index}", state) for index, state in enumerate(states))
    assert cluster.state == whole
    assert repr(cluster) == f"<Cluster test {states.count(READY)}/{len(states)} ready>"


def test_new_endpoints_are_idle_until_seen_otherwise() -> None:
    cluster = cluster_of(0)
    cluster.update(endpoints("ab"))
    assert cluster.states == {"a": IDLE, "b": IDLE}
    assert cluster.picker.queue


def test_an_update_tells_who_is_new_and_who_is_gone() -> None:
    cluster = cluster_of(0)
    assert cluster.update(endpoints("abc")) == (endpoints("abc"), [])
    assert cluster.update(endpoints("cda")) == (endpoints("d"), ["b"])


def test_another_config_keeps_every_nodes_memory_and_what_the_budget_holds() -> None:
    cluster = cluster_of(0)
    cluster.update(endpoints("ab"))
    set_states(cluster, READY)
    node, budget, throttle = cluster.nodes["a"], cluster.budget, cluster.throttle
    node.start()
    balancer = BalancerConfig("peak_ewma", decay_time=3.0, failure_penalty=1.0)
    cluster.reconfigure(ServiceConfig(balancer=balancer), now=1.0)

    assert cluster.nodes["a"] is node
    assert (node.in_flight, node.decay, node.penalty) == (1, 3.0, 1.0)
    assert cluster.budget is budget
    assert cluster.throttle is throttle
    assert ready(cluster) == "ab"

    cluster.reconfigure(
        ServiceConfig(
            balancer=BalancerConfig("round_robin"), budget=BudgetConfig(ratio=0.5), throttle=ThrottleConfig(10, 0.1)
        ),
        now=2.0,
    )
    assert isinstance(cluster.picker, RoundRobin)
    assert cluster.nodes["a"] is node
    assert cluster.budget is not budget
    assert repr(cluster.throttle) == "<Throttle 10/10>"


def test_an_update_keeps_the_memory_and_the_state_of_all_that_stay() -> None:
    cluster = cluster_of(0)
    cluster.update(endpoints("ab"))
    set_states(cluster, READY)
    node = cluster.nodes["a"]
    node.start()
    cluster.update([Endpoint("a", weight=7), Endpoint("c")])
    assert cluster.nodes["a"] is node
    assert (node.in_flight, node.endpoint.weight) == (1, 7)
    assert cluster.states == {"a": READY, "c": IDLE}
    assert ready(cluster) == "a"


def test_of_endpoints_with_one_address_the_last_holds() -> None:
    cluster = cluster_of(0)
    new, _ = cluster.update([Endpoint("a", weight=1), Endpoint("a", weight=2)])
    assert new == [Endpoint("a", weight=2)]
    assert len(cluster.nodes) == 1


def test_an_empty_set_never_evicts_an_endpoint_that_works() -> None:
    cluster = cluster_of(0)
    cluster.update(endpoints("abc"))
    cluster.update_states([("a", READY), ("b", FAILED), ("c", READY)])
    assert cluster.update([]) == ([], ["b"])
    assert ready(cluster) == "ac"


def test_an_empty_set_evicts_what_does_not_work() -> None:
    cluster = cluster_of(0)
    cluster.update(endpoints("ab"))
    set_states(cluster, FAILED)
    assert cluster.update([], "registry R has no instances") == ([], ["a", "b"])
    assert (cluster.picker.queue, cluster.picker.error) == (False, "test: registry R has no instances")
    assert cluster.state == FAILED


def test_what_the_resolver_cannot_say_does_not_unseat_what_is_known() -> None:
    cluster = cluster_of(2)
    picker = cluster.picker
    cluster.resolver_error("registry down", final=True)
    assert cluster.picker is picker
    assert cluster.state == READY


@pytest.mark.parametrize(("final", "state"), [(False, CONNECTING), (True, FAILED)])
def test_with_nothing_known_calls_wait_unless_the_word_is_final(final: bool, state: Connectivity) -> None:
    cluster = cluster_of(0)
    cluster.resolver_error("registry down", final=final)
    picker = cluster.picker
    assert (picker.queue, picker.unresolved, picker.error) == (not final, not final, "test: registry down")
    assert cluster.state == state


def test_better_news_end_a_final_word() -> None:
    cluster = cluster_of(0)
    cluster.resolver_error("no such host", final=True)
    cluster.resolver_error("registry down", final=False)
    assert cluster.picker.queue
    cluster.update(endpoints("a"))
    assert (cluster.picker.queue, cluster.picker.unresolved) == (True, False)


def test_the_resolvers_old_troubles_are_not_blamed_for_failed_connections() -> None:
    cluster = cluster_of(0)
    cluster.resolver_error("registry down", final=False)
    cluster.update(endpoints("ab"))
    set_states(cluster, FAILED)
    assert cluster.picker.error == "test: 0 of 2 endpoints connected"


def test_observing_tells_whether_a_state_changed_and_swaps_the_picker_only_then() -> None:
    cluster = cluster_of(2)
    picker = cluster.picker
    assert not cluster.update_states([("e0", READY), ("stranger", FAILED)])
    assert cluster.picker is picker
    assert cluster.update_states([("e0", FAILED)])
    assert cluster.picker is not picker
    assert ready(cluster) == "e1"
    assert "stranger" not in cluster.states


def test_the_config_names_the_picker_and_its_settings() -> None:
    assert isinstance(cluster_of().picker, PowerOfTwo)
    assert isinstance(cluster_of(config=ServiceConfig(balancer=BalancerConfig("round_robin"))).picker, RoundRobin)
    cluster = cluster_of(config=ServiceConfig(balancer=BalancerConfig("peak_ewma", 3.0, 7.0)))
    assert (cluster.nodes["e0"].decay, cluster.nodes["e0"].penalty) == (3.0, 7.0)


STATES = st.sampled_from([IDLE, CONNECTING, READY, FAILED])


MOST_EJECTED = 50.0  # percent of endpoints that may be ejected

CONFIG = ServiceConfig(
    outlier_detection=OutlierDetectionConfig(
        interval=5.0, base_time=3.0, max_time=10.0, max_percent=MOST_EJECTED, consecutive_failures=2
    ),
    overload=OverloadConfig(6),
)
LIKE_ANY = [
    BalancerConfig(name, subset=subset, hash_header="user", load_factor=1.25)
    for name in sorted(BALANCERS)
    for subset in (0, 3)
]
OUTCOMES = st.sampled_from(
    [
        Outcome(Code.OK),
        Outcome(Code.NOT_FOUND),
        Outcome(Code.UNAVAILABLE),
        Outcome(Code.UNAVAILABLE),
        Outcome(Code.DEADLINE_EXCEEDED),
        Outcome(Code.UNAVAILABLE, never_sent=True),
        Outcome(Code.CANCELLED, cancelled=True),
    ]
)


class AnyCluster(RuleBasedStateMachine):
    """A cluster to which updates, failures, states, calls and configs come in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.cluster = Cluster("test", CONFIG, random.Random(1), 0.0, contextlib.nullcontext)
        self.pickers = {id(self.cluster.picker): (self.cluster.picker, self.cluster.picker.nodes)}
        self.calls: list[Driven] = []
        self.seen: dict[int, Node] = {}
        self.peak = 0  # the most endpoints there were since any was ejected

    @rule(names=st.sets(st.sampled_from("abcdefgh"), min_size=0), data=st.data())
    def update(self, names: set[str], data: st.DataObject) -> None:
        before = dict(self.cluster.nodes)
        working = {address for address, state in self.cluster.states.items() if state == READY}
        weights = data.draw(st.sampled_from([(1, 1), (0, 5), (-3, 2**32)]))
        found = [
            Endpoint(name, weight=weights[index % 2], priority=index % 3 // 2)
            for index, name in enumerate(sorted(names))
        ]
        new, gone = self.cluster.update(found)
        after = self.cluster.nodes
        assert set(after) <= (names or working)
        assert self.cluster.balancer.subset or set(after) == (names or working)
        assert {endpoint.address for endpoint in new} == set(after) - set(before)
        assert set(gone) == set(before) - set(after)
        assert all(after[address] is before[address] for address in set(after) & set(before))

    @rule(final=st.booleans())
    def unresolved(self, final: bool) -> None:
        before = dict(self.cluster.nodes)
        self.cluster.resolver_error("down", final=final)
        assert self.cluster.nodes == before

    @rule(states=st.dictionaries(st.sampled_from("abcdefghx"), STATES))
    def observe(self, states: dict[str, Connectivity]) -> None:
        before = dict(self.cluster.states)
        changed = self.cluster.update_states(states.items())
        assert changed == (self.cluster.states != before)

    @rule()
    def all_are_ready(self) -> None:
        set_states(self.cluster, READY)

    @rule(balancer=st.sampled_from(LIKE_ANY))
    def reconfigure(self, balancer: BalancerConfig) -> None:
        before = dict(self.cluster.nodes)
        self.cluster.reconfigure(replace(CONFIG, balancer=balancer), self.now)
        assert self.cluster.nodes == before

    @rule(seconds=st.floats(0, 6))
    def sweep(self, seconds: float) -> None:
        self.now += seconds
        self.cluster.sweep(self.now)

    @rule(seed=st.integers(0, 1000), hedged=st.booleans())
    def call(self, seed: int, hedged: bool) -> None:
        policy = HedgingPolicy(2, delay=1.0) if hedged else NEVER_HEDGE
        metadata = (("user", str(seed)),)
        call = Driven(cluster=self.cluster, hedge=policy, seed=seed, now=self.now, metadata=metadata, deadline=1e9)
        self._went_where_it_may(call)
        self.calls.append(call)

    @rule(outcome=OUTCOMES, data=st.data())
    def a_call_ends(self, outcome: Outcome, data: st.DataObject) -> None:
        running = [
            call for call in self.calls if call.verdict is None and any(a.ended is None for a in call.call.attempts)
        ]
        if running:
            call = data.draw(st.sampled_from(running))
            number = data.draw(st.sampled_from([a.number for a in call.call.attempts if a.ended is None]))
            call.ended(number, outcome, at=self.now)
            self._went_where_it_may(call)

    @rule(data=st.data())
    def time_passes_for_a_call(self, data: st.DataObject) -> None:
        waiting = [
            call
            for call in self.calls
            if call.verdict is None and call.step is not None and call.step.until is not None
        ]
        if waiting:
            call = data.draw(st.sampled_from(waiting))
            call.elapses(at=self.now)
            self._went_where_it_may(call)

    @rule(data=st.data())
    def a_call_is_given_up(self, data: st.DataObject) -> None:
        if self.calls:
            call = data.draw(st.sampled_from(self.calls))
            call.close()
            self.calls.remove(call)

    def _went_where_it_may(self, call: Driven) -> None:
        """No pick of an ineligible endpoint: not READY, of a lower priority than serves, or ejected."""
        if not isinstance(call.step, Attempt) or call.step.started != self.now:
            return
        node = self.cluster.nodes[call.step.endpoint.address]
        assert self.cluster.states[node.endpoint.address] == READY
        assert node in self.cluster.picker.nodes or node.breaker.state is State.PROBING
        if node.breaker.state is not State.CLOSED and not self.cluster.panic:
            assert node.breaker.state is State.PROBING
            assert node.breaker.probe_started == self.now

    @invariant()
    def nodes_and_states_are_of_the_same_endpoints(self) -> None:
        assert set(self.cluster.nodes) == set(self.cluster.states)

    @invariant()
    def the_picker_is_over_endpoints_that_are_ready_and_over_some_if_any_may_serve(self) -> None:
        cluster = self.cluster
        working = {address for address, state in cluster.states.items() if state == READY}
        assert set(ready(cluster)) <= working
        first = {address for address in working if cluster.nodes[address].endpoint.priority == 0}
        assert not first or ready(cluster)
        if not cluster.picker.nodes:
            assert cluster.picker.error, "a call that fails or waits is told why"

    @invariant()
    def calls_fail_at_once_exactly_while_the_whole_has_failed(self) -> None:
        cluster = self.cluster
        if cluster.state == FAILED or not (cluster.picker.nodes or cluster.picker.queue):
            assert not cluster.picker.nodes
            assert not cluster.picker.queue

    @invariant()
    def a_picker_never_changes(self) -> None:
        self.pickers[id(self.cluster.picker)] = (self.cluster.picker, self.cluster.picker.nodes)
        assert all(picker.nodes is nodes for picker, nodes in self.pickers.values())

    @invariant()
    def no_more_are_ejected_than_may_be(self) -> None:
        # Of those that there were when they were ejected: others may have left since.
        out = self.cluster.ejections.ejected
        count = len(self.cluster.nodes)
        self.peak = max(self.peak, count) if out else count
        assert len(out) <= max(1, self.peak * MOST_EJECTED / 100)

    @invariant()
    def what_is_in_flight_is_what_runs(self) -> None:
        self.seen.update((id(node), node) for node in self.cluster.nodes.values())
        assert all(node.in_flight >= 0 for node in self.seen.values())
        running = [call for call in self.calls if call.verdict is None]
        attempts = sum(attempt.outcome is None for call in running for attempt in call.call.attempts)
        assert sum(node.in_flight for node in self.seen.values()) == attempts
        assert len(self.cluster.admission.outstanding) == len(running) <= 6

    def teardown(self) -> None:
        for call in self.calls:
            call.close()
        assert all(node.in_flight == 0 for node in self.seen.values())
        assert len(self.cluster.admission.outstanding) == 0
        assert all(node.breaker.state is not State.PROBING for node in self.seen.values())


TestAnyCluster = AnyCluster.TestCase
TestAnyCluster.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyCluster.pytestmark = [pytest.mark.slow]  # type: ignore[attr-defined]
