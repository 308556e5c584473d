"""The objects that stand for a call, of the four kinds."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import grpc

from mesh.channel.aio.driver import Driver
from mesh.channel.base import BaseCall
from mesh.channel.replay import AioReplay
from mesh.codes import Code
from mesh.errors import AioRpcError
from mesh.wire import STATUS_CODES

# As gRPC words them.
_FINISHED_DETAILS = "RPC already finished."


_HALF_CLOSED_DETAILS = 'RPC is half closed after calling "done_writing".'


_STYLE_DETAILS = "The iterator and read/write APIs may not be mixed on a single RPC."


def call_from_finalizer(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Call ``callback`` on the loop soon. Takes no lock: garbage is collected in any thread, which may hold any
    lock."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:  # the loop is closed, and with it the call
        pass


class Call(BaseCall, grpc.aio.Call):
    """What all four kinds share: the methods of grpc's call objects, and ``explain()``."""

    _driver: Driver

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def cancelled(self) -> bool:
        verdict = self._driver.verdict
        return verdict is not None and verdict.outcome.code == Code.CANCELLED  # the server's as well, as in grpc.aio

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._driver.add_callback(functools.partial(callback, self))

    async def initial_metadata(self) -> grpc.aio.Metadata:
        inner = await self._driver.committed_call()
        return grpc.aio.Metadata() if inner is None else await inner.initial_metadata()

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        inner: Any = (await self._driver.outcome()).result
        return grpc.aio.Metadata() if inner is None else await inner.trailing_metadata()

    async def code(self) -> grpc.StatusCode:
        return STATUS_CODES[(await self._driver.outcome()).code]

    async def details(self) -> str:
        return (await self._driver.outcome()).details

    async def debug_error_string(self) -> str:
        outcome = await self._driver.outcome()
        inner: Any = outcome.result
        return outcome.details if inner is None else await inner.debug_error_string()

    async def wait_for_connection(self) -> None:
        """Wait until an attempt is connected to its endpoint; raises if the call fails first."""
        while self._driver.verdict is None:
            inner = next(iter(self._driver.running.values()), None)
            if inner is None:
                await self._driver.next_change()
                continue
            try:
                await inner.wait_for_connection()
            except grpc.RpcError:  # this attempt's; the flow may not know yet
                if inner in self._driver.running.values():
                    await self._driver.next_change()
                continue
            return
        await self._raise_for_status()

    async def _raise_for_status(self) -> None:
        outcome = await self._driver.outcome()
        if outcome.cancelled:
            raise asyncio.CancelledError
        if outcome.code:
            raise await self._error()

    async def _error(self) -> AioRpcError:
        return AioRpcError(
            await self.code(),
            await self.initial_metadata(),
            await self.trailing_metadata(),
            await self.details(),
            await self.debug_error_string(),
            self.explain(),
        )

    def __del__(self) -> None:
        driver = getattr(self, "_driver", None)
        if driver is not None and driver.verdict is None:
            loop = driver.channel.loop
            assert loop is not None  # the call was made on it
            call_from_finalizer(loop, functools.partial(driver.cancel, "Cancelled upon garbage collection!"))

    def __repr__(self) -> str:
        verdict = self._driver.verdict
        state = "running" if verdict is None else STATUS_CODES[verdict.outcome.code]
        return f"<{type(self).__name__} {self._driver.call.method} {state}>"

    __str__ = __repr__


class _UnaryResponse(Call):
    """One response, to be awaited."""

    def __await__(self) -> Generator[Any, None, Any]:
        driver = self._driver
        try:
            while driver.verdict is None:
                inner = driver.sole_attempt()
                if inner is None:
                    yield from driver.next_change().__await__()
                    continue
                try:
                    return (yield from inner.__await__())
                except grpc.RpcError:  # this attempt's: the flow decides what follows once it knows
                    if inner in driver.running.values():
                        yield from driver.next_change().__await__()
        except asyncio.CancelledError:
            self.cancel()
            raise
        outcome = driver.verdict.outcome
        if outcome.cancelled:
            raise asyncio.CancelledError
        if outcome.code:
            raise (yield from self._error().__await__()) from None
        return (yield from outcome.result.__await__())  # type: ignore[attr-defined]


class _StreamResponse(Call):
    """Streamed responses: iterated, or ``read`` one by one."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._iterator: AsyncIterator[Any] | None = None
        self._reads = False

    def __aiter__(self) -> AsyncIterator[Any]:
        if self._reads:
            raise grpc.aio.UsageError(_STYLE_DETAILS)
        if self._iterator is None:
            self._iterator = self._responses()
        return self._iterator

    async def _responses(self) -> AsyncIterator[Any]:
        while (response := await self._read()) is not grpc.aio.EOF:
            yield response

    async def read(self) -> Any:
        """The next response; EOF when there are no more."""
        if self.done():
            await self._raise_for_status()
            return grpc.aio.EOF
        if self._iterator is not None:
            raise grpc.aio.UsageError(_STYLE_DETAILS)
        self._reads = True
        return await self._read()

    async def _read(self) -> Any:
        driver = self._driver
        try:
            inner = driver.committed
            if inner is None:
                inner = await driver.committed_call()
            if inner is not None:
                response = await inner.read()
                if response is not grpc.aio.EOF:
                    return response
        except grpc.RpcError:
            pass
        except asyncio.CancelledError:
            self.cancel()
            raise
        await self._raise_for_status()
        return grpc.aio.EOF


class _StreamRequest(Call):
    """Streamed requests, which may be written one by one if no iterator was given."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._done_writing_flag = False  # read by grpc's intercepted calls

    async def write(self, request: Any) -> None:
        """Send ``request``; returns when the next one may be sent."""
        replay = self._writable()
        if self.done():
            raise asyncio.InvalidStateError(_FINISHED_DETAILS)
        if self._done_writing_flag:
            raise asyncio.InvalidStateError(_HALF_CLOSED_DETAILS)
        sent = replay.write(request)
        try:
            await asyncio.wait((sent, self._driver.end_future()), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if not replay.taken(sent):
            await self._raise_for_status()

    async def done_writing(self) -> None:
        """End the requests. May be called twice."""
        replay = self._writable()
        if not self.done() and not self._done_writing_flag:
            self._done_writing_flag = True
            replay.done_writing()

    def _writable(self) -> AioReplay:
        replay = self._driver.replay
        assert replay is not None  # the request is a stream
        if not replay.writable:
            raise grpc.aio.UsageError(_STYLE_DETAILS)
        return replay


class UnaryUnaryCall(_UnaryResponse, grpc.aio.UnaryUnaryCall):  # type: ignore[type-arg]
    """A call with one request and one response."""


class UnaryStreamCall(_StreamResponse, grpc.aio.UnaryStreamCall):  # type: ignore[type-arg]
    """A call with one request and streamed responses."""


class StreamUnaryCall(_StreamRequest, _UnaryResponse, grpc.aio.StreamUnaryCall):  # type: ignore[type-arg]
    """A call with streamed requests and one response."""


class StreamStreamCall(_StreamRequest, _StreamResponse, grpc.aio.StreamStreamCall):  # type: ignore[type-arg]
    """A call with streamed requests and streamed responses."""

    def __init__(self, driver: Driver) -> None:
        _StreamResponse.__init__(self, driver)
        self._done_writing_flag = False


CALLS: dict[str, type[Any]] = {
    "unary_unary": UnaryUnaryCall,
    "unary_stream": UnaryStreamCall,
    "stream_unary": StreamUnaryCall,
    "stream_stream": StreamStreamCall,
}
