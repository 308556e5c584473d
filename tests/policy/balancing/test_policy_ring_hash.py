"""Calls with one key to one endpoint: which, what a change moves, and what a load factor evens out."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from math import ceil, inf
from typing import Any

import pytest

from mesh.config.settings import BalancerConfig, MethodPolicy, ServiceConfig
from mesh.model import CallSpec, Connectivity, Endpoint, Metadatum, Outcome
from mesh.policy.balancing import ring_hash as rings
from mesh.policy.balancing.ring_hash import entry_counts, hash_of
from mesh.policy.cluster.node import Node
from tests.policy.driving import METHOD, cluster_of

KEYS = [f"user-{index}" for index in range(1000)]


def nodes_of(count: int) -> list[Node]:
    return [Node(Endpoint(f"e{index}"), contextlib.nullcontext()) for index in range(count)]


def call_of(*metadata: Metadatum) -> CallSpec:
    return CallSpec(METHOD, MethodPolicy(), inf, metadata)


def RingHash(nodes: list[Node], header: str = "", of: int = 0, **settings: Any) -> rings.RingHash:  # noqa: N802
    return rings.RingHash(nodes, of or len(nodes), header, **settings)


def place(ring: rings.RingHash, key: str, seed: int = 1) -> str:
    return ring.pick(call_of(("user", key)), 0.0, random.Random(seed)).endpoint.address


def places(ring: rings.RingHash) -> dict[str, str]:
    return {key: place(ring, key) for key in KEYS}


def test_a_key_goes_to_one_endpoint_in_every_process() -> None:
    # The hashes are fixed: other clients, and this one after a restart, find the same.
    assert hash_of("e0_0") == hash_of(b"e0_0") == 0x6070380894C5113A
    one, other = RingHash(nodes_of(5), "user"), RingHash(nodes_of(5)[::-1], "user")
    assert places(one) == places(other)
    assert {place(one, "user-1", seed) for seed in range(20)} == {place(one, "user-1")}


def test_an_endpoint_that_leaves_moves_its_own_keys_and_no_others() -> None:
    nodes = nodes_of(5)
    before, after = places(RingHash(nodes, "user")), places(RingHash(nodes[1:], "user"))
    assert all(after[key] == where for key, where in before.items() if where != "e0")


def test_keys_follow_endpoints_weights() -> None:
    nodes = nodes_of(3)
    nodes[0].weight = 2.0
    nodes[1].weight = nodes[2].weight = 0.5
    counts = Counter(places(RingHash(nodes, "user")).values())
    # 5 standard deviations of 1,000 keys are 75, and of 683 arcs' length another 5 × 667 × sqrt(1/3 / 683) = 74.
    assert abs(counts["e0"] - 667) <= 149


@pytest.mark.parametrize(
    ("weights", "of", "min_size", "max_size", "expected"),
    [
        ((1, 1), 2, 10, 100, [8, 8]),
        ((1, 1, 1), 3, 10, 100, [4, 4, 4]),
        ((1, 1), 3, 10, 100, [4, 4]),
        ((1, 1, 1), 3, 10, 11, [2, 2, 2]),
        ((0.5, 1.5), 2, 10, 100, [4, 12]),
        ((1e-18, 2), 2, 10, 100, [1, 16]),
        ((1, 1, 1), 3, 1, 1, [1, 1, 1]),
    ],
)
def test_how_often_an_endpoint_stands_on_the_ring(
    weights: tuple[float, ...], of: int, min_size: int, max_size: int, expected: list[int]
) -> None:
    nodes = nodes_of(len(weights))
    for node, weight in zip(nodes, weights, strict=True):
        node.weight = weight
    assert entry_counts(nodes, of, min_size, max_size) == expected


def test_more_endpoints_than_entries_are_all_on_the_ring() -> None:
    nodes = nodes_of(50)
    ring = RingHash(nodes, "user", min_size=4, max_size=8)
    assert {ring.pick(call_of(), 0.0, random.Random(seed)) for seed in range(2000)} == set(nodes)


def test_a_call_without_the_header_goes_anywhere() -> None:
    ring = RingHash(nodes_of(3), "user")
    for call in (call_of(), call_of(("other", "user-1"))):
        assert len({ring.pick(call, 0.0, random.Random(seed)) for seed in range(100)}) == 3


def test_without_a_header_in_the_config_calls_go_anywhere() -> None:
    ring = RingHash(nodes_of(3))
    assert len({ring.pick(call_of(("user", "a")), 0.0, random.Random(seed)) for seed in range(100)}) == 3


def test_several_values_are_one_key() -> None:
    # A76: joined by commas.
    ring = RingHash(nodes_of(50), "user")
    two = call_of(("user", "a"), ("user", b"b"))
    assert ring.pick(two, 0.0, random.Random(1)) is ring.pick(call_of(("user", "a,b")), 0.0, random.Random(1))


def test_a_retry_goes_to_the_next_on_the_ring() -> None:
    nodes = nodes_of(3)
    ring = RingHash(nodes, "user")
    call = call_of(("user", "user-1"))
    first = ring.pick(call, 0.0, random.Random(1))
    second = ring.pick(call, 0.0, random.Random(2), [first])
    rest = RingHash([node for node in nodes if node is not first], "user")
    assert second is rest.pick(call, 0.0, random.Random(3))


def test_with_a_load_factor_none_has_more_than_so_many_times_the_mean() -> None:
    nodes = nodes_of(5)
    running: list[Node] = []
    ring = RingHash(nodes, "user", factor=1.25, outstanding=running.__len__)
    rng = random.Random(1)
    for turn in range(2000):
        key = "hot" if rng.random() < 0.9 else f"user-{turn}"
        node = ring.pick(call_of(("user", key)), 0.0, rng)
        bound = ceil(1.25 * (len(running) + 1) / 5)
        node.start()
        running.append(node)
        assert node.in_flight <= bound
        if len(running) > 40:
            running.pop(rng.randrange(len(running))).end(0.0, 0.0, Outcome(0))


def test_a_key_that_is_not_hot_keeps_its_endpoint_under_a_load_factor() -> None:
    nodes = nodes_of(5)
    bounded, free = RingHash(nodes, "user", factor=1.25, outstanding=lambda: 50), RingHash(nodes, "user")
    assert places(bounded) == places(free)


def test_when_all_are_full_one_is_taken_all_the_same() -> None:
    nodes = nodes_of(2)
    for node in nodes:
        node.start()
    ring = RingHash(nodes, "user", factor=1.0, outstanding=lambda: 0)
    assert ring.pick(call_of(), 0.0, random.Random(1)) in nodes


def test_through_a_cluster_an_endpoint_that_fails_hands_on_its_keys_and_takes_them_back() -> None:
    config = ServiceConfig(balancer=BalancerConfig("ring_hash", hash_header="user", subset=0))
    cluster = cluster_of(4, config)

    def where() -> dict[str, str]:
        assert isinstance(cluster.picker, rings.RingHash)
        return places(cluster.picker)

    before = where()
    cluster.update_states([("e2", Connectivity.TRANSIENT_FAILURE)])
    during = where()
    assert "e2" not in during.values()
    assert all(during[key] == address for key, address in before.items() if address != "e2")
    cluster.update_states([("e2", Connectivity.READY)])
    assert where() == before
