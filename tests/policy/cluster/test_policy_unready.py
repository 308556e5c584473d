"""The error of a call that no endpoint could take: which endpoints there are, in which state, since when, and why."""

from __future__ import annotations

import pytest

from mesh.codes import Code
from mesh.config.settings import OutlierDetectionConfig, ServiceConfig
from mesh.model import Connectivity
from mesh.policy.cluster.unready import EndpointState, describe
from tests.policy.driving import Driven, cluster_of, set_states

CONNECTING = Connectivity.CONNECTING
FAILED = Connectivity.TRANSIENT_FAILURE


@pytest.mark.parametrize(
    ("seen", "causes", "waited", "text"),
    [
        pytest.param(
            {"a:1": EndpointState(FAILED, 0.0)},
            {"a:1": "health check returned UNKNOWN"},
            None,
            "a:1: health check returned UNKNOWN",
            id="one endpoint and its cause",
        ),
        pytest.param(
            {"a:1": EndpointState(FAILED, 8.0)},
            {"a:1": ""},
            None,
            "a:1 TRANSIENT_FAILURE for 2.0 s",
            id="no cause is known",
        ),
        pytest.param(
            {"a:1": EndpointState(CONNECTING, 0.5)},
            {},
            9.5,
            "0 of 1 endpoints connected after 9.5 s: a:1 CONNECTING for 9.5 s",
            id="one endpoint was waited for",
        ),
        pytest.param(
            {
                "a:1": EndpointState(CONNECTING, 1.0),
                "b:1": EndpointState(FAILED, 2.0),
                "c:1": EndpointState(Connectivity.IDLE, 3.0),
            },
            {"b:1": "connection refused"},
            10.0,
            "0 of 3 endpoints connected after 10.0 s: "
            "b:1: connection refused, a:1 CONNECTING for 9.0 s, c:1 IDLE for 7.0 s",
            id="causes come first",
        ),
        pytest.param(
            {f"{each}:1": EndpointState(FAILED, 10.0) for each in "abcdefgh"},
            {f"{each}:1": "connection refused" for each in "abcdefgh"},
            None,
            "0 of 8 endpoints connected: "
            "a:1: connection refused, b:1: connection refused, c:1: connection refused, and 5 more",
            id="three are named",
        ),
        pytest.param(
            {"a:1": EndpointState(CONNECTING, 1.0)},
            {"a:1": "connection refused"},
            None,
            "a:1 CONNECTING for 9.0 s",
            id="what failed before is no cause while it connects",
        ),
    ],
)
def test_it_names_endpoints_states_times_and_causes(
    seen: dict[str, EndpointState], causes: dict[str, str], waited: float | None, text: str
) -> None:
    assert describe(seen, causes, 10.0, waited) == text


def test_an_endpoint_that_became_ready_meanwhile_is_counted() -> None:
    seen = {"a": EndpointState(Connectivity.READY, 4.0), "b": EndpointState(CONNECTING, 1.0)}
    assert describe(seen, {}, 4.0, 4.0).startswith("1 of 2 endpoints connected after 4.0 s: a READY for 0.0 s")


def test_the_time_in_a_state_counts_from_its_last_change() -> None:
    cluster = cluster_of(1)
    cluster.sweep(3.0)
    set_states(cluster, CONNECTING)
    call = Driven(cluster=cluster, now=3.0, deadline=5.0)
    call.elapses()
    call.ends(Code.DEADLINE_EXCEEDED, "test: 0 of 1 endpoints connected after 2.0 s: e0 CONNECTING for 2.0 s")


def test_an_ejection_keeps_its_reason_and_its_time_until_it_ends() -> None:
    cluster = cluster_of(
        3, ServiceConfig(outlier_detection=OutlierDetectionConfig(consecutive_failures=1, base_time=30.0))
    )
    node = cluster.nodes["e1"]
    node.breaker.record_failure(0.0, Code.UNAVAILABLE)
    cluster.ejections.on_breaker_event(node)
    cluster.sweep(1.0)
    assert cluster.ejections.reasons.keys() == {"e1"}
    assert cluster.ejections.reasons["e1"].startswith("consecutive failures; for 3")
    cluster.update([each.endpoint for each in cluster.nodes.values() if each is not node])
    assert cluster.ejections.reasons == {}
