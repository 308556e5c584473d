"""``grpc.aio.Channel`` over a cluster: the channel, the multicallables of the four kinds, and their call objects.

Every call is driven by events, on the loop of the channel's first use. The first attempt starts when the call is
made, as grpc's does; awaiting it awaits core's own call, so a call that succeeds costs no task beside core's.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import math
import time
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Generator, Iterable, Sequence
from typing import Any, TypeVar, cast

import grpc
import grpc.aio
from grpc.aio import _interceptor as interceptor_calls

from mesh import context
from mesh.channel import forking
from mesh.channel.arguments import check_call, check_channel_credentials
from mesh.channel.assemble import Assembly
from mesh.channel.drive import (
    CODES,
    FORKED_DETAILS,
    NEVER_SENT,
    STATES,
    EventDriver,
    ending,
    failed,
    retry_metadata,
    too_large,
)
from mesh.channel.instrumentation import Make, aio_interceptors, replacement
from mesh.channel.replay import AioReplay, Request
from mesh.channel.subchannels import AioSubchannel, Method, OwnPool, Pool
from mesh.errors import AioRpcError
from mesh.model import Attempt, CallSpec, Code, Connectivity, Metadatum, Outcome, Verdict
from mesh.observe import Explanation, explain
from mesh.policy.flow import Flow
from mesh.tasks import log_failure

_LOG = logging.getLogger("mesh.channel")

T = TypeVar("T")

Metadata = grpc.aio.Metadata | Sequence[Metadatum] | None
Requests = AsyncIterable[Any] | Iterable[Any] | None

# grpc's words, which its users may know.
_FINISHED_DETAILS = "RPC already finished."
_HALF_CLOSED_DETAILS = 'RPC is half closed after calling "done_writing".'
_WRITE_FAILED = 'Failed "execute_batch"'
_STATUS_WITHIN = 0.05  # seconds after a write that failed, in which the server's own status is waited for
_STYLE_DETAILS = "The iterator and read/write APIs may not be mixed on a single RPC."


class Channel(grpc.aio.Channel):
    """A ``grpc.aio.Channel`` whose calls go through the mesh. Touches no core, thread or loop before its first use."""

    blocking = False

    def __init__(
        self,
        target: str,
        options: Sequence[tuple[str, Any]] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        compression: grpc.Compression | None = None,
        interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None,
    ) -> None:
        self.assembly = Assembly(target, options, credentials, compression, AioSubchannel)
        self.interceptors = _by_kind(tuple(interceptors or ()))
        for kind, of_kind in self.interceptors.items():
            setattr(self, f"_{kind}_interceptors", of_kind)  # as grpc's channel: programs append to them
        self._instrument: Callable[[], None] | None = None
        make = replacement(grpc.aio, secure=credentials is not None)
        if make is not None:
            self._instrument = functools.partial(self._take_interceptors, make, target, credentials)
            for of_kind in self.interceptors.values():
                of_kind.insert(0, _TO_COME)
        self.closed = False
        self.calls: set[_Driver] = set()
        self.intercepted: weakref.WeakSet[Any] = weakref.WeakSet()  # grpc's call objects around interceptors
        self.loop: asyncio.AbstractEventLoop | None = None
        self._running: asyncio.Task[None] | None = None
        self._stop: weakref.finalize[Any, Any] | None = None
        self._left: object = None  # in a forked child, what is the parent's

    def forked(self) -> object:
        """In a forked child: the channel is the parent's alone; returns what must not be freed here."""
        left = self.assembly, self._running, self._stop, tuple(self.calls), tuple(self.intercepted)
        if self._stop is not None:
            self._stop.detach()
        for driver in self.calls:
            driver.forked()
        self.calls, self.intercepted = set(), weakref.WeakSet()
        self._left, self._running = left, None
        return left

    def start(self) -> None:
        """Bring the channel to life on the running loop; once.

        Raises UsageError when it is closed, RuntimeError on another loop than its first.
        """
        if self.closed:
            raise grpc.aio.UsageError("Channel is closed.")
        if self._running is not None:
            self._check_loop()
        else:
            if self._left is not None:
                raise forking.inherited()
            forking.check(aio=True)
            forking.register(self)
            self.assembly.rng.seed()  # channels that forked apart must not move in step
            if self._instrument is not None:
                self._instrument()
            self.loop = asyncio.get_running_loop()
            # In a context of its own: it outlives the inbound call that happens to be handled here.
            self._running = self.loop.create_task(self.assembly.run(), context=contextvars.Context())
            self._running.add_done_callback(log_failure)
            # The multicallables hold the channel, so it lives as long as any stub.
            self._stop = weakref.finalize(self, _stop, self.loop, self.assembly.pool)
            self._stop.atexit = False

    def _take_interceptors(self, make: Make, target: str, credentials: grpc.ChannelCredentials | None) -> None:
        added = aio_interceptors(make, target, credentials, self.interceptors)
        for kind, of_kind in self.interceptors.items():
            place = of_kind.index(_TO_COME)
            of_kind[place : place + 1] = added.get(kind, ())
        self._instrument = None

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The channel's event loop, by the name that it has in grpc.aio. Before the first use: the current one."""
        return self.loop or asyncio.get_event_loop()

    def _check_loop(self) -> None:
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:  # a call may be made here and awaited there
            return
        loop = self.loop
        if running is not loop:
            raise RuntimeError(
                f"{self!r} belongs to another event loop, {loop!r} at {id(loop):#x}. Make a channel for each loop."
            )

    async def close(self, grace: float | None = None) -> None:
        """Take no more calls, give those in flight ``grace`` seconds to end, cancel the rest, close connections."""
        if grace is not None and grace < 0:
            raise ValueError(f"grace must be non-negative, got {grace}.")
        if self.closed:
            return
        if self.loop is not None and self.loop.is_closed():  # and with it all that was in flight
            self.closed = True
            return
        if self._running is not None:
            self._check_loop()
        self.closed = True
        if self._left is not None:
            return
        intercepted = tuple(self.intercepted)
        if grace and (intercepted or self.calls):
            ends = [*(driver.finished() for driver in self.calls), *(call.code() for call in intercepted)]
            await asyncio.wait([asyncio.ensure_future(end) for end in ends], timeout=grace)
        for call in (*intercepted, *self.calls):
            call.cancel()
        if self._stop is not None:
            self._stop.detach()  # what it would call later keeps the pool
        self.assembly.pool.close()
        if self._running is not None and not self._running.done():
            await asyncio.wait([self._running])

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- connectivity

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        if self.closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        state = STATES[self.assembly.pool.state() if self._running is not None else Connectivity.IDLE]
        if try_to_connect:
            self.start()
            self.assembly.pool.wanted()
        return state  # as it was before, like grpc's

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        if self.closed:
            raise grpc.aio.UsageError("Channel is closed.")
        if self._running is not None:
            self._check_loop()
        pool = self.assembly.pool
        if isinstance(pool, OwnPool):  # core knows the state of its own targets best
            self.start()
            await pool.subchannel.core().wait_for_state_change(last_observed_state)
            return
        while self.get_state() is last_observed_state:
            replaced = asyncio.Event()
            pool.when_replaced(pool.cluster.picker, replaced.set)
            try:
                if self.get_state() is last_observed_state:
                    await replaced.wait()
            finally:
                pool.forget(replaced.set)

    async def channel_ready(self) -> None:
        while (state := self.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            await self.wait_for_state_change(state)

    # -- multicallables

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return UnaryUnary(self, "unary_unary", method, request_serializer, response_deserializer, _registered_method)

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return UnaryStream(self, "unary_stream", method, request_serializer, response_deserializer, _registered_method)

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return StreamUnary(self, "stream_unary", method, request_serializer, response_deserializer, _registered_method)

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return StreamStream(
            self, "stream_stream", method, request_serializer, response_deserializer, _registered_method
        )

    def __repr__(self) -> str:
        state = "SHUTDOWN" if self.closed else "IDLE" if self._running is None else self.assembly.pool.state().name
        return f"<mesh.aio.Channel {self.assembly.target} {state}>"


def _stop(loop: asyncio.AbstractEventLoop, pool: Pool) -> None:
    _from_finalizer(loop, pool.close)


def _from_finalizer(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Call ``callback`` on the loop soon. Takes no lock: garbage is collected in any thread, which may hold any."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:  # the loop is closed, and everything on it is over
        pass


# -- interceptors

_TO_COME: Any = object()
"""Among a channel's interceptors until its first use: in the place of those that instrumentation adds, because gRPC
makes no asyncio channel without a loop."""

_KINDS: dict[str, type[grpc.aio.ClientInterceptor]] = {
    "unary_unary": grpc.aio.UnaryUnaryClientInterceptor,
    "unary_stream": grpc.aio.UnaryStreamClientInterceptor,
    "stream_unary": grpc.aio.StreamUnaryClientInterceptor,
    "stream_stream": grpc.aio.StreamStreamClientInterceptor,
}


def _by_kind(interceptors: Sequence[grpc.aio.ClientInterceptor]) -> dict[str, list[Any]]:
    """The interceptors of each kind. One that is of several kinds is in each (grpc's own channel takes only the first
    of them, grpc/grpc#43512)."""
    for interceptor in interceptors:
        if not isinstance(interceptor, tuple(_KINDS.values())):
            names = " or ".join(kind.__name__ for kind in _KINDS.values())
            raise ValueError(f"Interceptor {interceptor} must be {names}")
    return {kind: [item for item in interceptors if isinstance(item, of)] for kind, of in _KINDS.items()}


class _Innermost:
    """Stands behind the last interceptor of a call, and makes it through the mesh instead of what grpc would make
    there."""

    def __init__(self, multicallable: _Multicallable, compression: grpc.Compression | None) -> None:
        self._multicallable = multicallable
        self._compression = compression
        self.call: Call | None = None
        """The call that was made; the last one, where an interceptor repeats it."""

    async def _call(self, _continuation: object, details: grpc.aio.ClientCallDetails, requests: Any) -> Any:
        method: Any = details.method
        self.call = self._multicallable.redirected(method.decode() if isinstance(method, bytes) else method).call(
            requests, details.timeout, details.metadata, details.credentials, details.wait_for_ready, self._compression
        )
        return self.call

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = intercept_stream_stream = _call


class _Explained:
    innermost: _Innermost

    def explain(self) -> Explanation:
        """Every attempt that was made for the call so far. Raises InvalidStateError until the interceptors, which run
        in a task, have made it."""
        if self.innermost.call is None:
            raise asyncio.InvalidStateError("the interceptors have not made the call")
        return self.innermost.call.explain()


_INTERCEPTED: dict[str, Any] = {
    kind: type(call.__name__, (_Explained, call), {})
    for kind, call in (
        ("unary_unary", interceptor_calls.InterceptedUnaryUnaryCall),
        ("unary_stream", interceptor_calls.InterceptedUnaryStreamCall),
        ("stream_unary", interceptor_calls.InterceptedStreamUnaryCall),
        ("stream_stream", interceptor_calls.InterceptedStreamStreamCall),
    )
}


# -- the multicallables


class _Multicallable:
    """What the four kinds share."""

    def __init__(
        self, channel: Channel, kind: str, path: str, serializer: Any, deserializer: Any, registered: bool | None
    ) -> None:
        self._channel = channel
        self._arguments = kind, serializer, deserializer, registered
        self._serializer = serializer
        self._interceptors = channel.interceptors[kind]
        # Requests of a stream are serialised by the replay buffer, for all attempts once.
        sent = Request.serialized if kind.startswith("stream") else serializer
        self._method = channel.assembly.method(kind, path, sent, deserializer, bool(registered))

    def redirected(self, path: str) -> _Multicallable:
        """This, or its like for the method that an interceptor chose instead."""
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
        driver = _Driver(channel, method, call, flow, requests, self._serializer, credentials, compression)
        channel.calls.add(driver)
        driver.start()
        return _CALLS[method.kind](driver)

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
        if not self._interceptors:  # instrumentation adds none of this kind
            return self.call(requests, timeout, metadata, credentials, wait_for_ready, compression)
        kind, serializer, deserializer, _ = self._arguments
        if not isinstance(metadata, grpc.aio.Metadata):
            metadata = grpc.aio.Metadata.from_tuple(tuple(metadata or ()))
        innermost = _Innermost(self, compression)
        call = _INTERCEPTED[kind](
            [*self._interceptors, innermost],
            requests,
            timeout,
            metadata,
            credentials,
            wait_for_ready,
            None,  # the core channel, which only what stands behind _Innermost would use
            self._method.path.encode(),
            serializer,
            deserializer,
            self._channel.loop,
        )
        call.innermost = innermost
        self._channel.intercepted.add(call)
        call.add_done_callback(self._channel.intercepted.discard)
        return call


class UnaryUnary(_Multicallable, grpc.aio.UnaryUnaryMultiCallable):  # type: ignore[type-arg]
    """Unary request, unary response."""

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


class UnaryStream(_Multicallable, grpc.aio.UnaryStreamMultiCallable):  # type: ignore[type-arg]
    """Unary request, streamed responses."""

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


class StreamUnary(_Multicallable, grpc.aio.StreamUnaryMultiCallable):  # type: ignore[type-arg]
    """Streamed requests, unary response."""

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


class StreamStream(_Multicallable, grpc.aio.StreamStreamMultiCallable):  # type: ignore[type-arg]
    """Streamed requests, streamed responses."""

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


# -- driving by events


class _Driver(EventDriver):
    """Drives a call over core's asyncio calls. It holds all of the call's state; the call object is what the user
    holds."""

    _left: object = None  # in a forked child, what is the parent's

    def __init__(
        self,
        channel: Channel,
        method: Method,
        call: CallSpec,
        flow: Flow,
        requests: Any,
        serializer: Any,
        credentials: grpc.CallCredentials | None,
        compression: grpc.Compression | None,
    ) -> None:
        super().__init__(call, flow, channel.assembly.pool)
        self.channel = channel
        self.hedged = False  # known with the first attempt
        self.replay = AioReplay(requests, serializer, self._overflowed) if method.kind.startswith("stream") else None
        self._method = method
        self._credentials = credentials
        self._compression = compression
        self._serializer = serializer
        self._request = requests if self.replay is None else None
        self._streams = method.kind.endswith("stream")
        self._starting = True
        self._timer: asyncio.TimerHandle | None = None
        self._watching: set[asyncio.Task[None]] = set()
        self._callbacks: list[Callable[[], object]] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._end: asyncio.Future[None] | None = None
        self._scope = context.current()
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

    def forked(self) -> None:
        """In a forked child: the call goes on in the parent alone, and is over here. Nothing of core is called."""
        self._conclude(Verdict(Outcome(Code.CANCELLED, FORKED_DETAILS, cancelled=True)))
        self._left = dict(self.running), self.committed
        self.running, self.committed = {}, None

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
            wait_for_ready=self.call.wait_for_ready if self.pool.core_waits else None,
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
        if self._scope is not None:
            self._scope.release(self)
            self.channel.assembly.failed(self.call, verdict, self._scope)
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

    def _unrepeatable(self) -> bool:
        """Whether what was sent is more than is kept for another attempt."""
        return self.replay.overflowed if self.replay is not None else too_large(self._serializer, self._request)

    def _overflowed(self) -> None:
        for number in tuple(self.running):
            self.overflow(number)

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

    def __init__(self, driver: _Driver, number: int, address: str) -> None:
        self._waited = False
        self._driver: _Driver | None = driver
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


# -- the call objects


class Call(grpc.aio.Call):
    """What the call objects of all kinds share: all that grpc's have, and ``explain()``."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver

    def explain(self) -> Explanation:
        """Every attempt that was made for the call so far: where, when, and how it ended."""
        driver = self._driver
        return explain(driver.call, driver.channel.assembly.target, driver.verdict, driver.finished_at)

    def cancelled(self) -> bool:
        verdict = self._driver.verdict
        return verdict is not None and verdict.outcome.code == Code.CANCELLED  # also the server's, as in grpc.aio

    def done(self) -> bool:
        return self._driver.verdict is not None

    def cancel(self) -> bool:
        return self._driver.cancel()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._driver.add_callback(functools.partial(callback, self))

    def time_remaining(self) -> float | None:
        deadline = self._driver.call.deadline
        return None if deadline == math.inf else max(0.0, deadline - time.monotonic())

    async def initial_metadata(self) -> grpc.aio.Metadata:
        inner = await self._driver.settled()
        return grpc.aio.Metadata() if inner is None else await inner.initial_metadata()

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        inner: Any = (await self._driver.finished()).result
        return grpc.aio.Metadata() if inner is None else await inner.trailing_metadata()

    async def code(self) -> grpc.StatusCode:
        return CODES[(await self._driver.finished()).code]

    async def details(self) -> str:
        return (await self._driver.finished()).details

    async def debug_error_string(self) -> str:
        outcome = await self._driver.finished()
        inner: Any = outcome.result
        return outcome.details if inner is None else await inner.debug_error_string()

    async def wait_for_connection(self) -> None:
        """Wait until an attempt is connected to its endpoint; raises when the call fails before."""
        while self._driver.verdict is None:
            inner = next(iter(self._driver.running.values()), None)
            if inner is None:
                await self._driver.change()
                continue
            try:
                await inner.wait_for_connection()
            except grpc.RpcError:  # of this attempt; the flow may not know yet
                if inner in self._driver.running.values():
                    await self._driver.change()
                continue
            return
        await self._raise_for_status()

    async def _raise_for_status(self) -> None:
        outcome = await self._driver.finished()
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
            _from_finalizer(loop, functools.partial(driver.cancel, "Cancelled upon garbage collection!"))

    def __repr__(self) -> str:
        verdict = self._driver.verdict
        state = "running" if verdict is None else CODES[verdict.outcome.code]
        return f"<{type(self).__name__} {self._driver.call.method} {state}>"

    __str__ = __repr__


class _UnaryResponse(Call):
    """One response, to be awaited."""

    def __await__(self) -> Generator[Any, None, Any]:
        driver = self._driver
        try:
            while driver.verdict is None:
                inner = driver.only()
                if inner is None:
                    yield from driver.change().__await__()
                    continue
                try:
                    return (yield from inner.__await__())
                except grpc.RpcError:  # of this attempt: the flow decides what follows, once it hears of it
                    if inner in driver.running.values():
                        yield from driver.change().__await__()
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

    def __init__(self, driver: _Driver) -> None:
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
                inner = await driver.settled()
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
    """Streamed requests, which may be written one by one when no iterator was given."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__(driver)
        self._done_writing_flag = False  # grpc's intercepted calls look at it

    async def write(self, request: Any) -> None:
        """Send ``request``; returns when the next one may follow."""
        replay = self._writable()
        if self.done():
            raise asyncio.InvalidStateError(_FINISHED_DETAILS)
        if self._done_writing_flag:
            raise asyncio.InvalidStateError(_HALF_CLOSED_DETAILS)
        sent = replay.write(request)
        try:
            await asyncio.wait((sent, self._driver.end()), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if not replay.taken(sent):
            await self._raise_for_status()

    async def done_writing(self) -> None:
        """Say that no more requests follow. May be said twice."""
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

    def __init__(self, driver: _Driver) -> None:
        _StreamResponse.__init__(self, driver)
        self._done_writing_flag = False


_CALLS: dict[str, type[Any]] = {
    "unary_unary": UnaryUnaryCall,
    "unary_stream": UnaryStreamCall,
    "stream_unary": StreamUnaryCall,
    "stream_stream": StreamStreamCall,
}


def insecure_channel(
    target: str,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None,
) -> grpc.aio.Channel:
    """A ``grpc.aio.Channel`` through the mesh: a drop-in for ``grpc.aio.insecure_channel``.

    ``target`` and ``options`` as for ``mesh.insecure_channel``.

    Raises:
        ValueError: the target or the service config is malformed; the message says where.
    """
    return Channel(target, options, None, compression, interceptors)


def secure_channel(
    target: str,
    credentials: grpc.ChannelCredentials,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None,
) -> grpc.aio.Channel:
    """As ``insecure_channel``, over TLS: for ``mesh:///`` and ``dns:///`` the servers must prove the service's name,
    not an address.

    Raises:
        TypeError: ``credentials`` are no ``grpc.ChannelCredentials``.
        ValueError: as ``insecure_channel``.
    """
    check_channel_credentials(credentials)
    return Channel(target, options, credentials, compression, interceptors)
