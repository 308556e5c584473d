"""``mesh.testing.Mesh``: what tests with blocking calls rely on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

import mesh
from mesh.testing import Mesh
from tests.processes import eventually
from tests.testing.suite import NAME, Echo, Stub, add_to_server

SERVICERS = [(add_to_server, Echo())]
RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": NAME}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.001s",
                "maxBackoff": "0.001s",
                "backoffMultiplier": 1,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

pytestmark = pytest.mark.slow


@pytest.fixture
def mesh_() -> Iterator[Mesh]:
    with Mesh() as mesh_:
        yield mesh_


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


def test_servicers_in_channel_out(mesh_: Mesh) -> None:
    replicas = mesh_.serve(SERVICERS, replicas=3)
    stub = Stub(mesh_.channel(NAME))
    assert stub.Unary(b"hello", timeout=10) == b"hello"
    assert [replica.name for replica in replicas] == ["Echo-0", "Echo-1", "Echo-2"]
    assert replicas[0].services == (NAME,)
    # All of them serve: a call ends at each of them in the end.
    eventually(lambda: stub.Unary(b"hello", timeout=10) and len({call.replica for call in mesh_.calls}) == 3)


def test_code_under_test_finds_the_replicas_by_the_environment_or_the_target(
    mesh_: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh_.serve(SERVICERS)
    for target in (f"mesh:///{NAME}", mesh_.target(NAME)):
        with mesh.insecure_channel(target) as channel:
            assert Stub(channel).Unary(b"hello", timeout=10) == b"hello"


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_REGISTRY", "registry:50050")
    with Mesh() as mesh_:
        assert os.environ["MESH_REGISTRY"] == mesh_.registry
    assert os.environ["MESH_REGISTRY"] == "registry:50050"
    monkeypatch.delenv("MESH_REGISTRY")
    with Mesh():
        pass
    assert "MESH_REGISTRY" not in os.environ


def test_replicas_are_real_servers_with_deadlines_and_health(mesh_: Mesh) -> None:
    left: list[float | None] = []

    class Asking(Echo):
        def Unary(self, request: bytes, context: Any) -> bytes:  # noqa: N802
            left.append(mesh.remaining())
            return request

    mesh_.serve([(add_to_server, Asking())])
    Stub(mesh_.channel(NAME)).Unary(b"", timeout=10)
    assert left[0] is not None
    assert 0 < left[0] <= 10
    [call] = mesh_.calls
    assert call.timeout is not None
    assert left[0] <= call.timeout <= 10


def test_it_serves_inside_of_its_block_alone() -> None:
    mesh_ = Mesh()
    with pytest.raises(RuntimeError, match="use it in a with block"):
        mesh_.serve(SERVICERS)
    with mesh_, pytest.raises(ValueError, match="expected at least 1 replica, got 0"):
        mesh_.serve(SERVICERS, replicas=0)
    with pytest.raises(RuntimeError, match="use it in a with block"):
        mesh_.channel(NAME)


def test_a_service_config_holds_from_a_channel_s_first_call_on(mesh_: Mesh) -> None:
    mesh_.serve(SERVICERS)
    mesh_.configure(NAME, RETRIES)
    fault = mesh_.faults.fail(UNAVAILABLE, times=2)
    assert Stub(mesh_.channel(NAME)).Unary(b"hello", timeout=10) == b"hello"
    assert fault.injected == 2
    with pytest.raises(ValueError, match="retryPolicy"):
        mesh_.configure(NAME, '{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": "many"}}]}')


def ready(channel: mesh.Channel) -> list[mesh.EndpointStats]:
    return [each for each in channel.stats().endpoints if each.state == "READY"]


def test_meshes_may_end_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_REGISTRY", "before:1")
    first, second = Mesh(), Mesh()
    with contextlib.ExitStack() as stack:
        stack.enter_context(first)
        second.__enter__()
        registry = second.registry
        assert os.environ["MESH_REGISTRY"] == registry
        stack.close()
        assert os.environ["MESH_REGISTRY"] == registry
        second.__exit__(None, None, None)
    assert os.environ["MESH_REGISTRY"] == "before:1"


def test_a_mesh_is_entered_once() -> None:
    with Mesh() as mesh_, pytest.raises(RuntimeError, match="only once: create another"):
        mesh_.__enter__()


class TestReplicas:
    def test_a_drain_finishes_calls_and_sends_new_ones_elsewhere(self, mesh_: Mesh) -> None:
        first, second = mesh_.serve(SERVICERS, replicas=2)
        stub = Stub(mesh_.channel(NAME))
        stub.Unary(b"hello", timeout=10)
        first.drain()
        assert not first.running
        mesh_.calls.clear()
        for _ in range(10):
            stub.Unary(b"hello", timeout=10)
        assert {call.replica for call in mesh_.calls} == {second.name}

    def test_one_that_is_stopped_fails_its_calls_and_starts_again(self, mesh_: Mesh) -> None:
        [replica] = mesh_.serve(SERVICERS)
        channel = mesh_.channel(NAME)
        hanging = Stub(channel).Unary.future(b"hang", timeout=10)
        mesh_.calls.wait()
        replica.stop()
        assert code_of(hanging.result) is UNAVAILABLE
        address = replica.address
        replica.start()
        assert replica.running
        assert replica.address != address
        eventually(lambda: [each.address for each in ready(channel)] == [replica.address])
        assert Stub(channel).Unary(b"hello", timeout=10) == b"hello"

    @pytest.mark.parametrize("replicas", [2, 3])
    def test_a_rolling_restart_fails_no_call(self, mesh_: Mesh, replicas: int) -> None:
        stub = Stub(mesh_.channel(NAME))
        for replica in mesh_.serve(SERVICERS, replicas=replicas):
            for _ in range(4):
                stub.Unary(b"hello", timeout=10)
            replica.drain()
            for _ in range(4):
                stub.Unary(b"hello", timeout=10)
            replica.start()
            stub.Unary(b"hello", timeout=10)

    def test_one_that_runs_can_t_be_started(self, mesh_: Mesh) -> None:
        [replica] = mesh_.serve(SERVICERS)
        with pytest.raises(RuntimeError, match="Echo-0 is running"):
            replica.start()
        assert repr(replica) == f"<Replica Echo-0 at {replica.address}>"

    def test_settings_of_one_s_own(self, mesh_: Mesh) -> None:
        settings = mesh.ServerSettings(metadata={"version": "2"}, drain_wait=0.0)
        [replica] = mesh_.serve(SERVICERS, settings=settings)
        assert dict(replica.settings.metadata) == {"version": "2"}
        assert Stub(mesh_.channel(NAME)).Unary(b"hello", timeout=10) == b"hello"

    def test_one_that_is_not_ready_is_not_waited_for(self, mesh_: Mesh) -> None:
        mesh_.serve(SERVICERS, settings=mesh.ServerSettings(ready=lambda: False, drain_wait=0.0))
        assert code_of(lambda: Stub(mesh_.channel(NAME)).Unary(b"hello", timeout=10)) is UNAVAILABLE


class TestFaults:
    @pytest.fixture
    def stub(self, mesh_: Mesh) -> Stub:
        mesh_.serve(SERVICERS, replicas=2)
        return Stub(mesh_.channel(NAME))

    def test_calls_fail_with_the_status_that_was_asked_for(self, mesh_: Mesh, stub: Stub) -> None:
        with mesh_.faults.fail(
            grpc.StatusCode.RESOURCE_EXHAUSTED, "quota", trailing_metadata=[("x-quota", "7")]
        ) as fault:
            with pytest.raises(grpc.RpcError) as caught:
                stub.Unary(b"hello", timeout=10)
            error: Any = caught.value
            assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "quota")
            assert ("x-quota", "7") in [tuple(each) for each in error.trailing_metadata()]
            assert code_of(lambda: list(stub.Responses(b"hello", timeout=10))) is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert fault.injected == 2
        assert stub.Unary(b"hello", timeout=10) == b"hello"
        assert list(mesh_.faults) == []
        assert [call.injected for call in mesh_.calls] == [True, True, False]

    def test_the_nth_call_is_dropped(self, mesh_: Mesh, stub: Stub) -> None:
        fault = mesh_.faults.drop(after=1, times=1)
        assert stub.Unary(b"1", timeout=10) == b"1"
        assert code_of(lambda: stub.Unary(b"2", timeout=0.05)) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert stub.Unary(b"3", timeout=10) == b"3"
        assert fault.injected == 1
        dropped = mesh_.calls.wait(3, ended=True)[1]
        assert (dropped.request, dropped.code) == (b"2", grpc.StatusCode.DEADLINE_EXCEEDED)

    def test_dropped_calls_end_when_the_fault_is_removed(self, mesh_: Mesh, stub: Stub) -> None:
        fault = mesh_.faults.drop()
        call = stub.Unary.future(b"hello", timeout=10)
        mesh_.calls.wait()
        fault.remove()
        assert code_of(call.result) is UNAVAILABLE

    def test_delayed_calls_go_on_when_the_fault_is_removed(self, mesh_: Mesh, stub: Stub) -> None:
        fault = mesh_.faults.delay(3600)
        call = stub.Unary.future(b"hello", timeout=30)
        mesh_.calls.wait()
        assert not call.done()
        fault.remove()
        assert call.result() == b"hello"

    def test_a_delayed_call_that_is_given_up_reaches_no_servicer(self, mesh_: Mesh, stub: Stub) -> None:
        mesh_.faults.delay(3600, times=1)
        assert code_of(lambda: stub.Unary(b"raise", timeout=0.05)) is grpc.StatusCode.DEADLINE_EXCEEDED
        [call] = mesh_.calls.wait(ended=True)
        assert (call.injected, call.error) == (True, None)

    def test_a_delay_is_waited_for(self, mesh_: Mesh, stub: Stub) -> None:
        mesh_.faults.delay(0.01)
        _, call = stub.Unary.with_call(b"hello", timeout=10)
        [attempt] = mesh.explain(call).attempts
        assert attempt.seconds is not None
        assert attempt.seconds >= 0.01

    def test_a_fault_of_one_method_or_replica_leaves_the_others_alone(self, mesh_: Mesh, stub: Stub) -> None:
        first, second = mesh_.replicas
        mesh_.faults.fail(UNAVAILABLE, method="Responses")
        assert stub.Unary(b"hello", timeout=10) == b"hello"
        assert code_of(lambda: list(stub.Responses(b"hello", timeout=10))) is UNAVAILABLE
        mesh_.faults.clear()
        mesh_.faults.fail(grpc.StatusCode.ABORTED, method=f"/{NAME}/Unary", replica=first)
        second.drain()
        assert code_of(lambda: stub.Unary(b"hello", timeout=10)) is grpc.StatusCode.ABORTED

    def test_a_call_has_all_faults_that_match_up_to_the_one_that_ends_it(self, mesh_: Mesh, stub: Stub) -> None:
        delay = mesh_.faults.delay(0.0)
        fail = mesh_.faults.fail(grpc.StatusCode.ABORTED)
        last = mesh_.faults.drop()
        assert code_of(lambda: stub.Unary(b"hello", timeout=10)) is grpc.StatusCode.ABORTED
        assert (delay.injected, fail.injected, last.injected) == (1, 1, 0)

    def test_a_misspelt_method_is_refused_with_those_that_there_are(self, mesh_: Mesh, stub: Stub) -> None:
        del stub
        with pytest.raises(ValueError, match=r"no method .Unray. is served; served methods: suite\.Echo/Both, "):
            mesh_.faults.drop(method="Unray")
        with pytest.raises(ValueError, match="no method 'Unray' is served"):
            mesh_.calls.of("Unray")

    def test_what_makes_no_sense_is_refused(self, mesh_: Mesh, stub: Stub) -> None:
        del stub
        with pytest.raises(ValueError, match="can't fail with OK"):
            mesh_.faults.fail(grpc.StatusCode.OK)
        with pytest.raises(ValueError, match="expected 0 seconds or more"):
            mesh_.faults.delay(-1)
        with pytest.raises(ValueError, match="expected after >= 0 and times >= 1"):
            mesh_.faults.drop(times=0)

    def test_they_say_what_they_do(self, mesh_: Mesh, stub: Stub) -> None:
        del stub
        fail = mesh_.faults.fail(UNAVAILABLE, replica="Echo-0", after=1, times=2)
        delay = mesh_.faults.delay(0.5, method="Unary")
        assert repr(fail) == "<Fault fail UNAVAILABLE: all methods at Echo-0, after 1, injected 0 of 2>"
        assert repr(delay) == "<Fault delay 0.5 s: Unary at all replicas, injected 0>"
        delay.remove()
        assert repr(mesh_.faults) == f"<Faults {fail!r}>"


class TestCalls:
    @pytest.fixture
    def stub(self, mesh_: Mesh) -> Stub:
        mesh_.serve(SERVICERS)
        return Stub(mesh_.channel(NAME))

    def test_a_call_is_recorded_with_all_that_came_and_how_it_ended(self, mesh_: Mesh, stub: Stub) -> None:
        stub.Unary(b"hello", timeout=10, metadata=[("x-id", "7"), ("x-raw-bin", b"\x00")])
        [call] = mesh_.calls
        assert (call.method, call.replica, call.request) == (f"/{NAME}/Unary", "Echo-0", b"hello")
        assert {("x-id", "7"), ("x-raw-bin", b"\x00")} <= set(call.metadata)
        assert (call.code, call.details, call.error) == (grpc.StatusCode.OK, "", None)
        assert repr(call) == f"<RecordedCall /{NAME}/Unary at Echo-0: OK>"

    def test_the_status_and_what_the_servicer_raised(self, mesh_: Mesh, stub: Stub) -> None:
        assert code_of(lambda: stub.Unary(b"fail", timeout=10)) is grpc.StatusCode.NOT_FOUND
        assert code_of(lambda: stub.Unary(b"raise", timeout=10)) is grpc.StatusCode.INTERNAL
        aborted, raised = mesh_.calls
        assert (aborted.code, aborted.details, aborted.error) == (grpc.StatusCode.NOT_FOUND, "no such thing", None)
        assert raised.code is grpc.StatusCode.INTERNAL
        assert isinstance(raised.error, LookupError)

    def test_all_requests_of_streams(self, mesh_: Mesh, stub: Stub) -> None:
        assert stub.Requests(iter([b"a", b"b"]), timeout=10) == b"ab"
        assert list(stub.Both(iter([b"c", b"d"]), timeout=10)) == [b"c", b"d"]
        assert list(stub.Responses(b"e", timeout=10)) == [b"e", b"e"]
        assert [call.requests for call in mesh_.calls] == [[b"a", b"b"], [b"c", b"d"], [b"e"]]
        assert [call.code for call in mesh_.calls.wait(3, ended=True)] == [grpc.StatusCode.OK] * 3

    def test_those_of_one_method(self, mesh_: Mesh, stub: Stub) -> None:
        stub.Unary(b"1", timeout=10)
        stub.Requests(iter([b"2"]), timeout=10)
        assert [call.request for call in mesh_.calls.of("Requests")] == [b"2"]
        assert [call.request for call in mesh_.calls.of(f"{NAME}/Unary", replica=mesh_.replicas[0])] == [b"1"]
        assert mesh_.calls.of(replica="Echo-9") == ()
        assert len(mesh_.calls[:1]) == 1
        mesh_.calls.clear()
        assert len(mesh_.calls) == 0

    def test_waiting_ends_when_the_calls_came(self, mesh_: Mesh, stub: Stub) -> None:
        call = stub.Unary.future(b"hang", timeout=10)
        [recorded] = mesh_.calls.wait(1, "Unary")
        assert recorded.code is None
        assert str(recorded).endswith("RUNNING")
        call.cancel()
        assert mesh_.calls.wait(1, "Unary", ended=True) == (recorded,)
        assert recorded.code is grpc.StatusCode.CANCELLED

    def test_waiting_in_vain_says_what_came(self, mesh_: Mesh, stub: Stub) -> None:
        stub.Unary(b"hello", timeout=10)
        with pytest.raises(TimeoutError, match=r"(?s)1 of 2 calls of Unary arrived within 0.01 s.*Unary at Echo-0: OK"):
            mesh_.calls.wait(2, "Unary", timeout=0.01)


@pytest.mark.parametrize(
    ("fault", "error", "why"),
    [
        ({"code": 13}, TypeError, r"expected a grpc.StatusCode, got 13"),
        ({"code": "INTERNAL"}, TypeError, r"expected a grpc.StatusCode, got 'INTERNAL'"),
        ({"code": UNAVAILABLE, "replica": "typo"}, ValueError, r"no replica 'typo'; replicas: Echo-0"),
        ({"code": UNAVAILABLE, "times": 1.5}, TypeError, r"expected whole numbers, got after=0 and times=1.5"),
        ({"code": UNAVAILABLE, "times": True}, TypeError, r"expected whole numbers"),
    ],
)
def test_a_fault_that_could_never_be_meant_is_an_error(mesh_: Mesh, fault: Any, error: Any, why: str) -> None:
    mesh_.serve(SERVICERS)
    with pytest.raises(error, match=why):
        mesh_.faults.fail(**fault)
    assert not [*mesh_.faults]
