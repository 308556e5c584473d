"""Drives a flow on an event loop."""

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

# grpc's words.
_WRITE_FAILED = 'Failed "execute_batch"'
_STATUS_WITHIN = 0.05  # seconds after a write that failed, in which the server's own status is waited for


class Owner(driver.Owner, Protocol):
    """What a call needs of its channel."""

    calls: set[Driver]
    intercepted: weakref.WeakSet[Any]
    interceptors: dict[str, list[Any]]
    loop: asyncio.AbstractEventLoop | None

    def start(self) -> None:
        """Bring the channel to life on the running loop; once."""


class Driver(EventDriver):
    """Drives a call over core's asyncio calls."""

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

    def _conclude_later(self, verdict: Verdict) -> bool:
        """A call doesn't end before its creator has it, as in grpc.aio: the loop's next turn ends it."""
        if self._starting:
            self._flow = ending(verdict)
            asyncio.get_running_loop().call_soon(self.timer_fired)
        return self._starting

    def begin(self, attempt: Attempt) -> None:
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
        inner.add_done_callback(_End(self, number, address))
        if self._streams:
            self._background(self._await_headers(number, inner))
        if (self.hedged or self.replay is not None) and self._unrepeatable():
            self.overflow(number)

    def wake_at(self, until: float | None) -> None:
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
        self._leave_scope(verdict)
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                _LOG.exception("Exception in callback %r", callback)

    def add_callback(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called when the call is over; at once when it is."""
        if self.verdict is None:
            self._callbacks.append(callback)
        else:
            callback()

    async def change(self) -> None:
        """Wait until an attempt begins or is committed, or the call is over."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future in self._waiting:
                self._waiting.remove(future)
            raise

    def end(self) -> asyncio.Future[None]:
        """Done when the call is over; one for all who wait for it beside something else."""
        if self._end is None:
            self._end = asyncio.get_running_loop().create_future()
            if self.verdict is not None:
                self._end.set_result(None)
        return self._end

    async def finished(self) -> Outcome:
        """Wait until the call is over."""
        while self.verdict is None:
            await self.change()
        return self.verdict.outcome

    async def settled(self) -> Any:
        """Wait until an attempt is the call, and return it; None when the mesh itself ended the call."""
        while self.committed is None:
            if self.verdict is not None:
                return self.verdict.outcome.result
            await self.change()
        return self.committed

    def only(self) -> Any:
        """The one attempt that runs, where there can be only one: who waits for the call may wait for it."""
        if self.hedged or not self.running:
            return None
        (inner,) = self.running.values()
        return inner

    async def _await_headers(self, number: int, inner: Any) -> None:
        if await inner.initial_metadata() or not inner.done():
            self.headers(number)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    def over(self, number: int, address: str, inner: Any) -> None:
        """Core's call of attempt ``number`` has ended."""
        code = _code(inner)
        if code is grpc.StatusCode.OK:
            if self.pool.cluster.reads_reports:
                self.pool.answered(address, _ready(inner.trailing_metadata()))
            self.ended(number, Outcome(0, result=inner))
            return
        outcome = failed(
            self.pool,
            address,
            code.value[0],
            _ready(inner.details()),
            _ready(inner.initial_metadata()),
            _ready(inner.trailing_metadata()),
            inner,
            final=self._unrepeatable(),
            # Cancelled here, and not by the driver, which has forgotten those: whoever awaited it was.
            cancelled=number in self.running and code is grpc.StatusCode.CANCELLED and _ended_here(inner),
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


class _End:
    """Tells a driver that core's call has ended. Core's call keeps it, the driver core's call: so it lets go of the
    driver, or every call would be left to the garbage collector."""

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
        # When a message can no longer be sent, grpc says INTERNAL, and mostly calls again with the server's own status.
        if not self._waited and driver.replay is not None and _write_failed(inner):
            self._waited = True
            asyncio.get_running_loop().call_later(_STATUS_WITHIN, self, inner)
            return
        self._driver = None
        driver.over(self._number, self._address, inner)


def _ended_here(inner: Any) -> bool:
    """Whether grpc.aio itself ended the call, as for a cancel. Core writes a debug string for each status of its own or
    of a peer, and a peer has no way to leave it out."""
    return not _ready(inner.debug_error_string())


def _write_failed(inner: Any) -> bool:
    """Whether grpc.aio ended the call because it could not send a message. Its debug string says so: those of core
    begin with a status code, whatever a peer writes."""
    return (_ready(inner.debug_error_string()) or "").startswith(_WRITE_FAILED)


def _code(inner: Any) -> grpc.StatusCode:
    """A finished call's status; UNKNOWN for a number that is none, on which an old grpc.aio raises."""
    try:
        code: grpc.StatusCode = _ready(inner.code())
    except KeyError:
        return grpc.StatusCode.UNKNOWN
    return code


def _ready(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a finished call's coroutine returns: it has nothing left to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return cast("T", stop.value)
    finally:
        coroutine.close()
    raise AssertionError("a finished call has its status")
