"""What a channel and a call are given: iterables that can be read only once are read once, as plain gRPC does."""

from __future__ import annotations

import asyncio
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
    assert (seen["x-one"], seen["weft-criticality"]) == ("1", "CRITICAL_PLUS")


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


@pytest.mark.parametrize("name", OPEN)
def test_a_method_may_be_named_in_bytes(name: str, server: Server) -> None:
    with OPEN[name](server.address) as channel:
        method: Any = UNARY.encode()
        assert channel.unary_unary(method)(b"ok", timeout=TIMEOUT) == b"ok"


@pytest.mark.parametrize("name", OPEN_AIO)
async def test_a_method_of_an_asyncio_channel_may_be_named_in_bytes(name: str, server: Server) -> None:
    async with OPEN_AIO[name](server.address) as channel:
        assert await channel.unary_unary(UNARY.encode())(b"ok", timeout=TIMEOUT) == b"ok"


@pytest.mark.parametrize("name", OPEN)
def test_a_future_whose_channel_is_closed_has_failed_and_was_not_cancelled(name: str, server: Server) -> None:
    channel = OPEN[name](server.address)
    future = channel.unary_unary(UNARY).future(b"hang", timeout=TIMEOUT, wait_for_ready=True)
    assert channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT, wait_for_ready=True) == b"ok"
    channel.close()
    with pytest.raises(grpc.RpcError) as raised:
        future.result()
    assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.CANCELLED, "Channel closed!")
    assert not future.cancelled()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPEN_AIO)
async def test_a_burst_of_calls_is_not_refused(name: str) -> None:
    together = asyncio.Event()
    begun = 0

    async def handle(request: bytes, context: object) -> bytes:
        nonlocal begun
        begun += 1
        if begun == 1500:
            together.set()
        await together.wait()
        return request

    server = grpc.aio.server(
        options=[(f"grpc.server.max_pending_requests{each}", 10_000) for each in ("", "_hard_limit")]
    )
    handlers: dict[str, Any] = {"Wait": grpc.unary_unary_rpc_method_handler(handle)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Burst", handlers)])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with OPEN_AIO[name](address) as channel:
        call = channel.unary_unary("/test.Burst/Wait")
        assert await asyncio.gather(*(call(b"ok", timeout=60) for _ in range(1500))) == [b"ok"] * 1500
    await server.stop(None)
