"""What the tests of both worlds call: a servicer of all four kinds, as generated code adds it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any

import grpc

NAME = "suite.Echo"
KINDS = ("Unary", "Responses", "Requests", "Both")


class Echo:
    """Gives back what it gets, as often as it comes. ``fail`` aborts, ``raise`` raises; ``hang`` waits for the end of
    its call."""

    def Unary(self, request: bytes, context: Any) -> bytes:  # noqa: N802
        if request == b"fail":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        if request == b"raise":
            raise LookupError("a bug")
        if request == b"hang":
            over = threading.Event()
            if context.add_callback(over.set):
                over.wait()
        return request

    def Responses(self, request: bytes, context: Any) -> Iterator[bytes]:  # noqa: N802
        yield self.Unary(request, context)
        yield request

    def Requests(self, requests: Iterable[bytes], context: Any) -> bytes:  # noqa: N802
        return b"".join(requests)

    def Both(self, requests: Iterable[bytes], context: Any) -> Iterator[bytes]:  # noqa: N802
        yield from requests


class AioEcho:
    """The same for asyncio."""

    async def Unary(self, request: bytes, context: Any) -> bytes:  # noqa: N802
        if request == b"fail":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        if request == b"raise":
            raise LookupError("a bug")
        if request == b"hang":
            await _forever()
        return request

    async def Responses(self, request: bytes, context: Any) -> AsyncIterator[bytes]:  # noqa: N802
        yield await self.Unary(request, context)
        yield request

    async def Requests(self, requests: AsyncIterable[bytes], context: Any) -> bytes:  # noqa: N802
        return b"".join([request async for request in requests])

    async def Both(self, requests: AsyncIterable[bytes], context: Any) -> None:  # noqa: N802
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request)


async def _forever() -> None:
    await asyncio.get_running_loop().create_future()


def add_to_server(servicer: Any, server: Any) -> None:
    """As generated code does it."""
    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(servicer.Unary),
        "Responses": grpc.unary_stream_rpc_method_handler(servicer.Responses),
        "Requests": grpc.stream_unary_rpc_method_handler(servicer.Requests),
        "Both": grpc.stream_stream_rpc_method_handler(servicer.Both),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
    server.add_registered_method_handlers(NAME, handlers)


class Stub:
    """As generated code has it. Sent messages are bytes, and so are responses."""

    def __init__(self, channel: Any) -> None:
        self.Unary = channel.unary_unary(f"/{NAME}/Unary")
        self.Responses = channel.unary_stream(f"/{NAME}/Responses")
        self.Requests = channel.stream_unary(f"/{NAME}/Requests")
        self.Both = channel.stream_stream(f"/{NAME}/Both")
