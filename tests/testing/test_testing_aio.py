"""``mesh.testing.aio.Mesh``: what asynchronous tests rely on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import pytest

import mesh
import mesh.aio
from mesh.testing.aio import Mesh
from tests.testing.suite import NAME, AioEcho, Echo, Stub, add_to_server

SERVICERS = [(add_to_server, AioEcho())]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

pytestmark = pytest.mark.slow


@pytest.fixture
async def mesh_() -> AsyncIterator[Mesh]:
    async with Mesh() as mesh_:
        yield mesh_


async def code_of(call: Awaitable[object]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def responses(call: Any) -> list[bytes]:
    return [response async for response in call]


async def test_servicers_in_channel_out(mesh_: Mesh) -> None:
    replicas = await mesh_.serve(SERVICERS, replicas=3)
    stub = Stub(mesh_.channel(NAME))
    assert await stub.Unary(b"hello", timeout=10) == b"hello"
    assert [str(replica) for replica in replicas] == ["Echo-0", "Echo-1", "Echo-2"]
    async with asyncio.timeout(10):
        while len({call.replica for call in mesh_.calls}) < 3:
            await stub.Unary(b"hello", timeout=10)


async def test_code_under_test_finds_the_replicas_by_the_environment(mesh_: Mesh) -> None:
    await mesh_.serve(SERVICERS)
    async with mesh.aio.insecure_channel(f"mesh:///{NAME}") as channel:
        assert await Stub(channel).Unary(b"hello", timeout=10) == b"hello"


async def test_it_serves_inside_of_its_block_alone() -> None:
    mesh_ = Mesh()
    with pytest.raises(RuntimeError, match="use it in a with block"):
        await mesh_.serve(SERVICERS)
    async with mesh_:
        assert mesh_.registry in repr(mesh_)
    assert "not running" in repr(mesh_)


async def test_a_service_config_holds_from_a_channel_s_first_call_on(mesh_: Mesh) -> None:
    await mesh_.serve(SERVICERS)
    await mesh_.configure(NAME, {"methodConfig": [{"name": [{"service": NAME}], "timeout": "0.05s"}]})
    mesh_.faults.drop()
    assert await code_of(Stub(mesh_.channel(NAME)).Unary(b"hello")) is grpc.StatusCode.DEADLINE_EXCEEDED
    with pytest.raises(ValueError, match="timeout"):
        await mesh_.configure(NAME, {"methodConfig": [{"name": [{}], "timeout": "soon"}]})


async def test_replicas_are_drained_stopped_and_started(mesh_: Mesh) -> None:
    first, second = await mesh_.serve(SERVICERS, replicas=2)
    channel = mesh_.channel(NAME)
    stub = Stub(channel)
    await stub.Unary(b"hello", timeout=10)
    await first.drain()
    mesh_.calls.clear()
    for _ in range(5):
        await stub.Unary(b"hello", timeout=10)
    assert {call.replica for call in mesh_.calls} == {second.name}
    hanging = stub.Unary(b"hang", timeout=10)
    await mesh_.calls.wait(6)
    await first.start()
    await second.stop()
    assert await code_of(hanging) is UNAVAILABLE
    assert (first.running, second.running) == (True, False)

    def ready() -> list[str]:
        return [each.address for each in channel.stats().endpoints if each.state == "READY"]

    async with asyncio.timeout(10):
        while ready() != [first.address]:  # noqa: ASYNC110 - what it asks has no event
            await asyncio.sleep(0.01)
    assert await stub.Unary(b"hello", timeout=10) == b"hello"
    assert mesh_.calls[-1].replica == first.name


@pytest.mark.parametrize("echo", [AioEcho(), Echo()], ids=["async", "threads"])
class TestHandlersOfBothKinds:
    async def test_faults(self, mesh_: Mesh, echo: Any) -> None:
        await mesh_.serve([(add_to_server, echo)])
        stub = Stub(mesh_.channel(NAME))
        with mesh_.faults.fail(grpc.StatusCode.ABORTED, "no", times=2, trailing_metadata=[("x-why", "test")]) as fault:
            call = stub.Unary(b"hello", timeout=10)
            assert await code_of(call) is grpc.StatusCode.ABORTED
            assert (await call.details(), fault.injected) == ("no", 1)
            assert ("x-why", "test") in [tuple(each) for each in await call.trailing_metadata()]
            assert await code_of(responses(stub.Responses(b"hello", timeout=10))) is grpc.StatusCode.ABORTED
            assert await stub.Unary(b"hello", timeout=10) == b"hello"

        mesh_.calls.clear()
        delay = mesh_.faults.delay(3600)
        delayed = asyncio.ensure_future(stub.Unary(b"later", timeout=30))
        await mesh_.calls.wait()
        delay.remove()
        assert await delayed == b"later"
        drop = mesh_.faults.drop()
        dropped = asyncio.ensure_future(stub.Unary(b"never", timeout=30))
        await mesh_.calls.wait(2)
        drop.remove()
        assert await code_of(dropped) is UNAVAILABLE
        with mesh_.faults.drop():
            assert await code_of(stub.Unary(b"late", timeout=0.05)) is grpc.StatusCode.DEADLINE_EXCEEDED
            last = (await mesh_.calls.wait(3, ended=True))[-1]
            assert last.code is grpc.StatusCode.DEADLINE_EXCEEDED
        with mesh_.faults.delay(0.001):
            assert await stub.Unary(b"soon", timeout=10) == b"soon"

    async def test_recorded_calls(self, mesh_: Mesh, echo: Any) -> None:
        await mesh_.serve([(add_to_server, echo)])
        stub = Stub(mesh_.channel(NAME))
        assert await stub.Unary(b"hello", timeout=10, metadata=[("x-id", "7")]) == b"hello"
        [call] = mesh_.calls
        assert (call.request, call.code, call.replica) == (b"hello", grpc.StatusCode.OK, "Echo-0")
        assert ("x-id", "7") in call.metadata
        assert call.timeout is not None
        assert await code_of(stub.Unary(b"fail", timeout=10)) is grpc.StatusCode.NOT_FOUND
        assert (mesh_.calls[-1].code, mesh_.calls[-1].details) == (grpc.StatusCode.NOT_FOUND, "no such thing")
        assert mesh_.calls[-1].error is None
        assert await code_of(stub.Unary(b"raise", timeout=10)) is grpc.StatusCode.INTERNAL
        *_, raised = mesh_.calls
        assert isinstance(raised.error, LookupError)
        hanging = stub.Unary(b"hang", timeout=10)
        await mesh_.calls.wait(4)
        hanging.cancel()
        assert (await mesh_.calls.wait(4, ended=True))[-1].code is grpc.StatusCode.CANCELLED

    async def test_recorded_streams(self, mesh_: Mesh, echo: Any) -> None:
        await mesh_.serve([(add_to_server, echo)])
        stub = Stub(mesh_.channel(NAME))
        assert await stub.Requests(iter([b"a", b"b"]), timeout=10) == b"ab"
        assert await responses(stub.Both(iter([b"c", b"d"]), timeout=10)) == [b"c", b"d"]
        assert await responses(stub.Responses(b"e", timeout=10)) == [b"e", b"e"]
        assert [call.requests for call in mesh_.calls] == [[b"a", b"b"], [b"c", b"d"], [b"e"]]
        assert {call.code for call in await mesh_.calls.wait(3, ended=True)} == {grpc.StatusCode.OK}


async def test_waiting_in_vain_says_what_came(mesh_: Mesh) -> None:
    await mesh_.serve(SERVICERS)
    with pytest.raises(TimeoutError, match=r"(?s)0 of 1 calls arrived within 0.01 s; all calls: none"):
        await mesh_.calls.wait(timeout=0.01)
