"""Runs a flow on an event loop."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar, cast

import grpc

from mesh.channel import driver
from mesh.channel.driver import EventDriver, ending
from mesh.channel.outcome import NEVER_SENT, failed, retry_metadata
from mesh.channel.replay import AioReplay
from mesh.channel.subchannel import Method
from mesh.model import Attempt, CallSpec, Outcome, Verdict
from mesh.policy.call.flow import Flow

T = TypeVar("T")

Requests = AsyncIterable[Any] | Iterable[Any] | None

_LOG = logging.getLogger("mesh.channel")

# As gRPC words it.
_WRITE_FAILED = 'Failed "execute_batch"'
_STATUS_WITHIN = 0.05  # seconds to wait for the server's own status after a write that failed


class Owner(driver.Owner, Protocol):
    """What a call needs from its channel."""

    calls: set[Driver]
    intercepted: weakref.WeakSet[Any]
    interceptors: dict[str, list[Any]]
    loop: asyncio.AbstractEventLoop | None

    def start(self) -> None:
        """Start the channel on the running loop, once."""


class Driver(EventDriver):
    """Runs a call over core's asyncio calls."""

    channel: Owner
    replay: AioReplay | None

    def __init__(
        self,
        channel: Owner,
        method: Method,
        call: CallSpec,
        flow: Flow,
        requests: Any,
        serializer: Any,
        credentials: grpc.CallCredentials | None,
        compression: grpc.Compression | None,
    ) -> None:
        super().__init__(channel, method, call, flow, requests, serializer, credentials, compression)
        self.channel = channel
        self.replay = AioReplay(requests, serializer, self._overflowed) if method.kind.startswith("stream") else None
        self._streams = method.kind.endswith("stream")
        self._starting = True
        self._timer: asyncio.TimerHandle | None = None
        self._watching: set[asyncio.Task[None]] = set()
        self._callbacks: list[Callable[[], object]] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._end: asyncio.Future[None] | None = None
        if self._scope is not None:
            self._scope.adopt(self, self._cancel_from_anywhere)

    def start(self) -> None:
        super().start()
        self._starting = False

    def _defers_conclusion(self, verdict: Verdict) -> bool:
        """As in grpc.aio, a call doesn't end before its caller has it, but in the loop's next iteration."""
        if self._starting:
            self._flow = ending(verdict)
            asyncio.get_running_loop().call_soon(self.timer_fired)
        return self._starting

    def start_attempt(self, attempt: Attempt) -> None:
        self.hedged = self.call.policy.hedge.max_attempts > 1
        number, address = attempt.number, attempt.endpoint.address
        subchannel = self.pool.get(address)
        if subchannel is None:
            self.ended(number, NEVER_SENT)
            return
        inner = subchannel.call(self._method, attempt.previous)(
            self._request if self.replay is None else self.replay.requests(),
            timeout=attempt.timeout,
            metadata=retry_metadata(attempt),
            credentials=self._credentials,
            wait_for_ready=self.call.wait_for_ready if self.pool.connected_by_core else None,
            compression=self._compression,
        )
        self.running[number] = inner
        inner.add_done_callback(_EndCallback(self, number, address))
        if self._streams:
            self._spawn(self._await_headers(number, inner))
        if (self.hedged or self.replay is not None) and self._unrepeatable():
            self.replay_overflowed(number)

    def set_timer(self, until: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if until is not None:
            self._timer = asyncio.get_running_loop().call_later(until - time.monotonic(), self.timer_fired)

    def changed(self) -> None:
        if self.committed is not None and self.replay is not None:
            self.replay.release()
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)
        verdict = self.verdict
        if verdict is None or self not in self.channel.calls:
            return
        self.channel.calls.discard(self)
        if self._end is not None and not self._end.done():
            self._end.set_result(None)
        if self.replay is not None:
            self.replay.close()
        if self._scope is not None:
            self._leave_scope(self._scope, verdict)
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                _LOG.exception("Exception in callback %r", callback)

    def add_callback(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` when the call has ended; at once if it already has."""
        if self.verdict is None:
            self._callbacks.append(callback)
        else:
            callback()

    async def next_change(self) -> None:
        """Wait until an attempt starts or is committed, or the call has ended."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future in self._waiting:
                self._waiting.remove(future)
            raise

    def end_future(self) -> asyncio.Future[None]:
        """A future that is done when the call has ended; shared by all who wait for it."""
        if self._end is None:
            self._end = asyncio.get_running_loop().create_future()
            if self.verdict is not None:
                self._end.set_result(None)
        return self._end

    async def outcome(self) -> Outcome:
        """Wait until the call has ended."""
        while self.verdict is None:
            await self.next_change()
        return self.verdict.outcome

    async def committed_call(self) -> Any:
        """Wait until an attempt is committed, and return its core call; None when the mesh itself ended the call."""
        while self.committed is None:
            if self.verdict is not None:
                return self.verdict.outcome.result
            await self.next_change()
        return self.committed

    def sole_attempt(self) -> Any:
        """The core call of the only attempt, which a waiter may await itself; None where there may be several."""
        if self.hedged or not self.running:
            return None
        (inner,) = self.running.values()
        return inner

    async def _await_headers(self, number: int, inner: Any) -> None:
        if await inner.initial_metadata() or not inner.done():
            self.headers_received(number)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    def core_call_ended(self, number: int, address: str, inner: Any) -> None:
        """Core's call of attempt ``number`` has ended."""
        code = _code(inner)
        if code is grpc.StatusCode.OK:
            if self.pool.cluster.reads_reports:
                self.pool.take_load_report(address, _result_now(inner.trailing_metadata()))
            self.ended(number, Outcome(0, result=inner))
            return
        outcome = failed(
            self.pool,
            address,
            code.value[0],
            _result_now(inner.details()),
            _result_now(inner.initial_metadata()),
            _result_now(inner.trailing_metadata()),
            inner,
            final=self._unrepeatable(),
            # Cancelled locally, and not by the driver, which removes those from ``running``: its awaiter was cancelled.
            cancelled=number in self.running and code is grpc.StatusCode.CANCELLED and _ended_locally(inner),
        )
        self.ended(number, outcome)

    def _cancel_from_anywhere(self) -> None:
        """Cancel the call, from the loop's thread or another one."""
        loop = self.channel.loop
        assert loop is not None  # the call was made on it
        try:
            here = asyncio.get_running_loop() is loop
        except RuntimeError:
            here = False
        if here:
            self.cancel()
        elif not loop.is_closed():
            loop.call_soon_threadsafe(self.cancel)


class _EndCallback:
    """Tells a driver that a core call has ended. The core call keeps this callback and the driver keeps the core call,
    so it releases the driver: otherwise every call would be left to the garbage collector."""

    __slots__ = ("_address", "_driver", "_number", "_waited")

    def __init__(self, driver: Driver, number: int, address: str) -> None:
        self._waited = False
        self._driver: Driver | None = driver
        self._number = number
        self._address = address

    def __call__(self, inner: Any) -> None:
        driver = self._driver
        if driver is None:
            return
        # When a message can't be sent any more, grpc reports INTERNAL, and usually calls again with the server's
        # status.
        if not self._waited and driver.replay is not None and _write_failed(inner):
            self._waited = True
            asyncio.get_running_loop().call_later(_STATUS_WITHIN, self, inner)
            return
        self._driver = None
        driver.core_call_ended(self._number, self._address, inner)


def _ended_locally(inner: Any) -> bool:
    """Whether grpc.aio itself ended the call, as on cancellation. Core adds a debug string to each status of its own
    and of a peer, and a peer can't remove it."""
    return not _result_now(inner.debug_error_string())


def _write_failed(inner: Any) -> bool:
    """Whether grpc.aio ended the call because it could not send a message, as its debug string says. Core's debug
    strings start with a status code, whatever a peer writes."""
    return (_result_now(inner.debug_error_string()) or "").startswith(_WRITE_FAILED)


def _code(inner: Any) -> grpc.StatusCode:
    """The status of a call that has ended; UNKNOWN for a number that is no status, on which an old grpc.aio raises."""
    try:
        code: grpc.StatusCode = _result_now(inner.code())
    except KeyError:
        return grpc.StatusCode.UNKNOWN
    return code


def _result_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine of a call that has ended: it doesn't wait for anything."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return cast("T", stop.value)
    finally:
        coroutine.close()
    raise AssertionError("a call that has ended has its status")
