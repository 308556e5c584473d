"""Tests of directory.py with mesh.testing: real servers, a real registry, real channels, and faults on demand.

pytest examples/testing
"""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

import mesh
import mesh.testing
from examples.testing.directory import Directory
from weft.user.v1 import user_pb2, user_pb2_grpc


class Users(user_pb2_grpc.UserServiceServicer):
    """All that these tests need of the user service."""

    def GetUser(self, request: user_pb2.GetUserRequest, context: Any) -> user_pb2.GetUserResponse:  # noqa: N802
        if request.id != "1":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such user")
        return user_pb2.GetUserResponse(user=user_pb2.User(id=request.id, name="Ada"))


# The methods that it lacks answer UNIMPLEMENTED.
USERS = [(user_pb2_grpc.add_UserServiceServicer_to_server, Users())]  # type: ignore[abstract]


@pytest.fixture
def users(weft_mesh: mesh.testing.Mesh) -> mesh.testing.Mesh:
    """Two replicas of the user service."""
    weft_mesh.serve(USERS, replicas=2)
    return weft_mesh


@pytest.fixture
def clock() -> mesh.testing.FakeClock:
    return mesh.testing.FakeClock()


@pytest.fixture
def directory(users: mesh.testing.Mesh, clock: mesh.testing.FakeClock) -> Iterator[Directory]:
    with Directory(clock) as directory:
        yield directory


def test_it_finds_names(directory: Directory) -> None:
    assert directory.name_of("1") == "Ada"
    assert directory.name_of("2") == "nobody"


def test_it_keeps_a_name_for_a_minute(
    users: mesh.testing.Mesh, directory: Directory, clock: mesh.testing.FakeClock
) -> None:
    for seconds in (0, 59):
        clock.advance(seconds)
        directory.name_of("1")
    assert len(users.calls) == 1
    clock.advance(1)
    directory.name_of("1")
    assert len(users.calls) == 2


def test_a_replica_that_fails_is_not_noticed(users: mesh.testing.Mesh, directory: Directory) -> None:
    fault = users.faults.fail(grpc.StatusCode.UNAVAILABLE, method="GetUser", times=1)
    assert directory.name_of("1") == "Ada"
    assert fault.injected == 1
    first, second = users.calls.wait(2)
    assert (first.code, second.code) == (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK)
    assert first.replica != second.replica


def test_a_drain_is_not_noticed(users: mesh.testing.Mesh, directory: Directory, clock: mesh.testing.FakeClock) -> None:
    directory.name_of("1")
    first, second = users.replicas
    first.drain()
    users.calls.clear()
    for _ in range(5):
        clock.advance(60)
        assert directory.name_of("1") == "Ada"
    assert {call.replica for call in users.calls} == {second.name}


def test_what_fails_everywhere_says_where_it_was_tried(users: mesh.testing.Mesh, directory: Directory) -> None:
    users.faults.fail(grpc.StatusCode.UNAVAILABLE, "out of memory")
    with pytest.raises(grpc.RpcError) as caught:
        directory.name_of("1")
    explanation = mesh.explain(caught.value)
    assert {attempt.address for attempt in explanation.attempts} == {replica.address for replica in users.replicas}
    assert all("out of memory" in str(attempt) for attempt in explanation.attempts)


async def test_asynchronous_code_has_a_twin(weft_mesh_aio: mesh.testing.aio.Mesh) -> None:
    await weft_mesh_aio.serve(USERS, replicas=2)
    weft_mesh_aio.faults.delay(0.001, after=1, times=1)
    stub: user_pb2_grpc.UserServiceAsyncStub = user_pb2_grpc.UserServiceStub(
        weft_mesh_aio.channel("weft.user.v1.UserService")
    )
    for _ in range(2):
        assert (await stub.GetUser(user_pb2.GetUserRequest(id="1"), timeout=5)).user.name == "Ada"
    assert len(weft_mesh_aio.calls) == 2
