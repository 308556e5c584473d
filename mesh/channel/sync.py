"""``grpc.Channel`` over a cluster: the channel, the multicallables of the four kinds, and the object that stands for
a call.

Blocking unary calls run over grpc's own blocking path; all else is driven by events. A call in flight is one object,
``Call``, which is a ``grpc.Call``, a ``grpc.Future`` and a ``grpc.RpcError``, as grpc's own is.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, TypeVar, cast

import grpc

from mesh import context
from mesh.channel import background, forking
from mesh.channel.arguments import check_call, check_channel_credentials
from mesh.channel.assemble import Assembly
from mesh.channel.drive import (
    CODES,
    FORKED_DETAILS,
    NEVER_SENT,
    START,
    STATES,
    LockedDriver,
    failed,
    retry_metadata,
    run_blocking,
    too_large,
    until,
)
from mesh.channel.instrumentation import channels_around, wrapped
from mesh.channel.replay import Replay, Request
from mesh.channel.subchannels import Method, OwnPool, Pool, SyncSubchannel
from mesh.channel.worker import Worker
from mesh.errors import CallError, RpcError, terminated
from mesh.model import Attempt, CallSpec, Code, Connectivity, Elapsed, Metadatum, Outcome, Verdict, Wake
from mesh.observe import Explanation, explain
from mesh.policy.flow import Flow

_LOG = logging.getLogger("mesh.channel")

D = TypeVar("D", bound="_Driver")

Metadata = Sequence[Metadatum] | None


class Channel(grpc.Channel):
    """A ``grpc.Channel`` whose calls go through the mesh. Touches no core, thread or loop before its first use."""

    blocking = True

    def __init__(
        self,
        target: str,
        options: Sequence[tuple[str, Any]] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        compression: grpc.Compression | None = None,
    ) -> None:
        self.assembly = Assembly(target, options, credentials, compression, SyncSubchannel)
        self.closed = False
        self._around = channels_around(target, credentials)
        self._lock = threading.Lock()
        self._stop: weakref.finalize[Any, Any] | None = None
        self._calls: weakref.WeakSet[_Driver] = weakref.WeakSet()
        # Two threads, if they are needed: callbacks that wait don't hold up the channel's other calls.
        self.stepping = Worker("mesh-calls")
        self.callbacks = Worker("mesh-callbacks")
        self._watch = _StateWatch(self)

    def start(self) -> None:
        """Bring the channel to life; once. Raises ValueError when it is closed."""
        if self._stop is not None and not self.closed:
            return
        with self._lock:
            if self.closed:
                raise ValueError("Cannot invoke RPC on closed channel!")
            if self._stop is None:
                forking.check(aio=self.assembly.discovers_by_aio)
                self.assembly.rng.seed()  # channels that forked apart must not move in step
                background.spawn(self.assembly.run())
                forking.register(self, self.assembly.pool)
                # The multicallables hold the channel, so it lives as long as any stub.
                self._stop = weakref.finalize(self, background.call_from_finalizer, self.assembly.pool.close)
                self._stop.atexit = False
        self._watch.look()

    def forked(self) -> object:
        """In a forked child: begin anew, with connections of its own; returns what is the parent's."""
        left = self.assembly, self._stop, list(self._calls)
        if self._stop is not None:
            self._stop.detach()
        for driver in left[2]:
            driver.forked()
        self._lock, self._stop, self._calls = threading.Lock(), None, weakref.WeakSet()
        self.stepping, self.callbacks = self.stepping.again(), self.callbacks.again()
        if not self.closed:
            self.assembly = self.assembly.again()
            self._watch = self._watch.again()
        return left

    def adopt(self, driver: _Driver) -> None:
        """Have the call cancelled when the channel closes."""
        self._calls.add(driver)

    def state(self) -> grpc.ChannelConnectivity:
        """The channel's state over all its endpoints."""
        if self.closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        return STATES[self.assembly.pool.state() if self._stop is not None else Connectivity.IDLE]

    def subscribe(
        self, callback: Callable[[grpc.ChannelConnectivity], None], try_to_connect: bool | None = False
    ) -> None:
        pool = self.assembly.pool
        if isinstance(pool, OwnPool):  # core knows the state of its own targets best
            self.start()
            pool.subchannel.core().subscribe(callback, bool(try_to_connect))
            return
        if try_to_connect:
            self.start()
            pool.wanted()
        self._watch.subscribe(callback)

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        pool = self.assembly.pool
        if isinstance(pool, OwnPool) and self._stop is not None:
            pool.subchannel.core().unsubscribe(callback)
        self._watch.unsubscribe(callback)

    # A stub's multicallables stand inside what instrumentation puts around channels.
    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        inside = wrapped(self._around, _Inside(self))
        return inside.unary_unary(method, request_serializer, response_deserializer, _registered_method)

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        inside = wrapped(self._around, _Inside(self))
        return inside.unary_stream(method, request_serializer, response_deserializer, _registered_method)

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        inside = wrapped(self._around, _Inside(self))
        return inside.stream_unary(method, request_serializer, response_deserializer, _registered_method)

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        inside = wrapped(self._around, _Inside(self))
        return inside.stream_stream(method, request_serializer, response_deserializer, _registered_method)

    def close(self) -> None:
        """Cancel the calls in flight, close every connection, and take no more calls."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        for driver in list(self._calls):
            driver.close()
        self._watch.close()
        if self._stop is not None:
            self._stop.detach()  # what it would call later keeps the pool
        self.assembly.pool.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<mesh.Channel {self.assembly.target} {self.state().name}>"


class _Inside:
    """What makes a channel's multicallables. Instrumentation's channels call it as the ``grpc.Channel`` that they stand
    around."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def unary_unary(
        self, method: str, serializer: Any = None, deserializer: Any = None, registered: bool | None = False
    ) -> UnaryUnary:
        return UnaryUnary(self._channel, "unary_unary", method, serializer, deserializer, registered)

    def unary_stream(
        self, method: str, serializer: Any = None, deserializer: Any = None, registered: bool | None = False
    ) -> UnaryStream:
        return UnaryStream(self._channel, "unary_stream", method, serializer, deserializer, registered)

    def stream_unary(
        self, method: str, serializer: Any = None, deserializer: Any = None, registered: bool | None = False
    ) -> StreamUnary:
        return StreamUnary(self._channel, "stream_unary", method, serializer, deserializer, registered)

    def stream_stream(
        self, method: str, serializer: Any = None, deserializer: Any = None, registered: bool | None = False
    ) -> StreamStream:
        return StreamStream(self._channel, "stream_stream", method, serializer, deserializer, registered)


class _StateWatch:
    """Tells subscribers each new state of a channel, in order, from a thread that lives while there is news (as
    grpc's)."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._told: dict[Callable[[grpc.ChannelConnectivity], None], grpc.ChannelConnectivity | None] = {}
        self._armed = False
        self._delivering = False

    def again(self) -> _StateWatch:
        """The same for a forked child, where nobody is told before the channel is used."""
        again = _StateWatch(self._channel)
        again._told = dict.fromkeys(self._told)
        return again

    def subscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        with self._lock:
            self._told[callback] = None
        self.look()

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        with self._lock:
            self._told.pop(callback, None)

    def close(self) -> None:
        with self._lock:
            self._told.clear()

    def _replaced(self) -> None:
        with self._lock:
            self._armed = False
        self.look()

    def look(self) -> None:
        """Watch for the next change, and deliver what the subscribers haven't been told."""
        with self._lock:
            if not self._told:
                return
            arm, self._armed = not self._armed, True
            deliver, self._delivering = not self._delivering, True
        pool = self._channel.assembly.pool
        if arm and not pool.closed:
            pool.when_replaced(pool.cluster.picker, self._replaced)
        if deliver:
            threading.Thread(target=self._deliver, name="mesh-connectivity", daemon=True).start()

    def _deliver(self) -> None:
        while True:
            with self._lock:
                state = self._channel.state()
                callbacks = [callback for callback, told in self._told.items() if told is not state]
                for callback in callbacks:
                    self._told[callback] = state
                self._delivering = bool(callbacks)
            if not callbacks:
                return
            for callback in callbacks:
                _run_callback(functools.partial(callback, state))


def _run_callback(callback: Callable[[], object]) -> None:
    try:
        callback()
    except Exception:
        _LOG.exception("Exception in callback %r", callback)


# -- the multicallables


class _Multicallable:
    """What the four kinds share."""

    def __init__(
        self, channel: Channel, kind: str, path: str, serializer: Any, deserializer: Any, registered: bool | None
    ) -> None:
        self._channel = channel
        self._serializer = serializer
        # Requests of a stream are serialised by the replay buffer, for all attempts once.
        sent = Request.serialized if kind.startswith("stream") else serializer
        self._method = channel.assembly.method(kind, path, sent, deserializer, bool(registered))

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
        """A driver for a new call, not yet started."""
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
        """Start a call that is driven by events."""
        driver = self._driver(_Driver, requests, timeout, metadata, credentials, wait_for_ready, compression)
        driver.start()
        if driver.refused and driver.verdict is not None:  # grpc raises at once when the request can't be serialised
            explanation = explain(driver.call, self._channel.assembly.target, driver.verdict, driver.finished_at)
            raise _error(explanation, driver.verdict)
        return (StreamCall if self._method.kind.endswith("stream") else Call)(driver)


class UnaryUnary(_Multicallable, grpc.UnaryUnaryMultiCallable):  # type: ignore[type-arg]
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
        """Make a call that may be hedged, in this thread; it has ended well, or an error is raised."""
        driver = self._driver(_BlockingDriver, request, timeout, metadata, credentials, wait_for_ready, compression)
        verdict = driver.run()
        if verdict.outcome.code:
            raise _error(explain(driver.call, self._channel.assembly.target, verdict, time.monotonic()), verdict)
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
        """Make the call in this thread. Of the pair that is returned, the call is there only ``with_call``."""
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
            wait = call.wait_for_ready if pool.core_waits else None
            sent = retry_metadata(attempt) if attempt.previous else call.metadata
            try:
                if with_call:
                    result = core.with_call(request, attempt.timeout, sent, credentials, wait, compression)
                elif reads_reports:
                    result, inner = core.with_call(request, attempt.timeout, sent, credentials, wait, compression)
                    pool.answered(address, inner.trailing_metadata())
                else:
                    result = core(request, attempt.timeout, sent, credentials, wait, compression)
            except grpc.RpcError as error:
                return _outcome(error, pool, address, final=too_large(self._serializer, request))
            except ValueError:
                if channel.closed or not subchannel.closed:
                    raise
                return NEVER_SENT  # the endpoint is gone: its channel closed between the look and the call
            if with_call and reads_reports:
                pool.answered(address, result[1].trailing_metadata())
            return Outcome(0, result=result)

        verdict = run_blocking(assembly.flow(call, now), perform, pool)
        outcome = verdict.outcome
        if outcome.code == 0:
            if not with_call:
                return outcome.result, None
            response, core_call = cast("tuple[Any, grpc.Call]", outcome.result)
            return response, FinishedCall(core_call, explain(call, assembly.target, verdict, time.monotonic()))
        assembly.failed(call, verdict, context.current())
        raise _error(explain(call, assembly.target, verdict, time.monotonic()), verdict) from None


class UnaryStream(_Multicallable, grpc.UnaryStreamMultiCallable):  # type: ignore[type-arg]
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


class StreamUnary(_Multicallable, grpc.StreamUnaryMultiCallable):  # type: ignore[type-arg]
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


class StreamStream(_Multicallable, grpc.StreamStreamMultiCallable):  # type: ignore[type-arg]
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


# -- driving by events


class _Driver(LockedDriver):
    """Drives a call over grpc's futures and rendezvous. It holds all of the call's state; ``Call`` is what the user
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
        self.refused = False  # grpc would not even start an attempt
        self._method = method
        self._credentials = credentials
        self._compression = compression
        self._serializer = serializer
        self._hedged = self._watched = False  # known with the first attempt
        self._unary = method.kind.endswith("unary")
        self._replay = Replay(requests, serializer, self._overflowed) if method.kind.startswith("stream") else None
        self._request = requests
        self._timer: background.Timer | None = None
        self._condition = threading.Condition()
        self._callbacks: list[Callable[[], object]] | None = []
        self._scope = context.current()
        if self._scope is not None:
            self._scope.adopt(self, self.cancel)

    def forked(self) -> None:
        """In a forked child: the call goes on in the parent alone, and is over here. Nothing of core is called."""
        self._lock, self._condition = threading.Lock(), threading.Condition()
        self._conclude(Verdict(Outcome(Code.CANCELLED, FORKED_DETAILS, cancelled=True)))
        self._left = dict(self.running), self.committed
        self.running, self.committed, self._callbacks = {}, None, None

    def begin(self, attempt: Attempt) -> None:
        policy = self.call.policy
        self._hedged = policy.hedge.max_attempts > 1
        self._watched = not self._unary and (self._hedged or policy.receive_timeout < math.inf)
        number, address = attempt.number, attempt.endpoint.address
        subchannel = self.pool.get(address)
        if subchannel is None:
            self.ended(number, NEVER_SENT)
            return
        core = subchannel.call(self._method, attempt.previous)
        requests = self._request if self._replay is None else self._replay.requests()
        wait = self.call.wait_for_ready if self.pool.core_waits else None
        sent = retry_metadata(attempt)
        try:
            invoke = core.future if self._unary else core
            inner = invoke(requests, attempt.timeout, sent, self._credentials, wait, self._compression)
        except grpc.RpcError as error:
            self.refused = True
            self.ended(number, _outcome(error, self.pool, address))
            return
        except ValueError:
            if self.channel.closed or not subchannel.closed:
                raise
            self.ended(number, NEVER_SENT)
            return
        self.running[number] = inner
        # (add_done_callback would have the inner call refer to itself, and so outlive its user.)
        over = functools.partial(self._over, number, address, inner)
        if not inner.add_callback(over):
            over()
        elif (self._hedged or self._replay is not None) and self._unrepeatable():
            self.overflow(number)
        elif self._watched:
            # The user's thread can wait for one attempt's headers, when it reads; of several, or with a time by which
            # they are to come, each has a thread that does.
            threading.Thread(target=self._await_headers, args=(number, inner), daemon=True).start()

    def wake_at(self, until: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if until is None else background.Timer(until - time.monotonic(), self.timer_fired)

    def changed(self) -> None:
        if self.committed is not None and self._replay is not None:
            self._replay.release()
        with self._condition:
            self._condition.notify_all()
            if self.verdict is None or self._callbacks is None:
                return
            callbacks, self._callbacks = self._callbacks, None
        if self._scope is not None:
            self._scope.release(self)
            self.channel.assembly.failed(self.call, self.verdict, self._scope)
        for callback in callbacks:
            self.channel.callbacks.run(callback)

    # What follows these may run the caller's serializer, and they come in any thread: the one of the timers, or of
    # another call, that found out that an endpoint is lost.

    def timer_fired(self) -> None:
        self.channel.stepping.run(super().timer_fired)

    def picker_replaced(self) -> None:
        self.channel.stepping.run(super().picker_replaced)

    def add_callback(self, callback: Callable[[], object]) -> bool:
        """Have ``callback`` called when the call is over; False when it is."""
        with self._condition:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            return True

    def wait(self, timeout: float | None = None) -> Verdict | None:
        """Wait until the call is over; None when that takes longer than ``timeout``."""
        with self._condition:
            self._condition.wait_for(lambda: self.verdict is not None, timeout)
            return self.verdict

    def pull(self) -> Any:
        """Wait until an attempt is the call, and return it; None when the mesh itself ended the call.

        Headers come to nobody but who asks for them, so this thread, the user's, asks.
        """
        asked = 0
        while self.committed is None:
            with self._condition:
                self._condition.wait_for(lambda asked=asked: self._settled() or max(self.running, default=0) > asked)  # type: ignore[misc]
                if self.verdict is not None:
                    return self.verdict.outcome.result
                number, inner = max(self.running.items(), key=lambda item: item[0], default=(0, None))
            if number > asked and not self._watched:
                self._await_headers(number, inner)
            asked = max(asked, number)
        return self.committed

    def _settled(self) -> bool:
        return self.committed is not None or self.verdict is not None

    def _await_headers(self, number: int, inner: Any) -> None:
        if inner.initial_metadata() or inner.is_active():
            self.headers(number)

    def _over(self, number: int, address: str, inner: Any) -> None:
        if inner.code() is grpc.StatusCode.OK:
            if self.pool.cluster.reads_reports:
                self.pool.answered(address, inner.trailing_metadata())
            self.ended(number, Outcome(0, result=inner))
        elif self._unary and self._replay is None:
            self._failed(number, address, inner)
        else:
            # This is the thread that has yet to handle the headers of a stream: they come right after, and may be asked
            # for on another.
            self.channel.stepping.run(functools.partial(self._failed, number, address, inner))

    def _failed(self, number: int, address: str, inner: Any) -> None:
        self.ended(number, _outcome(inner, self.pool, address, final=self._unrepeatable()))

    def broken(self, inner: Any) -> None:
        """``inner`` has failed for its reader. (When a response can't be parsed it tells nobody else.)"""
        for number, running in tuple(self.running.items()):
            if running is inner:
                self._failed(number, self.call.attempts[number - 1].endpoint.address, inner)

    def _unrepeatable(self) -> bool:
        """Whether what was sent is more than is kept for another attempt."""
        return self._replay.overflowed if self._replay is not None else too_large(self._serializer, self._request)

    def _overflowed(self) -> None:
        for number in tuple(self.running):
            self.overflow(number)


class _BlockingDriver(_Driver):
    """Drives a call over futures in the thread that waits for it: what happens elsewhere is put into its mailbox."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._mail: SimpleQueue[Wake | None] = SimpleQueue()
        self._due: float | None = None

    def run(self) -> Verdict:
        """Run the call to its end."""
        try:
            self._drain(START)
            while self.verdict is None:
                try:
                    wake = self._mail.get(timeout=until(self._due))
                except Empty:
                    wake = Elapsed(time.monotonic())
                self._drain(wake)
        finally:
            if self._conclude(Verdict(Outcome(Code.CANCELLED, "interrupted", cancelled=True))):
                self._clean_up()
        return self.verdict

    def _send(self, wake: Wake | None) -> None:
        self._mail.put(wake)

    def picker_replaced(self) -> None:
        self._send(Elapsed(time.monotonic()))

    def wake_at(self, until: float | None) -> None:
        self._due = until


class Call(RpcError, grpc.Call, grpc.Future):  # type: ignore[type-arg]  # noqa: N818 - it is a call, too
    """A call that was started with ``.future()``, or streams: all that grpc returns there, and ``explain()``."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__()
        self._driver = driver

    def explain(self) -> Explanation:
        """Every attempt that was made for the call so far: where, when, and how it ended."""
        driver = self._driver
        return explain(driver.call, driver.channel.assembly.target, driver.verdict, driver.finished_at)

    # -- as a grpc.RpcContext

    def is_active(self) -> bool:
        return self._driver.verdict is None

    def time_remaining(self) -> float | None:  # type: ignore[override]
        deadline = self._driver.call.deadline
        return None if deadline == math.inf else max(0.0, deadline - time.monotonic())

    def cancel(self) -> bool:
        return self._driver.cancel()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return self._driver.add_callback(callback)

    # -- as a grpc.Call

    def initial_metadata(self) -> Any:
        inner = self._driver.pull()
        return () if inner is None else inner.initial_metadata() or ()

    def trailing_metadata(self) -> Any:
        inner = self._end().result
        return () if inner is None else inner.trailing_metadata() or ()  # type: ignore[attr-defined]

    def code(self) -> grpc.StatusCode:
        return CODES[self._end().code]

    def details(self) -> str:
        return self._end().details

    def debug_error_string(self) -> str:
        """What core says of how the call ended."""
        inner = self._end().result
        return self.details() if inner is None else _debug_error_string(inner)

    # -- as a grpc.Future

    def cancelled(self) -> bool:
        verdict = self._driver.verdict
        return verdict is not None and verdict.outcome.cancelled

    def running(self) -> bool:
        return self._driver.verdict is None

    def done(self) -> bool:
        return self._driver.verdict is not None

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the response. Raises itself when the call failed, FutureTimeoutError, or FutureCancelledError."""
        if self._failure(timeout) is not None:
            raise self
        return self._end().result.result()  # type: ignore[attr-defined]

    def exception(self, timeout: float | None = None) -> Exception | None:
        """Wait for the end: None when it is good, else this call itself. Raises as ``result`` for time and cancels."""
        return self._failure(timeout)

    def traceback(self, timeout: float | None = None) -> TracebackType | None:
        """The traceback that ``result`` would raise with."""
        if self._failure(timeout) is None:
            return None
        try:
            raise self
        except grpc.RpcError:
            return sys.exc_info()[2]

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        if not self._driver.add_callback(functools.partial(fn, self)):
            fn(self)

    def _failure(self, timeout: float | None) -> Call | None:
        verdict = self._driver.wait(timeout)
        if verdict is None:
            raise grpc.FutureTimeoutError
        if verdict.outcome.cancelled:
            raise grpc.FutureCancelledError
        return self if verdict.outcome.code else None

    def _end(self) -> Outcome:
        verdict = self._driver.wait()
        assert verdict is not None  # it was waited for without a limit
        return verdict.outcome

    def __del__(self) -> None:
        driver = getattr(self, "_driver", None)
        if driver is not None and driver.verdict is None:
            background.call_from_finalizer(functools.partial(driver.cancel, "Cancelled upon garbage collection!"))

    def __repr__(self) -> str:
        verdict = self._driver.verdict
        name = type(self).__name__
        if verdict is None:
            return f"<{name} object>"
        endpoint = verdict.attempt.endpoint.address if verdict.attempt and verdict.outcome.code else ""
        outcome = verdict.outcome
        return terminated(name, CODES[outcome.code], outcome.details, self.debug_error_string(), endpoint)

    __str__ = __repr__


class StreamCall(Call):
    """A call whose responses are iterated."""

    def __iter__(self) -> StreamCall:
        return self

    def __next__(self) -> Any:
        inner = self._driver.committed
        if inner is None:
            inner = self._driver.pull()
        if inner is None:
            raise self
        try:
            return next(inner)
        except StopIteration:
            self._driver.wait()  # core's thread is about to say how it ended
            raise
        except grpc.RpcError:
            self._driver.broken(inner)
            self._driver.wait()
            raise self from None

    next = __next__


class FinishedCall(grpc.Call):
    """The call beside a response that is there already, from ``with_call``: grpc's own, with ``explain()``."""

    def __init__(self, core: Any, explanation: Explanation) -> None:
        self._core = core
        self._explanation = explanation

    def explain(self) -> Explanation:
        """Every attempt that was made for the call: where, when, and how it ended."""
        return self._explanation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def initial_metadata(self) -> Any:
        return self._core.initial_metadata()

    def trailing_metadata(self) -> Any:
        return self._core.trailing_metadata()

    def code(self) -> Any:
        return self._core.code()

    def details(self) -> Any:
        return self._core.details()

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> Any:
        return self._core.time_remaining()

    def cancel(self) -> Any:
        return self._core.cancel()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return bool(self._core.add_callback(callback))

    def __repr__(self) -> str:
        return repr(self._core)


def _outcome(error: Any, pool: Pool, address: str, *, final: bool = False) -> Outcome:
    """The outcome of an attempt that grpc says has failed. ``final``: it can't be made again."""
    code, initial, trailing = error.code().value[0], error.initial_metadata(), error.trailing_metadata()
    return failed(pool, address, code, error.details(), initial, trailing, error, final=final)


def _debug_error_string(call: Any) -> str:
    # Asked for it, grpc waits for ever when the call was ended on this side: cancelled, or by a bad message. But it
    # prints what it has.
    # The details are the peer's, and may read like what follows them.
    _, _, rest = str(call).partition(f'\tdetails = "{call.details()}"\n\tdebug_error_string = "')
    text = rest.removesuffix('"\n>')
    return "" if text == "None" else text


def _error(explanation: Explanation, verdict: Verdict) -> CallError:
    """What a blocking call raises."""
    outcome = verdict.outcome
    core: Any = outcome.result
    if core is None:
        return CallError(CODES[outcome.code], outcome.details, explanation, debug_error_string=outcome.details)
    return CallError(
        core.code(),
        outcome.details,
        explanation,
        core.initial_metadata() or (),
        core.trailing_metadata() or (),
        core.debug_error_string(),
    )


def insecure_channel(
    target: str,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
) -> grpc.Channel:
    """A ``grpc.Channel`` through the mesh: a drop-in for ``grpc.insecure_channel``.

    ``target`` is ``mesh:///SERVICE``, ``static:///HOST:PORT,HOST:PORT``, ``dns:///HOST:PORT``, or any that grpc takes.
    ``options`` go to the endpoints' channels, but for ``grpc.service_config``, which is the mesh's to honour.

    Raises:
        ValueError: the target or the service config is malformed; the message says where.
    """
    return Channel(target, options, None, compression)


def secure_channel(
    target: str,
    credentials: grpc.ChannelCredentials,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
) -> grpc.Channel:
    """As ``insecure_channel``, over TLS: for ``mesh:///`` and ``dns:///`` the servers must prove the service's name,
    not an address.

    Raises:
        TypeError: ``credentials`` are no ``grpc.ChannelCredentials``.
        ValueError: as ``insecure_channel``.
    """
    check_channel_credentials(credentials)
    return Channel(target, options, credentials, compression)
