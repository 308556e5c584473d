"""The multicallables of the four kinds. As in grpc.aio, the first attempt starts when the call is made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import grpc

from mesh.channel.aio.call import CALLS
from mesh.channel.aio.driver import Driver, Owner, Requests
from mesh.channel.aio.interceptors import INTERCEPTED, Innermost
from mesh.channel.arguments import check_call
from mesh.channel.base import BaseMulticallable
from mesh.model import Metadatum

Metadata = grpc.aio.Metadata | Sequence[Metadatum] | None


class Multicallable(BaseMulticallable):
    """What the four kinds share."""

    def __init__(
        self, channel: Owner, kind: str, path: str, serializer: Any, deserializer: Any, registered: bool | None
    ) -> None:
        super().__init__(channel, kind, path, serializer, deserializer, registered)
        self._channel = channel
        self._arguments = kind, serializer, deserializer, registered
        self._interceptors = channel.interceptors[kind]

    def redirected(self, path: str) -> Multicallable:
        """This one, or one for the other method that an interceptor chose."""
        if path == self._method.path:
            return self
        kind, serializer, deserializer, registered = self._arguments
        return type(self)(self._channel, kind, path, serializer, deserializer, registered)

    def call(
        self,
        requests: Any,
        timeout: float | None,
        metadata: Any,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
    ) -> Any:
        """Start a call."""
        if credentials is not None or compression is not None:
            check_call(credentials, compression)
        channel, method = self._channel, self._method
        channel.start()
        assembly = channel.assembly
        if credentials is not None and not assembly.secure:
            raise grpc.aio.UsageError("Call credentials are only valid on secure channels")
        now = time.monotonic()
        call = assembly.call(method, now, timeout, metadata, wait_for_ready)
        flow = assembly.flow(call, now)
        driver = Driver(channel, method, call, flow, requests, self._serializer, credentials, compression)
        channel.calls.add(driver)
        driver.start()
        return CALLS[method.kind](driver)

    def _intercepted(
        self,
        requests: Any,
        timeout: float | None,
        metadata: Metadata,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
    ) -> Any:
        """Start a call that goes through interceptors first."""
        if credentials is not None or compression is not None:
            check_call(credentials, compression)
        self._channel.start()
        if not self._interceptors:  # instrumentation added none of this kind
            return self.call(requests, timeout, metadata, credentials, wait_for_ready, compression)
        kind, serializer, deserializer, _ = self._arguments
        if not isinstance(metadata, grpc.aio.Metadata):
            metadata = grpc.aio.Metadata.from_tuple(tuple(metadata or ()))
        innermost = Innermost(self, compression)
        call = INTERCEPTED[kind](
            [*self._interceptors, innermost],
            requests,
            timeout,
            metadata,
            credentials,
            wait_for_ready,
            None,  # the core channel, which Innermost makes unnecessary
            self._method.path.encode(),
            serializer,
            deserializer,
            self._channel.loop,
        )
        call.innermost = innermost
        self._channel.intercepted.add(call)
        call.add_done_callback(self._channel.intercepted.discard)
        return call


class _OneRequest(Multicallable):
    def __call__(
        self,
        request: Any,
        *,
        timeout: float | None = None,
        metadata: Metadata = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        begin = self._intercepted if self._interceptors else self.call
        return begin(request, timeout, metadata, credentials, wait_for_ready, compression)


class _StreamedRequests(Multicallable):
    def __call__(
        self,
        request_iterator: Requests = None,
        timeout: float | None = None,
        metadata: Metadata = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        begin = self._intercepted if self._interceptors else self.call
        return begin(request_iterator, timeout, metadata, credentials, wait_for_ready, compression)


class UnaryUnary(_OneRequest, grpc.aio.UnaryUnaryMultiCallable):  # type: ignore[type-arg]
    """Unary request, unary response."""


class UnaryStream(_OneRequest, grpc.aio.UnaryStreamMultiCallable):  # type: ignore[type-arg]
    """Unary request, streamed responses."""


class StreamUnary(_StreamedRequests, grpc.aio.StreamUnaryMultiCallable):  # type: ignore[type-arg]
    """Streamed requests, unary response."""


class StreamStream(_StreamedRequests, grpc.aio.StreamStreamMultiCallable):  # type: ignore[type-arg]
    """Streamed requests, streamed responses."""


MULTICALLABLES: dict[str, type[Multicallable]] = {
    "unary_unary": UnaryUnary,
    "unary_stream": UnaryStream,
    "stream_unary": StreamUnary,
    "stream_stream": StreamStream,
}
