"""The endpoints of a service: whose memory is kept, which state they have together, and what calls are told."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mesh.config import BalancerConfig, BudgetConfig, ServiceConfig, ThrottleConfig
from mesh.model import Connectivity, Endpoint
from mesh.policy.cluster import Cluster
from mesh.policy.pick import PowerOfTwo, RoundRobin
from tests.policy.driving import cluster_of, set_states

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
        cluster.observe((f"e{index}", state) for index, state in enumerate(states))
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
    cluster.observe([("a", READY), ("b", FAILED), ("c", READY)])
    assert cluster.update([]) == ([], ["b"])
    assert ready(cluster) == "ac"


def test_an_empty_set_evicts_what_does_not_work() -> None:
    cluster = cluster_of(0)
    cluster.update(endpoints("ab"))
    set_states(cluster, FAILED)
    assert cluster.update([]) == ([], ["a", "b"])
    assert (cluster.picker.queue, cluster.picker.error) == (False, "test: the service has no instances")
    assert cluster.state == FAILED


def test_what_the_resolver_cannot_say_does_not_unseat_what_is_known() -> None:
    cluster = cluster_of(2)
    picker = cluster.picker
    cluster.unresolved("registry down", final=True)
    assert cluster.picker is picker
    assert cluster.state == READY


@pytest.mark.parametrize(("final", "state"), [(False, CONNECTING), (True, FAILED)])
def test_with_nothing_known_calls_wait_unless_the_word_is_final(final: bool, state: Connectivity) -> None:
    cluster = cluster_of(0)
    cluster.unresolved("registry down", final=final)
    picker = cluster.picker
    assert (picker.queue, picker.unresolved, picker.error) == (not final, not final, "test: registry down")
    assert cluster.state == state


def test_better_news_end_a_final_word() -> None:
    cluster = cluster_of(0)
    cluster.unresolved("no such host", final=True)
    cluster.unresolved("registry down", final=False)
    assert cluster.picker.queue
    cluster.update(endpoints("a"))
    assert (cluster.picker.queue, cluster.picker.unresolved) == (True, False)


def test_the_resolvers_old_troubles_are_not_blamed_for_failed_connections() -> None:
    cluster = cluster_of(0)
    cluster.unresolved("registry down", final=False)
    cluster.update(endpoints("ab"))
    set_states(cluster, FAILED)
    assert cluster.picker.error == "test: none of 2 endpoints can be reached: connections failed"


def test_observing_tells_whether_a_state_changed_and_swaps_the_picker_only_then() -> None:
    cluster = cluster_of(2)
    picker = cluster.picker
    assert not cluster.observe([("e0", READY), ("stranger", FAILED)])
    assert cluster.picker is picker
    assert cluster.observe([("e0", FAILED)], "refused")
    assert cluster.picker is not picker
    assert ready(cluster) == "e1"
    assert cluster.error == "refused"
    assert "stranger" not in cluster.states


def test_the_config_names_the_picker_and_its_settings() -> None:
    assert isinstance(cluster_of().picker, PowerOfTwo)
    assert isinstance(cluster_of(config=ServiceConfig(balancer=BalancerConfig("round_robin"))).picker, RoundRobin)
    cluster = cluster_of(config=ServiceConfig(balancer=BalancerConfig("peak_ewma", 3.0, 7.0)))
    assert (cluster.nodes["e0"].decay, cluster.nodes["e0"].penalty) == (3.0, 7.0)


STATES = st.sampled_from([IDLE, CONNECTING, READY, FAILED])


class AnyCluster(RuleBasedStateMachine):
    """A cluster to which updates, failures and states come in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster("test", ServiceConfig(), random.Random(1), 0.0, contextlib.nullcontext)
        self.pickers = {id(self.cluster.picker): (self.cluster.picker, self.cluster.picker.nodes)}

    @rule(names=st.sets(st.sampled_from("abcd"), min_size=0))
    def update(self, names: set[str]) -> None:
        before = dict(self.cluster.nodes)
        working = {address for address, state in self.cluster.states.items() if state == READY}
        new, gone = self.cluster.update(endpoints("".join(sorted(names))))
        after = self.cluster.nodes
        assert set(after) == (names or working)
        assert {endpoint.address for endpoint in new} == set(after) - set(before)
        assert set(gone) == set(before) - set(after)
        assert all(after[address] is before[address] for address in set(after) & set(before))

    @rule(final=st.booleans())
    def unresolved(self, final: bool) -> None:
        before = dict(self.cluster.nodes)
        self.cluster.unresolved("down", final=final)
        assert self.cluster.nodes == before

    @rule(states=st.dictionaries(st.sampled_from("abcdx"), STATES))
    def observe(self, states: dict[str, Connectivity]) -> None:
        before = dict(self.cluster.states)
        changed = self.cluster.observe(states.items())
        assert changed == (self.cluster.states != before)

    @invariant()
    def nodes_and_states_are_of_the_same_endpoints(self) -> None:
        assert set(self.cluster.nodes) == set(self.cluster.states)

    @invariant()
    def the_picker_is_over_all_that_are_ready_and_no_others(self) -> None:
        cluster = self.cluster
        assert set(ready(cluster)) == {address for address, state in cluster.states.items() if state == READY}
        if not cluster.picker.nodes:
            assert cluster.picker.error, "a call that fails or waits is told why"

    @invariant()
    def calls_fail_at_once_exactly_while_the_whole_has_failed(self) -> None:
        cluster = self.cluster
        assert (cluster.state == FAILED) == (not cluster.picker.nodes and not cluster.picker.queue)

    @invariant()
    def a_picker_never_changes(self) -> None:
        self.pickers[id(self.cluster.picker)] = (self.cluster.picker, self.cluster.picker.nodes)
        assert all(picker.nodes is nodes for picker, nodes in self.pickers.values())


TestAnyCluster = AnyCluster.TestCase
TestAnyCluster.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
TestAnyCluster.pytestmark = [pytest.mark.slow]  # type: ignore[attr-defined]
