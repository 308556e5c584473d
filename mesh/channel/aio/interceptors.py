"""An asyncio channel's interceptors, and the calls that go through them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import grpc
from grpc.aio import _interceptor as interceptor_calls

from mesh.channel.aio.call import Call
from mesh.observe import Explanation

INSTRUMENTATION: Any = object()
"""Stands for the interceptors that instrumentation adds until the channel's first use: gRPC creates an asyncio channel
only on a running loop."""


_KINDS: dict[str, type[grpc.aio.ClientInterceptor]] = {
    "unary_unary": grpc.aio.UnaryUnaryClientInterceptor,
    "unary_stream": grpc.aio.UnaryStreamClientInterceptor,
    "stream_unary": grpc.aio.StreamUnaryClientInterceptor,
    "stream_stream": grpc.aio.StreamStreamClientInterceptor,
}


def interceptors_by_kind(interceptors: Sequence[grpc.aio.ClientInterceptor]) -> dict[str, list[Any]]:
    """The interceptors of each kind. One that is of several kinds is in each of them (grpc's own channel uses only the
    first, grpc/grpc#43512)."""
    for interceptor in interceptors:
        if not isinstance(interceptor, tuple(_KINDS.values())):
            names = " or ".join(kind.__name__ for kind in _KINDS.values())
            raise ValueError(f"Interceptor {interceptor} must be {names}")
    return {kind: [item for item in interceptors if isinstance(item, of)] for kind, of in _KINDS.items()}


class Callee(Protocol):
    """Makes the call that interceptors end with."""

    def call(self, requests: Any, *arguments: Any) -> Call:
        """Start a call."""

    def redirected(self, path: str) -> Callee:
        """The same for the other method that an interceptor chose."""


class Innermost:
    """Follows the last interceptor of a call, and makes the call through the mesh instead of grpc."""

    def __init__(self, multicallable: Callee, compression: grpc.Compression | None) -> None:
        self._multicallable = multicallable
        self._compression = compression
        self.call: Call | None = None
        """The call; the last one if an interceptor repeats it."""

    async def _call(self, _continuation: object, details: grpc.aio.ClientCallDetails, requests: Any) -> Any:
        method: Any = details.method
        self.call = self._multicallable.redirected(method.decode() if isinstance(method, bytes) else method).call(
            requests, details.timeout, details.metadata, details.credentials, details.wait_for_ready, self._compression
        )
        return self.call

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = intercept_stream_stream = _call


class _Explained:
    innermost: Innermost

    def explain(self) -> Explanation:
        """Every attempt that was made for the call so far. Raises InvalidStateError until the interceptors, which run
        in a task, have made the call."""
        if self.innermost.call is None:
            raise asyncio.InvalidStateError("the interceptors have not made the call")
        return self.innermost.call.explain()


INTERCEPTED: dict[str, Any] = {
    kind: type(call.__name__, (_Explained, call), {})
    for kind, call in (
        ("unary_unary", interceptor_calls.InterceptedUnaryUnaryCall),
        ("unary_stream", interceptor_calls.InterceptedUnaryStreamCall),
        ("stream_unary", interceptor_calls.InterceptedStreamUnaryCall),
        ("stream_stream", interceptor_calls.InterceptedStreamStreamCall),
    )
}
