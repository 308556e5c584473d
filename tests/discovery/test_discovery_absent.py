"""A service that the registry knows nothing of: the error names the registry, and the services that it does know."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

import mesh.aio
from mesh.discovery.absent import describe
from tests.registry.serving import BOUND, ORDER, USER, instance, serving
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

WITHIN = 10.0


async def fails(target: str) -> str:
    channel: Any
    async with mesh.aio.insecure_channel(target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/a/B")(b"", timeout=WITHIN)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    return raised.value.details() or ""


async def test_the_services_that_it_knows_are_listed_those_most_alike_first() -> None:
    async with serving() as registry:
        target = f"mesh://{registry.address}/weft.user.v1.UserServce"
        registry_says = f"registry {registry.address} has no instances of 'weft.user.v1.UserServce'; "
        assert await fails(target) == f"{target}: {registry_says}known services: none"
        await registry.register(instance("o", ORDER))
        await registry.register(instance("u", USER))
        assert await fails(target) == f"{target}: {registry_says}known services: {USER}, {ORDER}"


async def test_of_many_services_five_are_listed() -> None:
    async with serving() as registry:
        for number in range(8):
            await registry.register(instance("a", f"test.S{number}"))
        text = await describe(registry.stub, "R", "test.S9")
        assert text.endswith("known services: test.S0, test.S1, test.S2, test.S3, test.S4 and 3 more")


async def test_services_on_later_pages_are_listed_too() -> None:
    async with serving() as registry:
        for number in range(1_000):
            registry.book.register(instance(str(number), "test.S0"), BOUND, asyncio.get_running_loop().time())
        for number in range(1, 4):
            await registry.register(instance("a", f"test.S{number}"))
        text = await describe(registry.stub, "R", "test.S9")
        assert text.endswith("known services: test.S0, test.S1, test.S2, test.S3")


async def test_a_registry_that_does_not_list_them_is_named_all_the_same() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        assert await describe(pb_grpc.RegistryStub(channel), "R", "S") == "registry R has no instances of 'S'"
