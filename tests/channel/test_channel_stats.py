"""``channel.stats()``: what a channel knows of its endpoints, in both worlds."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import grpc
import pytest

import mesh
import mesh.aio
from tests.channel.suite import UNARY, Server
from tests.processes import eventually

EJECTS = {
    "loadBalancingConfig": [
        {"outlier_detection": {"consecutiveFailures": 3, "maxEjectionPercent": 50, "baseEjectionTime": "60s"}}
    ]
}


def config(**settings: Any) -> list[tuple[str, Any]]:
    return [("grpc.service_config", json.dumps(settings))]


def static(servers: list[Server], *further: str) -> str:
    return "static:///" + ",".join([*(server.address for server in servers), *further])


def test_a_new_channel_has_no_endpoints_and_says_why() -> None:
    with mesh.insecure_channel("static:///127.0.0.1:1") as channel:
        stats = channel.stats()
    assert (stats.target, stats.state, stats.endpoints) == ("static:///127.0.0.1:1", "IDLE", ())
    assert "has not answered" in stats.error


def test_endpoints_have_a_state_a_latency_and_a_weight(servers: list[Server]) -> None:
    with mesh.insecure_channel(static(servers)) as channel:
        call = channel.unary_unary(UNARY)
        eventually(lambda: call(b"ok", timeout=5) and {each.state for each in channel.stats().endpoints} == {"READY"})
        eventually(lambda: call(b"ok", timeout=5) and all(each.latency for each in channel.stats().endpoints))
        stats = channel.stats()
    assert stats.state == "READY"
    assert {each.address for each in stats.endpoints} == {server.address for server in servers}
    assert all(each.latency < 5 and each.weight == 1 and not each.in_flight for each in stats.endpoints)
    assert stats.outstanding == 0
    assert (stats.panic, dict(stats.ejections), dict(stats.refusals)) == (False, {}, {})


def test_an_endpoint_that_cannot_be_reached_says_why(server: Server) -> None:
    with mesh.insecure_channel(static([server], "127.0.0.1:1")) as channel:
        channel.unary_unary(UNARY)(b"ok", timeout=5)
        eventually(lambda: any("connection refused" in each.cause.lower() for each in channel.stats().endpoints))
        (refused,) = [each for each in channel.stats().endpoints if each.cause]
        assert (refused.address, refused.state) == ("127.0.0.1:1", "TRANSIENT_FAILURE")
        assert "TRANSIENT_FAILURE: " in str(channel.stats())


def test_calls_in_flight_are_counted_where_they_are(servers: list[Server]) -> None:
    with mesh.insecure_channel(static(servers)) as channel:
        calls = [channel.unary_unary(UNARY).future(b"hang", timeout=30) for _ in range(2)]
        eventually(lambda: sum(server.in_flight for server in servers) == 2)
        stats = channel.stats()
        assert (stats.outstanding, sum(each.in_flight for each in stats.endpoints)) == (2, 2)
        for call in calls:
            call.cancel()
        eventually(lambda: channel.stats().outstanding == 0)


def test_an_ejected_endpoint_is_named_with_the_reason(servers: list[Server]) -> None:
    with mesh.insecure_channel(static(servers), config(**EJECTS)) as channel:
        call = channel.unary_unary(UNARY)
        eventually(lambda: call(b"ok", timeout=5) and {each.state for each in channel.stats().endpoints} == {"READY"})

        def ejected() -> bool:
            with pytest.raises(grpc.RpcError):
                call(b"abort UNAVAILABLE x", timeout=5)
            return any(each.ejected for each in channel.stats().endpoints)

        eventually(ejected)
        stats = channel.stats()
    (endpoint,) = [each for each in stats.endpoints if each.ejected]
    assert "consecutive failures; for " in endpoint.ejected
    assert sum(count for reason, count in stats.ejections.items() if reason.startswith("ejected: ")) == 1
    assert "ejected: " in str(stats)


def test_refusals_of_the_client_are_counted_by_reason(server: Server) -> None:
    options = config(overload={"maxOutstanding": 1})
    with mesh.insecure_channel(static([server]), options) as channel:
        call = channel.unary_unary(UNARY)
        call(b"ok", timeout=5)
        hanging = call.future(b"hang", timeout=30)
        server.wait_until_busy()
        with pytest.raises(grpc.RpcError, match="refused by the client"):
            call(b"ok", timeout=5)
        stats = channel.stats()
        hanging.cancel()
    assert dict(stats.refusals) == {"refused: outstanding": 1}
    assert stats.outstanding == 1


def test_the_retry_budget_is_what_retries_leave_of_it(server: Server) -> None:
    options = config(retryBudget={"ratio": 0, "minPerSecond": 0.2})
    with mesh.insecure_channel(static([server]), options) as channel:
        assert channel.stats().retry_budget == pytest.approx(2.0, abs=0.1)


def test_a_snapshot_is_a_value_that_can_be_kept_copied_and_exported(server: Server) -> None:
    with mesh.insecure_channel(static([server])) as channel:
        channel.unary_unary(UNARY)(b"ok", timeout=5)
        stats = channel.stats()
        with pytest.raises(AttributeError):
            stats.state = "IDLE"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(stats)) == copy.deepcopy(stats) == stats
    assert len({stats, copy.copy(stats)}) == 1
    assert json.loads(json.dumps(dataclasses.asdict(stats)))["endpoints"][0]["address"] == server.address


def test_a_closed_channel_has_no_endpoints(server: Server) -> None:
    with mesh.insecure_channel(static([server])) as channel:
        channel.unary_unary(UNARY)(b"ok", timeout=5)
    assert (channel.stats().state, channel.stats().endpoints) == ("SHUTDOWN", ())


def test_a_target_of_grpcs_own_is_one_endpoint(server: Server) -> None:
    with mesh.insecure_channel(server.address) as channel:
        channel.unary_unary(UNARY)(b"ok", timeout=5)
        (endpoint,) = channel.stats().endpoints
    assert (endpoint.address, endpoint.state) == (server.address, "READY")


async def test_asyncio_channels_have_the_same(servers: list[Server]) -> None:
    async with mesh.aio.insecure_channel(static(servers)) as channel:
        await channel.unary_unary(UNARY)(b"ok", timeout=5)
        stats = channel.stats()
    assert stats.state == "READY"
    assert len(stats.endpoints) == len(servers)
    assert {field.name for field in dataclasses.fields(stats)} >= {"target", "panic", "retry_budget"}
