"""What a channel and a call are given: iterables that can be read only once are read once, as plain gRPC does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh
import mesh.aio
from mesh import context
from mesh.server.settings import ServerSettings
from tests.channel.suite import BOTH, REQUESTS, RESPONSES, UNARY, Server, own

TIMEOUT = 5
SENT = (("x-one", "1"), ("x-two-bin", b"\x00\xff"))

METADATA: dict[str, Callable[[], Iterable[Any]]] = {
    "tuple": lambda: SENT,
    "list": lambda: list(SENT),
    "generator": lambda: (pair for pair in SENT),
    "iter": lambda: iter(SENT),
    "zip": lambda: zip(*zip(*SENT, strict=True), strict=True),
    "map": lambda: map(tuple, map(list, SENT)),
    "dict items": lambda: dict(SENT).items(),
    "aio.Metadata": lambda: grpc.aio.Metadata(*SENT),
}

OPEN: dict[str, Callable[..., Any]] = {
    "grpc": grpc.insecure_channel,
    "mesh": lambda address: mesh.insecure_channel(f"static:///{address}"),
}
OPEN_AIO: dict[str, Callable[..., Any]] = {
    "grpc": grpc.aio.insecure_channel,
    "mesh": lambda address, **further: mesh.aio.insecure_channel(f"static:///{address}", **further),
}


def calls(channel: Any, metadata: Callable[[], Any]) -> list[Any]:
    """A call of each kind."""
    options = {"timeout": TIMEOUT, "wait_for_ready": True}
    return [
        channel.unary_unary(UNARY).with_call(b"ok", metadata=metadata(), **options)[1],
        channel.unary_unary(UNARY).future(b"ok", metadata=metadata(), **options),
        channel.unary_stream(RESPONSES)(b"ok", metadata=metadata(), **options),
        channel.stream_unary(REQUESTS).with_call(iter([b"ok"]), metadata=metadata(), **options)[1],
        channel.stream_stream(BOTH)(iter([b"ok"]), metadata=metadata(), **options),
    ]


@pytest.mark.parametrize("form", METADATA)
@pytest.mark.parametrize("library", OPEN)
def test_metadata_of_any_form_arrives(library: str, form: str, server: Server) -> None:
    with OPEN[library](server.address) as channel:
        for call in calls(channel, METADATA[form]):
            assert own(call.initial_metadata()) == SENT
            call.cancel()


@pytest.mark.parametrize("form", METADATA)
def test_metadata_of_any_form_arrives_beside_what_a_handler_passes_on(form: str, server: Server) -> None:
    with context.entered(context.Scope(criticality="CRITICAL_PLUS")), OPEN["mesh"](server.address) as channel:
        channel.unary_unary(UNARY)(b"ok", metadata=METADATA[form](), timeout=TIMEOUT, wait_for_ready=True)
    seen = server.seen[-1][1]
    assert (seen["x-one"], seen[context.CRITICALITY]) == ("1", "CRITICAL_PLUS")


@pytest.mark.parametrize("form", METADATA)
@pytest.mark.parametrize("library", OPEN_AIO)
async def test_metadata_of_any_form_arrives_in_asyncio(library: str, form: str, server: Server) -> None:
    async with OPEN_AIO[library](server.address) as channel:
        options: dict[str, Any] = {"timeout": TIMEOUT, "wait_for_ready": True}
        for call in (
            channel.unary_unary(UNARY)(b"ok", metadata=METADATA[form](), **options),
            channel.unary_stream(RESPONSES)(b"ok", metadata=METADATA[form](), **options),
            channel.stream_unary(REQUESTS)(iter([b"ok"]), metadata=METADATA[form](), **options),
            channel.stream_stream(BOTH)(iter([b"ok"]), metadata=METADATA[form](), **options),
        ):
            assert own(await call.initial_metadata()) == SENT
            call.cancel()


class Counting(grpc.aio.UnaryUnaryClientInterceptor, grpc.aio.UnaryStreamClientInterceptor):
    """Counts the calls that pass, and passes the metadata on as an iterator."""

    def __init__(self) -> None:
        self.passed = 0

    async def _pass(self, continuation: Any, details: Any, request: Any) -> Any:
        self.passed += 1
        return await continuation(details._replace(metadata=iter(details.metadata)), request)

    intercept_unary_unary = intercept_unary_stream = _pass  # type: ignore[assignment]


@pytest.mark.parametrize("form", METADATA)
async def test_metadata_of_any_form_arrives_through_interceptors(form: str, server: Server) -> None:
    async with OPEN_AIO["mesh"](server.address, interceptors=[Counting()]) as channel:
        call = channel.unary_unary(UNARY)(b"ok", metadata=METADATA[form](), timeout=TIMEOUT)
        assert await call == b"ok"
        assert own(await call.initial_metadata()) == SENT


async def test_interceptors_given_as_an_iterator_are_there_for_every_kind(server: Server) -> None:
    counting = Counting()
    async with OPEN_AIO["mesh"](server.address, interceptors=iter([counting])) as channel:
        await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT)
        assert [message async for message in channel.unary_stream(RESPONSES)(b"ok", timeout=TIMEOUT)] == [b"ok"]
    assert counting.passed == 2


@pytest.mark.parametrize("library", [grpc.insecure_channel, mesh.insecure_channel])
def test_options_given_as_an_iterator_hold(library: Any, server: Server) -> None:
    with library(server.address, iter([("grpc.max_receive_message_length", 10)])) as channel:
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(UNARY)(b"size 100", timeout=TIMEOUT)
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_settings_of_a_server_given_as_iterators_are_there_for_every_server_that_has_them() -> None:
    settings = ServerSettings(interceptors=iter(["one"]), options=iter([("grpc.so_reuseport", 1)]))  # type: ignore[arg-type]
    for _ in range(2):
        assert list(settings.interceptors) == ["one"]
        assert ("grpc.so_reuseport", 1) in settings.server_options()
