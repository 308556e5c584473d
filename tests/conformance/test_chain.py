"""Chains of three services, each of which may try a call three times: what a user's call costs the last of them."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import grpc
import pytest

import mesh
import mesh.aio
from mesh.server.handlers.interceptors import AioServerInterceptor, ServerInterceptor
from tests.conformance.cases import retry
from tests.conformance.servers import PREVIOUS_ATTEMPTS, PUSHBACK

METHOD = "/test.Chain/Call"
WITHIN = 10.0  # seconds that a user's call may take
OPTIONS = [("grpc.service_config", json.dumps(retry(3)))]


class Handler(grpc.GenericRpcHandler):
    """Serves the one method by ``behavior``, and remembers how many attempts the caller said came before."""

    def __init__(self, behavior: Callable[..., Any]) -> None:
        self.behavior = behavior
        self.seen: list[str] = []
        self.lock = threading.Lock()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        previous = dict(handler_call_details.invocation_metadata).get(PREVIOUS_ATTEMPTS, "")
        with self.lock:
            self.seen.append(str(previous))
        return grpc.unary_unary_rpc_method_handler(self.behavior)


def fail(_: bytes, context: grpc.ServicerContext) -> bytes:
    context.abort(grpc.StatusCode.UNAVAILABLE, "the leaf is down")
    raise AssertionError


def tell_time(_: bytes, __: grpc.ServicerContext) -> bytes:
    remaining = mesh.remaining()
    return b"none" if remaining is None else str(remaining).encode()


def passing(channel: Any, *, recover: bool = False, detached: bool = False) -> Callable[..., bytes]:
    """A handler that makes the same call further down, and passes a failure up unless it is to ``recover``."""

    def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
        call = channel.unary_unary(METHOD)
        try:
            if detached:
                with mesh.detach():
                    return bytes(call(request))
            return bytes(call(request))
        except grpc.RpcError as error:
            if recover:
                return b"from a cache"
            context.abort(error.code(), error.details() or "")
            raise AssertionError from None

    return handle


def apassing(channel: Any, *, recover: bool = False, detached: bool = False) -> Callable[..., Any]:
    async def handle(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        call = channel.unary_unary(METHOD)
        try:
            if detached:
                with mesh.detach():
                    return bytes(await call(request))
            return bytes(await call(request))
        except grpc.aio.AioRpcError as error:
            if recover:
                return b"from a cache"
            await context.abort(error.code(), error.details() or "")

    return handle


class Chain:
    """Servers that are stopped, and channels that are closed, with the test."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def serve(self, behavior: Callable[..., Any]) -> tuple[Any, Handler]:
        """A channel to a new service."""
        handler = Handler(behavior)
        pool = ThreadPoolExecutor(4)
        server = grpc.server(pool, handlers=[handler], interceptors=[ServerInterceptor()])
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        self.stack.callback(pool.shutdown)
        self.stack.callback(lambda: server.stop(None).wait())
        return self.stack.enter_context(mesh.insecure_channel(f"static:///{address}", OPTIONS)), handler


class AioChain:
    """The same over asyncio."""

    def __init__(self) -> None:
        self.stack = AsyncExitStack()

    async def serve(self, behavior: Callable[..., Any]) -> tuple[Any, Handler]:
        handler = Handler(behavior)
        server = grpc.aio.server(handlers=[handler], interceptors=[AioServerInterceptor()])
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self.stack.push_async_callback(server.stop, None)
        channel = mesh.aio.insecure_channel(f"static:///{address}", OPTIONS)
        return await self.stack.enter_async_context(channel), handler


async def afail(_: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "the leaf is down")
    raise AssertionError


async def atell_time(request: bytes, context: Any) -> bytes:
    return tell_time(request, context)


@pytest.fixture
def chain() -> Iterator[Chain]:
    chain = Chain()
    with chain.stack:
        yield chain


@pytest.fixture
async def achain() -> AsyncIterator[AioChain]:
    chain = AioChain()
    async with chain.stack:
        yield chain


# threads


def test_a_leaf_that_fails_sees_three_attempts_and_not_twenty_seven(chain: Chain) -> None:
    leaf, leaf_seen = chain.serve(fail)
    middle, middle_seen = chain.serve(passing(leaf))
    top, top_seen = chain.serve(passing(middle))
    with pytest.raises(grpc.RpcError) as raised:
        top.unary_unary(METHOD)(b"", timeout=WITHIN)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert leaf_seen.seen == ["", "1", "2"]
    assert middle_seen.seen == top_seen.seen == [""]
    trailers: Any = raised.value.trailing_metadata()
    assert dict(trailers)[PUSHBACK] == "-1"


def test_a_handler_that_recovers_marks_nothing(chain: Chain) -> None:
    leaf, leaf_seen = chain.serve(fail)
    middle, middle_seen = chain.serve(passing(leaf, recover=True))
    top, _ = chain.serve(passing(middle))
    response, call = top.unary_unary(METHOD).with_call(b"", timeout=WITHIN)
    assert response == b"from a cache"
    assert PUSHBACK not in dict(call.trailing_metadata())
    assert len(leaf_seen.seen) == 3
    assert middle_seen.seen == [""]


def test_calls_made_for_a_retry_dont_retry(chain: Chain) -> None:
    leaf, leaf_seen = chain.serve(fail)
    middle, _ = chain.serve(passing(leaf))
    with pytest.raises(grpc.RpcError):
        middle.unary_unary(METHOD)(b"", timeout=WITHIN, metadata=(("weft-attempt", "1"),))
    assert leaf_seen.seen == ["", "", ""]  # the user's three attempts, each of which makes one


def test_a_deadline_goes_down_the_chain(chain: Chain) -> None:
    leaf, _ = chain.serve(tell_time)
    middle, _ = chain.serve(passing(leaf))
    top, _ = chain.serve(passing(middle))
    assert 0 < float(top.unary_unary(METHOD)(b"", timeout=WITHIN)) <= WITHIN + 0.1


def test_a_detached_call_has_no_deadline(chain: Chain) -> None:
    leaf, _ = chain.serve(tell_time)
    middle, _ = chain.serve(passing(leaf, detached=True))
    assert middle.unary_unary(METHOD)(b"", timeout=WITHIN) == b"none"


# asyncio


async def test_in_asyncio_a_leaf_that_fails_sees_three_attempts_and_not_twenty_seven(achain: AioChain) -> None:
    leaf, leaf_seen = await achain.serve(afail)
    middle, middle_seen = await achain.serve(apassing(leaf))
    top, top_seen = await achain.serve(apassing(middle))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await top.unary_unary(METHOD)(b"", timeout=WITHIN)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert leaf_seen.seen == ["", "1", "2"]
    assert middle_seen.seen == top_seen.seen == [""]
    assert (PUSHBACK, "-1") in tuple(raised.value.trailing_metadata() or ())


async def test_in_asyncio_a_handler_that_recovers_marks_nothing(achain: AioChain) -> None:
    leaf, leaf_seen = await achain.serve(afail)
    middle, middle_seen = await achain.serve(apassing(leaf, recover=True))
    top, _ = await achain.serve(apassing(middle))
    call = top.unary_unary(METHOD)(b"", timeout=WITHIN)
    assert await call == b"from a cache"
    assert PUSHBACK not in dict(await call.trailing_metadata())
    assert len(leaf_seen.seen) == 3
    assert middle_seen.seen == [""]


async def test_in_asyncio_calls_made_for_a_retry_dont_retry(achain: AioChain) -> None:
    leaf, leaf_seen = await achain.serve(afail)
    middle, _ = await achain.serve(apassing(leaf))
    with pytest.raises(grpc.aio.AioRpcError):
        await middle.unary_unary(METHOD)(b"", timeout=WITHIN, metadata=(("weft-attempt", "1"),))
    assert leaf_seen.seen == ["", "", ""]


async def test_in_asyncio_a_deadline_goes_down_the_chain(achain: AioChain) -> None:
    leaf, _ = await achain.serve(atell_time)
    middle, _ = await achain.serve(apassing(leaf))
    top, _ = await achain.serve(apassing(middle))
    assert 0 < float(await top.unary_unary(METHOD)(b"", timeout=WITHIN)) <= WITHIN + 0.1


async def test_in_asyncio_a_detached_call_has_no_deadline(achain: AioChain) -> None:
    leaf, _ = await achain.serve(atell_time)
    middle, _ = await achain.serve(apassing(leaf, detached=True))
    assert await middle.unary_unary(METHOD)(b"", timeout=WITHIN) == b"none"
