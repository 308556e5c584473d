"""How many endpoints connect at the same time, and how often states are looked at."""

from __future__ import annotations

import pytest

from mesh.model import Connectivity, Endpoint
from mesh.policy.cluster.cluster import Cluster
from mesh.policy.cluster.connecting import ConnectPacer
from tests.policy.driving import cluster_of

BUSY, CALM = 0.005, 0.1  # seconds until the next look
IDLE, CONNECTING, READY = Connectivity.IDLE, Connectivity.CONNECTING, Connectivity.READY


def test_connects_are_paced() -> None:
    connects = ConnectPacer()
    states = {f"host:{number}": IDLE for number in range(40)}
    begun, pause = connects.poll(states.items(), 0.0)
    assert begun == list(states)[:16]
    assert pause == BUSY
    states.update(dict.fromkeys(begun, CONNECTING))
    assert connects.poll(states.items(), 0.125) == ([], BUSY)
    states[begun[0]] = READY  # its place is free
    assert connects.poll(states.items(), 0.125) == ([list(states)[16]], BUSY)
    assert repr(connects) == "<ConnectPacer 16 connecting>"


def test_a_connect_that_takes_long_holds_nobody_up() -> None:
    connects = ConnectPacer()
    states = {f"host:{number}": IDLE for number in range(17)}
    begun, _ = connects.poll(states.items(), 0.0)
    states.update(dict.fromkeys(begun, CONNECTING))
    assert connects.poll(states.items(), 0.24)[0] == []
    assert connects.poll(states.items(), 0.25)[0] == [list(states)[-1]]


def test_what_connects_for_long_is_looked_at_ever_less_often() -> None:
    connects = ConnectPacer()
    assert connects.poll([("a", READY)], 0.0) == ([], CALM)
    connects.poll([("a", IDLE)], 0.0)
    pauses = [connects.poll([("a", CONNECTING)], now)[1] for now in (0.01, 0.1, 0.4, 1.0, 5.0)]
    assert pauses == pytest.approx([BUSY, BUSY, 0.02, 0.05, CALM])


def queues(cluster: Cluster) -> bool:
    return cluster.picker.queue


def test_calls_fail_with_the_cause_while_no_connection_is_made() -> None:
    cluster = cluster_of(0)
    cluster.update([Endpoint("a")])
    assert queues(cluster)
    cluster.set_connect_error("connecting failed: ValueError: boom")
    assert not queues(cluster)
    assert cluster.picker.error == "test: connecting failed: ValueError: boom"
    cluster.update_states([("a", READY)])  # what is connected goes on
    assert cluster.picker.nodes
    cluster.update_states([("a", CONNECTING)])
    assert not queues(cluster)
    cluster.set_connect_error("")
    assert queues(cluster)
    before = cluster.picker
    cluster.set_connect_error("")
    assert cluster.picker is before
