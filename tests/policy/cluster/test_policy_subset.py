"""Which endpoints a client uses at all: its subset, the priority that serves, its own zone."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from math import inf, sqrt

import pytest

from mesh.codes import Code
from mesh.config.settings import BalancerConfig, MethodPolicy, ServiceConfig, ZoneConfig
from mesh.model import CallSpec, Connectivity, Endpoint, Locality
from mesh.policy.balancing.pickers import PickFirst, RoundRobin
from mesh.policy.cluster.cluster import Cluster
from tests.policy.driving import METHOD, Driven, cluster_of, set_states

CALL = CallSpec(METHOD, MethodPolicy(), inf)
IDLE, CONNECTING, READY, FAILED = (
    Connectivity.IDLE,
    Connectivity.CONNECTING,
    Connectivity.READY,
    Connectivity.TRANSIENT_FAILURE,
)


def endpoints(count: int, priority: int = 0) -> list[Endpoint]:
    return [Endpoint(f"p{priority}-{index}", priority=priority) for index in range(count)]


def empty(seed: int = 1, balancer: BalancerConfig | None = None, zone: ZoneConfig | None = None) -> Cluster:
    config = ServiceConfig(balancer=balancer, zone=zone or ZoneConfig())
    return Cluster("test", config, random.Random(seed), 0.0, contextlib.nullcontext)


def used(cluster: Cluster) -> set[str]:
    return {node.endpoint.address for node in cluster.picker.nodes}


# -- the subset (A68)


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (99, 99), (100, 100), (101, 100), (1000, 100)])
def test_a_client_uses_every_endpoint_up_to_a_hundred_and_a_hundred_of_more(count: int, expected: int) -> None:
    cluster = empty()
    new, gone = cluster.update(endpoints(count))
    assert (len(new), len(cluster.nodes), gone) == (expected, expected, [])
    assert len(cluster.states) == expected


def test_clients_differ_and_together_use_all_alike() -> None:
    # 500 clients choose 100 of 200: each endpoint has 250 of them; 5 standard deviations are 5 sqrt(125) < 56.
    counts = Counter(address for seed in range(500) for address in chosen(seed))
    assert len(counts) == 200
    assert all(abs(count - 250) <= 5 * sqrt(125) for count in counts.values())


def chosen(seed: int) -> set[str]:
    cluster = empty(seed)
    cluster.update(endpoints(200))
    return set(cluster.nodes)


def test_a_change_moves_as_few_as_it_can() -> None:
    cluster = empty()
    everyone = endpoints(300)
    cluster.update(everyone)
    member = next(endpoint for endpoint in everyone if endpoint.address in cluster.nodes)
    stranger = next(endpoint for endpoint in everyone if endpoint.address not in cluster.nodes)
    assert cluster.update([each for each in everyone if each is not stranger]) == ([], [])
    new, gone = cluster.update([each for each in everyone if each is not member])
    assert (len(new), gone) == (1, [member.address])
    new, gone = cluster.update(everyone)
    assert (new, len(gone)) == ([member], 1)


def test_each_priority_has_its_subset() -> None:
    cluster = empty(balancer=BalancerConfig(subset=3))
    cluster.update([*endpoints(10, 0), *endpoints(2, 1)])
    assert Counter(node.endpoint.priority for node in cluster.nodes.values()) == {0: 3, 1: 2}


@pytest.mark.parametrize("size", [0, 20_000])
def test_a_client_may_use_all(size: int) -> None:
    cluster = empty(balancer=BalancerConfig("round_robin", subset=size))
    cluster.update(endpoints(2000))
    assert len(cluster.nodes) == 2000


def test_ten_thousand_endpoints_and_then_none() -> None:
    cluster = empty()
    cluster.update(endpoints(10_000))
    set_states(cluster, READY)
    working = set(cluster.nodes)
    assert len(working) == 100
    assert cluster.update([]) == ([], [])
    assert set(cluster.nodes) == used(cluster) == working
    set_states(cluster, FAILED)
    _, gone = cluster.update([])
    assert (set(gone), cluster.nodes, cluster.states) == (working, {}, {})


def test_a_registry_that_flaps_leaves_nothing_behind() -> None:
    cluster = empty(balancer=BalancerConfig(subset=10))
    for turn in range(200):
        cluster.update(endpoints(50) if turn % 2 else [Endpoint(f"other-{turn}-{index}") for index in range(50)])
        set_states(cluster, READY)
        assert len(cluster.nodes) == len(cluster.states) == len(cluster.picker.nodes) == 10
    assert len(cluster._subset._ranks) == 50


# -- priorities (A56)


def prioritised(*states: tuple[Connectivity, ...], balancer: BalancerConfig | None = None) -> Cluster:
    """A cluster whose endpoints p0-0, p0-1, ..., p1-0, ... are in these states."""
    cluster = empty(balancer=balancer)
    cluster.update([each for priority, of in enumerate(states) for each in endpoints(len(of), priority)])
    cluster.update_states(
        (f"p{priority}-{index}", s) for priority, of in enumerate(states) for index, s in enumerate(of)
    )
    return cluster


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([(READY, READY), (READY,)], {"p0-0", "p0-1"}),
        ([(READY, FAILED), (READY,)], {"p0-0"}),
        ([(FAILED, FAILED), (READY,)], {"p1-0"}),
        ([(FAILED,), (FAILED,), (READY,)], {"p2-0"}),
        ([(FAILED, CONNECTING), (READY,)], set()),
        ([(IDLE,), (READY,)], set()),
        ([(FAILED,), (CONNECTING,)], set()),
        ([(FAILED,), (FAILED,)], set()),
    ],
)
def test_the_first_priority_with_an_endpoint_that_is_ready_serves(
    states: list[tuple[Connectivity, ...]], expected: set[str]
) -> None:
    cluster = prioritised(*states)
    assert used(cluster) == expected
    assert cluster.picker.queue == (any(CONNECTING in of or IDLE in of for of in states) or bool(expected))


def test_a_priority_that_was_never_ready_is_waited_for_ten_seconds() -> None:
    cluster = prioritised((CONNECTING,), (READY,))
    call = Driven(cluster=cluster, deadline=60.0)
    call.waits(until=60.0)
    assert not cluster.sweep(9.9)
    assert cluster.sweep(10.0)
    assert used(cluster) == {"p1-0"}
    call.elapses(at=10.0)
    call.succeeds(1)
    call.ends(Code.OK)


def test_a_priority_that_was_ready_before_is_not() -> None:
    cluster = prioritised((READY,), (READY,))
    cluster.update_states([("p0-0", IDLE)])
    assert used(cluster) == {"p1-0"}
    cluster.update_states([("p0-0", READY)])
    assert used(cluster) == {"p0-0"}


def test_of_one_priority_nothing_is_to_be_waited_for() -> None:
    cluster = prioritised((CONNECTING,))
    assert not cluster.sweep(10.0)
    assert cluster.picker.queue


def test_each_priority_may_have_its_own_policy() -> None:
    levels = (BalancerConfig("pick_first"), BalancerConfig("round_robin"))
    states = [(READY, READY), (READY, READY), (READY,)]
    balancer = BalancerConfig("pick_first", priorities=levels)
    cluster = prioritised(*states, balancer=balancer)
    assert isinstance(cluster.picker, PickFirst)
    cluster.update_states([("p0-0", FAILED), ("p0-1", FAILED)])
    assert isinstance(cluster.picker, RoundRobin)
    cluster.update_states([("p1-0", FAILED), ("p1-1", FAILED)])
    assert (isinstance(cluster.picker, RoundRobin), used(cluster)) == (True, {"p2-0"})


def test_the_priorities_that_leave_are_forgotten() -> None:
    cluster = prioritised((READY,), (READY,))
    cluster.update(endpoints(1, 1))
    assert used(cluster) == {"p1-0"}
    cluster.update([*endpoints(1, 0), *endpoints(1, 1)])
    assert used(cluster) == set(), "p0-0 is new: it is waited for again"


# -- zones

HOME = Locality("eu", "eu-1")
ZONES = ZoneConfig(enabled=True)


def zoned(config: ZoneConfig = ZONES, own: Locality = HOME, **zones: int) -> Cluster:
    """Endpoints in zones: eu_1=3 is e-eu-1-0, ... in region eu; all READY."""
    cluster = empty(zone=config)
    cluster.locality = own
    found = []
    for name, count in zones.items():
        zone = name.replace("_", "-")
        found += [Endpoint(f"{zone}-{index}", Locality(zone[:2], zone)) for index in range(count)]
    cluster.update(found)
    set_states(cluster, READY)
    return cluster


def near(cluster: Cluster) -> set[str]:
    return {node.endpoint.locality.zone for node in cluster.picker.nodes}


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (zoned(eu_1=3, eu_2=3, us_1=3), {"eu-1"}),
        (zoned(eu_1=1, eu_2=3, us_1=3), {"eu-1", "eu-2"}),
        (zoned(eu_1=0, eu_2=1, us_1=8), {"eu-2", "us-1"}),
        (zoned(us_1=3, us_2=3), {"us-1", "us-2"}),
        (zoned(eu_1=2, eu_2=2), {"eu-1", "eu-2"}),
        (zoned(ZoneConfig(), eu_1=3, eu_2=3), {"eu-1", "eu-2"}),
        (zoned(ZONES, Locality(), eu_1=3, eu_2=3), {"eu-1", "eu-2"}),
        (zoned(ZoneConfig(True, 4, 1), eu_1=1, eu_2=3), {"eu-1"}),
    ],
    ids=[
        "own zone",
        "too few there: region",
        "too few in the region",
        "elsewhere",
        "small",
        "off",
        "unknown",
        "set so",
    ],
)
def test_calls_stay_as_near_as_there_is_enough(cluster: Cluster, expected: set[str]) -> None:
    assert near(cluster) == expected


def test_calls_leave_a_zone_most_of_which_cannot_be_called() -> None:
    cluster = zoned(eu_1=5, eu_2=5)
    cluster.update_states([(f"eu-1-{index}", FAILED) for index in range(2)])
    assert near(cluster) == {"eu-1"}
    cluster.update_states([("eu-1-2", FAILED)])
    assert near(cluster) == {"eu-1", "eu-2"}
    cluster.update_states([("eu-1-2", READY)])
    assert near(cluster) == {"eu-1"}


def test_an_endpoint_without_a_locality_is_near_nobody() -> None:
    cluster = cluster_of(8, ServiceConfig(zone=ZONES))
    cluster.locality = HOME
    cluster.update(endpoints(8))
    set_states(cluster, READY)
    assert len(cluster.picker.nodes) == 8
