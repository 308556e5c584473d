"""Wraps the servicers of a test mesh's replicas, to record their calls and inject faults.

Handlers are wrapped when they are registered, inside the mesh's own wrappers: an injected delay counts as time in the
handler, and an injected failure is treated like one of the handler's own.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from mesh.server.handlers.registrar import HandlerCache, Servicers
from mesh.server.handlers.scope import NO_DEADLINE, Behavior, Handler
from mesh.server.handlers.wrap import rebuilt
from mesh.testing.injection import Effect, Injection, Injections, Kind
from mesh.testing.methods import Methods
from mesh.testing.recording import CallRecorder, RecordedCall

_LATENCY = 0.02
"""How much earlier a deadline may pass at the client than at the server. Seconds."""


class Tap:
    """Connects the handlers of one replica to the recorder and to the injected faults."""

    def __init__(self, replica: str, methods: Methods, recorder: CallRecorder, injections: Injections) -> None:
        self.replica = replica
        self.methods = methods
        self.recorder = recorder
        self.injections = injections
        self.wrapped = HandlerCache(self._wrap)  # the same one each time, as servers cache what they build from it

    def around(self, servicers: Servicers) -> Servicers:
        """The same servicers, with their handlers wrapped."""
        return [(functools.partial(self._add, add_to_server), servicer) for add_to_server, servicer in servicers]

    def _add(self, add_to_server: Callable[[Any, Any], object], servicer: Any, server: Any) -> None:
        add_to_server(servicer, _Registrar(server, self))

    def _wrap(self, handler: Handler, method: str) -> Handler:
        def wrap(behavior: Behavior) -> Behavior:
            if getattr(behavior, "experimental_non_blocking", False):
                return behavior
            wrap = _aio if inspect.iscoroutinefunction(behavior) or inspect.isasyncgenfunction(behavior) else _sync
            wrapped = wrap(behavior, functools.partial(_Call, self, method), handler)
            wrapped.__dict__.update(behavior.__dict__)  # its experimental_thread_pool
            return wrapped

        return rebuilt(handler, wrap)


class _Registrar:
    """Stands in for the server while servicers are added."""

    def __init__(self, server: Any, tap: Tap) -> None:
        self._server = server
        self._tap = tap

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers([_Handlers(handler, self._tap) for handler in generic_rpc_handlers])

    def add_registered_method_handlers(self, service_name: str, method_handlers: dict[str, Handler]) -> None:
        self._tap.methods.add(service_name, method_handlers)
        wrapped = {name: self._tap.wrapped(f"/{service_name}/{name}", each) for name, each in method_handlers.items()}
        self._server.add_registered_method_handlers(service_name, wrapped)


class _Handlers(grpc.ServiceRpcHandler):
    """A service's handlers, wrapped."""

    def __init__(self, handler: grpc.GenericRpcHandler, tap: Tap) -> None:
        self._handler = handler
        self._tap = tap
        self._name = handler.service_name() if isinstance(handler, grpc.ServiceRpcHandler) else ""
        tap.methods.add_service(self._name)

    def service_name(self) -> str:
        return self._name

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = self._handler.service(handler_call_details)
        return handler and self._tap.wrapped(handler_call_details.method, handler)


class _Call:
    """A call that a replica received: keeps its record up to date. ``context``: any of grpc's context types."""

    def __init__(self, tap: Tap, method: str, context: Any) -> None:
        left = context.time_remaining()
        self._context = context
        self._tap = tap
        self.record = RecordedCall(
            method,
            tap.replica,
            tuple((key, value) for key, value in context.invocation_metadata() or ()),
            None if left is None or left > NO_DEADLINE else left,
        )
        self.injections: Sequence[Injection] = ()

    def came(self, request: Any, is_stream: bool) -> None:
        # Faults first: once the call is recorded, a test may remove them, but this call must still have them.
        self.injections = self._tap.injections.take(self.record.method, self.record.replica)
        if not is_stream:
            self.record.requests.append(request)
        self._tap.recorder.add(self.record)

    @contextmanager
    def running(self, is_active: Callable[[], bool]) -> Iterator[None]:
        """Record how the call ends in the block."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.given_up()
            raise
        except BaseException as error:
            code, details = _status(self._context)
            if not is_active():
                self.given_up()
            elif code is grpc.StatusCode.OK:
                self.ended(grpc.StatusCode.INTERNAL, str(error), error)
            else:
                # context.abort() raises a bare Exception, or AbortError with asyncio.
                aborted = isinstance(error, grpc.aio.AbortError) or (type(error) is Exception and not error.args)
                self.ended(code, details, None if aborted else error)
            raise
        if is_active():
            self.ended(*_status(self._context))
        else:
            self.given_up()

    def given_up(self) -> None:
        """The client no longer waits for the response."""
        timeout, left = self.record.timeout, self._context.time_remaining()
        # The client's deadline passes first: it started earlier, and gRPC rounds sent timeouts up by at most 1 %.
        late = timeout is not None and (left or 0.0) <= timeout / 100 + _LATENCY
        self.ended(grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED)

    def ended(self, code: grpc.StatusCode, details: str = "", error: BaseException | None = None) -> None:
        if self.record.code is None:
            self.record.details, self.record.error, self.record.code = details, error, code
            self._tap.recorder.changed()


def _status(context: Any) -> tuple[grpc.StatusCode, str]:
    """The status that a handler has set; the details are bytes in threads, and the code may be a number in asyncio."""
    code, details = context.code() or grpc.StatusCode.OK, context.details() or ""
    if not isinstance(code, grpc.StatusCode):
        code = next((each for each in grpc.StatusCode if each.value[0] == code), grpc.StatusCode.UNKNOWN)
    return code, details.decode("utf-8", "replace") if isinstance(details, bytes) else details


class _Noting:
    """A handler's context that records a status before it is sent, so that the record has it before the client does."""

    __slots__ = ("_call", "_context")

    def __init__(self, context: Any, call: _Call) -> None:
        self._context = context
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


# -- threads ----------------------------------------------------------------------------------------------------------


def _sync(behavior: Behavior, begin: Callable[[Any], _Call], handler: Handler) -> Behavior:
    def requests_of(call: _Call, requests: Iterable[Any]) -> Iterator[Any]:
        for request in requests:
            call.record.requests.append(request)
            yield request

    @contextmanager
    def entered(request: Any, context: Any) -> Iterator[tuple[Any, Any]]:
        call = begin(context)
        call.came(request, handler.request_streaming)
        if not isinstance(context, grpc.ServicerContext):
            context = _ThreadContext(context, call)
        with call.running(context.is_active):
            _inject(call, context)
            yield requests_of(call, request) if handler.request_streaming else request, context

    def handle(request: Any, context: Any) -> Any:
        with entered(request, context) as arguments:
            return behavior(*arguments)

    def handle_responses(request: Any, context: Any) -> Iterator[Any]:
        with entered(request, context) as arguments:
            yield from behavior(*arguments)

    return handle_responses if handler.response_streaming else handle


class _ThreadContext(_Noting):
    """The context of a handler that runs in a thread of an asyncio server."""

    __slots__ = ()

    def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        self._call.ended(code, details)
        self._context.abort(code, details)

    def abort_with_status(self, status: Any) -> None:
        self._call.ended(status.code, status.details)
        self._context.abort_with_status(status)


def _inject(call: _Call, context: Any) -> None:
    """Apply the call's faults. Returns when the servicer should be called."""
    for injection in call.injections:
        effect = injection.effect
        if effect.kind is not Kind.FAIL:
            over = threading.Event()
            if not context.add_callback(over.set):
                over.set()
            injection.hold(over.set)
            over.wait(effect.seconds)
            injection.let_go(over.set)
        if effect.kind is not Kind.DELAY or not context.is_active():
            call.record.injected = True
            if not context.is_active():
                call.given_up()
            code, details = _end(effect)
            if effect.metadata:
                context.set_trailing_metadata(effect.metadata)
            context.abort(code, details)


def _end(effect: Effect) -> tuple[grpc.StatusCode, str]:
    """The status of a call that a fault ends; if its client has given up, nobody sees it."""
    if effect.kind is Kind.FAIL:
        return effect.code, effect.details
    return grpc.StatusCode.UNAVAILABLE, f"injected fault: {effect.kind.value}"


# -- asyncio ----------------------------------------------------------------------------------------------------------


class _AioContext(_Noting):
    __slots__ = ()

    async def read(self) -> Any:
        request = await self._context.read()
        if request is not grpc.aio.EOF:
            self._call.record.requests.append(request)
        return request

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        self._call.ended(code, details)
        await self._context.abort(code, details, trailing_metadata)

    async def abort_with_status(self, status: Any) -> None:
        await self.abort(status.code, status.details, status.trailing_metadata)


def _aio(behavior: Behavior, begin: Callable[[Any], _Call], handler: Handler) -> Behavior:
    async def requests_of(call: _Call, requests: AsyncIterable[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            call.record.requests.append(request)
            yield request

    async def handle(request: Any, context: Any) -> Any:
        call = begin(context)
        call.came(request, handler.request_streaming)
        with call.running(lambda: not context.cancelled()):
            noting = _AioContext(context, call)
            await _inject_aio(call, noting)
            return await behavior(requests_of(call, request) if handler.request_streaming else request, noting)

    async def handle_responses(request: Any, context: Any) -> AsyncIterator[Any]:
        call = begin(context)
        call.came(request, handler.request_streaming)
        with call.running(lambda: not context.cancelled()):
            noting = _AioContext(context, call)
            await _inject_aio(call, noting)
            recorded = requests_of(call, request) if handler.request_streaming else request
            async with aclosing(behavior(recorded, noting)) as responses:
                async for response in responses:
                    yield response

    # grpc distinguishes handlers by the kind of function.
    return handle_responses if inspect.isasyncgenfunction(behavior) else handle


async def _inject_aio(call: _Call, context: _AioContext) -> None:
    for injection in call.injections:
        effect = injection.effect
        if effect.kind is not Kind.FAIL:
            loop, over = asyncio.get_running_loop(), asyncio.Event()

            def release(loop: asyncio.AbstractEventLoop = loop, over: asyncio.Event = over) -> None:
                loop.call_soon_threadsafe(over.set)

            injection.hold(release)
            try:
                async with asyncio.timeout(effect.seconds):
                    await over.wait()
            except TimeoutError:
                pass
            finally:
                injection.let_go(release)
        if effect.kind is not Kind.DELAY:
            call.record.injected = True
            await context.abort(*_end(effect), effect.metadata)
