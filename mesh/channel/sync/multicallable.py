"""The multicallables of the four kinds.

Blocking unary calls use grpc's own blocking path; all others run by events.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import grpc

from mesh import context
from mesh.channel.arguments import check_call
from mesh.channel.base import BaseMulticallable
from mesh.channel.driver import run_blocking
from mesh.channel.outcome import NEVER_SENT, exceeds_replay_limit, retry_metadata
from mesh.channel.sync.call import Call, FinishedCall, StreamCall, call_error
from mesh.channel.sync.driver import BlockingDriver, Driver, Owner, outcome_of_error
from mesh.model import Attempt, Metadatum, Outcome
from mesh.observe import explain

D = TypeVar("D", bound="Driver")


Metadata = Sequence[Metadatum] | None


class Multicallable(BaseMulticallable):
    """What the four kinds share."""

    def __init__(
        self, channel: Owner, kind: str, path: str, serializer: Any, deserializer: Any, registered: bool | None
    ) -> None:
        super().__init__(channel, kind, path, serializer, deserializer, registered)
        self._channel = channel

    def _driver(
        self,
        driver: type[D],
        requests: Any,
        timeout: float | None,
        metadata: Metadata,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
    ) -> D:
        """The driver of a new call, not yet started."""
        channel, method = self._channel, self._method
        if credentials is not None or compression is not None:
            check_call(credentials, compression)
        channel.start()
        now = time.monotonic()
        call = channel.assembly.call(method, now, timeout, metadata, wait_for_ready)
        flow = channel.assembly.flow(call, now)
        driven = driver(channel, method, call, flow, requests, self._serializer, credentials, compression)
        channel.adopt(driven)
        return driven

    def _drive(
        self,
        requests: Any,
        timeout: float | None,
        metadata: Metadata,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
    ) -> Call:
        """Start a call that runs by events."""
        driver = self._driver(Driver, requests, timeout, metadata, credentials, wait_for_ready, compression)
        driver.start()
        if driver.refused and driver.verdict is not None:  # as grpc, raise at once when the request can't be serialized
            explanation = driver.explain()
            raise call_error(explanation, driver.verdict)
        return (StreamCall if self._method.kind.endswith("stream") else Call)(driver)


class UnaryUnary(Multicallable, grpc.UnaryUnaryMultiCallable):  # type: ignore[type-arg]
    """Unary request, unary response."""

    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Metadata = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        if self._method.policy.hedge.max_attempts > 1:
            return self._hedge(request, timeout, metadata, credentials, wait_for_ready, compression).result()
        return self._block(False, request, timeout, metadata, credentials, wait_for_ready, compression)[0]

    def with_call(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Metadata = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> tuple[Any, grpc.Call]:
        if self._method.policy.hedge.max_attempts > 1:
            call = self._hedge(request, timeout, metadata, credentials, wait_for_ready, compression)
            return call.result(), call
        return self._block(True, request, timeout, metadata, credentials, wait_for_ready, compression)

    def future(  # type: ignore[override]
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Metadata = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Call:
        return self._drive(request, timeout, metadata, credentials, wait_for_ready, compression)

    def _hedge(
        self,
        request: Any,
        timeout: float | None,
        metadata: Metadata,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
    ) -> Call:
        """Make a call that may be hedged in this thread, and return it after success. Raises CallError."""
        driver = self._driver(BlockingDriver, request, timeout, metadata, credentials, wait_for_ready, compression)
        verdict = driver.run()
        if verdict.outcome.code:
            raise call_error(driver.explain(), verdict)
        return Call(driver)

    def _block(
        self,
        with_call: bool,
        request: Any,
        timeout: float | None,
        metadata: Metadata,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
    ) -> tuple[Any, Any]:
        """Make the call in this thread. Returns the response and, only ``with_call``, the call."""
        channel, method = self._channel, self._method
        if credentials is not None or compression is not None:
            check_call(credentials, compression)
        channel.start()
        assembly = channel.assembly
        pool = assembly.pool
        reads_reports = assembly.cluster.reads_reports
        now = time.monotonic()
        call = assembly.call(method, now, timeout, metadata, wait_for_ready)

        def perform(attempt: Attempt) -> Outcome:
            address = attempt.endpoint.address
            subchannel = pool.get(address)
            if subchannel is None:
                return NEVER_SENT
            core = subchannel.call(method, attempt.previous)
            wait = call.wait_for_ready if pool.connected_by_core else None
            sent = retry_metadata(attempt) if attempt.previous else call.metadata
            try:
                if with_call:
                    result = core.with_call(request, attempt.timeout, sent, credentials, wait, compression)
                elif reads_reports:
                    result, inner = core.with_call(request, attempt.timeout, sent, credentials, wait, compression)
                    pool.take_load_report(address, inner.trailing_metadata())
                else:
                    result = core(request, attempt.timeout, sent, credentials, wait, compression)
            except grpc.RpcError as error:
                return outcome_of_error(error, pool, address, final=exceeds_replay_limit(self._serializer, request))
            except ValueError:
                if channel.closed or not subchannel.closed:
                    raise
                return NEVER_SENT  # the endpoint was removed: its channel closed after the pick
            if with_call and reads_reports:
                pool.take_load_report(address, result[1].trailing_metadata())
            return Outcome(0, result=result)

        verdict = run_blocking(assembly.flow(call, now), perform, pool)
        outcome = verdict.outcome
        if outcome.code == 0:
            if not with_call:
                return outcome.result, None
            response, core_call = cast("tuple[Any, grpc.Call]", outcome.result)
            return response, FinishedCall(core_call, explain(call, assembly.target, verdict, time.monotonic()))
        assembly.note_failure(call, verdict, context.current())
        raise call_error(explain(call, assembly.target, verdict, time.monotonic()), verdict) from None


class UnaryStream(Multicallable, grpc.UnaryStreamMultiCallable):  # type: ignore[type-arg]
    """Unary request, streamed responses."""

    def __call__(  # type: ignore[override]
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Metadata = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Call:
        return self._drive(request, timeout, metadata, credentials, wait_for_ready, compression)


class StreamUnary(Multicallable, grpc.StreamUnaryMultiCallable):  # type: ignore[type-arg]
    """Streamed requests, unary response."""

    def __call__(
        self,
        request_iterator: Iterable[Any],
        timeout: float | None = None,
        metadata: Metadata = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        return self._drive(request_iterator, timeout, metadata, credentials, wait_for_ready, compression).result()

    def with_call(
        self,
        request_iterator: Iterable[Any],
        timeout: float | None = None,
        metadata: Metadata = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> tuple[Any, grpc.Call]:
        call = self._drive(request_iterator, timeout, metadata, credentials, wait_for_ready, compression)
        return call.result(), call

    def future(  # type: ignore[override]
        self,
        request_iterator: Iterable[Any],
        timeout: float | None = None,
        metadata: Metadata = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Call:
        return self._drive(request_iterator, timeout, metadata, credentials, wait_for_ready, compression)


class StreamStream(Multicallable, grpc.StreamStreamMultiCallable):  # type: ignore[type-arg]
    """Streamed requests, streamed responses."""

    def __call__(  # type: ignore[override]
        self,
        request_iterator: Iterable[Any],
        timeout: float | None = None,
        metadata: Metadata = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Call:
        return self._drive(request_iterator, timeout, metadata, credentials, wait_for_ready, compression)


MULTICALLABLES: dict[str, type[Multicallable]] = {
    "unary_unary": UnaryUnary,
    "unary_stream": UnaryStream,
    "stream_unary": StreamUnary,
    "stream_stream": StreamStream,
}
