"""A registry that was stopped for a while ends no lease of those that kept theirs alive."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from mesh.registry.book import Book
from mesh.server.registration import Registration
from tests.processes import Spawn
from tests.registry.serving import instance
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

TTL = 3.0
INSTANCES = 12


def test_after_a_suspension_a_lease_gets_the_time_of_one_more_keep_alive_but_not_twice() -> None:
    book = Book("e")
    kept = book.register(instance("kept"), TTL, now=0.0)
    book.register(instance("dead"), TTL, now=0.0)
    assert book.expire(3.1, maybe_suspended=True) == []
    assert book.expire(4.0) == []
    book.renew([kept], 4.05)
    assert book.expire(4.11, maybe_suspended=True) == [instance("dead")]
    # What was renewed may be doubted anew.
    assert book.expire(7.1, maybe_suspended=True) == []
    assert book.expire(8.2, maybe_suspended=True) == [instance("kept")]


def test_when_everybody_begins_anew_so_do_those_that_were_doubted() -> None:
    book = Book("e")
    book.register(instance("a"), TTL, now=0.0)
    assert book.expire(3.0, maybe_suspended=True) == []
    book.renew_all(3.5)
    assert book.expire(6.6, maybe_suspended=True) == []
    assert book.expire(7.7) == [instance("a")]


@pytest.mark.faults
@pytest.mark.parametrize("seconds", [2.2, 2.5, 2.8])
async def test_instances_that_live_outlast_a_stopped_registry(
    spawn: Spawn, free_port: Callable[[], int], seconds: float
) -> None:
    address = f"127.0.0.1:{free_port()}"
    registry = spawn.python("-m", "mesh.registry", "--listen", address)
    registry.wait_for("serving on")
    alive = [Registration(address, [an_instance(number)], TTL) for number in range(INSTANCES)]
    for registration in alive:
        registration.start()
    async with asyncio.timeout(40):
        while not all(registration.leases.held() for registration in alive):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        granted = [registration.leases.held() for registration in alive]
        for _ in range(3):
            # Keep-alives come at all phases of a period when the registry stops.
            await asyncio.sleep(0.7)
            registry.send(signal.SIGSTOP)
            await asyncio.sleep(seconds)
            registry.send(signal.SIGCONT)
        # A lease that is granted now, and not renewed, ends after those that were doubted and not renewed.
        async with grpc.aio.insecure_channel(address) as channel:
            request = pb.RegisterRequest(instance=instance("late"), ttl=Duration(seconds=2))
            await pb_grpc.RegistryStub(channel).Register(request)
        while "instance late at 10.0.0.1:50051 expired" not in registry.said:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert registry.said.count(" expired") == 1
    assert [registration.leases.held() for registration in alive] == granted
    for registration in alive:
        await registration.close(1)


@pytest.mark.faults
async def test_an_instance_that_is_dead_is_let_go_beside_others_that_live(
    spawn: Spawn, free_port: Callable[[], int]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    registry = spawn.python("-m", "mesh.registry", "--listen", address)
    registry.wait_for("serving on")
    dead, *alive = [Registration(address, [an_instance(number)], TTL) for number in range(INSTANCES)]
    for registration in (dead, *alive):
        registration.start()
    async with asyncio.timeout(30):
        while not all(registration.leases.held() for registration in (dead, *alive)):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        assert dead._task is not None
        dead._task.cancel()  # as a process that was killed: nothing is deregistered
        began = asyncio.get_running_loop().time()
        while "expired" not in registry.said:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    # A time to live, one period more at the most, and a second for a busy machine.
    assert asyncio.get_running_loop().time() - began < TTL + TTL / 3 + 1
    assert registry.said.count(" expired") == 1
    for registration in (dead, *alive):
        await registration.close(1)


def an_instance(number: int) -> pb.Instance:
    return instance(f"i{number}", address=f"10.0.0.{number + 1}:50051")
