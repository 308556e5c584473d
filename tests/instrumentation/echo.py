"""A service with a method of each kind, for servers of both worlds: what it is sent comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc


def add_aio(name: str) -> Callable[[object, Any], None]:
    """What adds the service to a ``grpc.aio.Server``."""
    failed: list[bytes] = []

    async def unary(request: bytes, context: Any) -> bytes:
        if request == b"absent":
            await context.abort(grpc.StatusCode.NOT_FOUND, "nothing here")
        return request

    async def flaky(request: bytes, context: Any) -> bytes:
        if not failed:
            failed.append(request)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "once")
        return request

    async def responses(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for number in range(3):
            yield request + b"%d" % number
        if request == b"absent":
            await context.abort(grpc.StatusCode.NOT_FOUND, "nothing more")

    async def requests(requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b",".join([request async for request in requests])

    async def both(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    def threaded(request: bytes, context: Any) -> Iterator[bytes]:
        yield from (request, request)

    return _add(name, unary, flaky, responses, requests, both, threaded)


def add_sync(name: str) -> Callable[[object, Any], None]:
    """What adds the service to a ``grpc.Server``."""
    failed: list[bytes] = []

    def unary(request: bytes, context: Any) -> bytes:
        if request == b"absent":
            context.abort(grpc.StatusCode.NOT_FOUND, "nothing here")
        return request

    def flaky(request: bytes, context: Any) -> bytes:
        if not failed:
            failed.append(request)
            context.abort(grpc.StatusCode.UNAVAILABLE, "once")
        return request

    def responses(request: bytes, context: Any) -> Iterator[bytes]:
        for number in range(3):
            yield request + b"%d" % number
        if request == b"absent":
            context.abort(grpc.StatusCode.NOT_FOUND, "nothing more")

    def requests(requests: Iterator[bytes], context: Any) -> bytes:
        return b",".join(requests)

    def both(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        yield from requests

    def threaded(request: bytes, context: Any) -> Iterator[bytes]:
        yield from (request, request)

    return _add(name, unary, flaky, responses, requests, both, threaded)


def _add(
    name: str, unary: Any, flaky: Any, responses: Any, requests: Any, both: Any, threaded: Any
) -> Callable[[object, Any], None]:
    def add(servicer: object, server: Any) -> None:
        handlers: dict[str, Any] = {
            "Unary": grpc.unary_unary_rpc_method_handler(unary),
            "Flaky": grpc.unary_unary_rpc_method_handler(flaky),
            "Responses": grpc.unary_stream_rpc_method_handler(responses),
            "Requests": grpc.stream_unary_rpc_method_handler(requests),
            "Both": grpc.stream_stream_rpc_method_handler(both),
            "Threaded": grpc.unary_stream_rpc_method_handler(threaded),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))

    return add
