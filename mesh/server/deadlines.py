"""What stands around each handler: the inbound call's scope, and a plain end to what goes wrong in it.

Around every handler, of each kind and in both worlds, a ``mesh.context.Scope`` is entered, so that ``mesh.remaining()``
tells what is left of the inbound call, and the calls that the handler makes inherit its deadline, its cancellation and
the chain stop. An exception becomes INTERNAL with an id that the log repeats, and nothing of it leaks. A handler that
fails after a call it made was retried in vain says "don't retry" to the caller above (``grpc-retry-pushback-ms: -1``,
gRFC A6), so that retries don't multiply down a call tree.

``mesh.serve`` wraps handlers when they are registered, which costs no interceptor per call. For a ``grpc.Server`` of
one's own there are ``ServerInterceptor`` and ``AioServerInterceptor``.

A wrapped handler is of the same kind and has the same serializers. A handler of the callback kind
(``experimental_non_blocking``: the health service's Watch) is left as it is.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import aclosing
from typing import Any

import grpc

from mesh import context as mesh_context
from mesh.context import Scope
from mesh.model import Metadatum
from mesh.observe import ServerObserver
from mesh.policy.admission import BY_NAME
from mesh.server.gate import PUSHBACK, UNGATED, AioGate, Gate, ThreadGate
from mesh.server.gated import aio_gated, aio_gated_responses, aio_gated_stream, sync_gated, sync_gated_responses
from mesh.server.observed import observing
from mesh.server.requests import UnparsableError, aio_parsed, kept, raised, sync_parsed
from mesh.server.threads import async_behavior, begun

LOG = logging.getLogger("mesh.server")

_DO_NOT_RETRY: Metadatum = (PUSHBACK, "-1")
_ATTEMPTS = ("grpc-previous-rpc-attempts", "weft-attempt")

MAX_DIGITS = 9
"""Digits of an attempt's number in metadata."""

# grpc says about 9.2e18 s, or None, for "no deadline"; nothing that has one has a century.
_NO_DEADLINE = 3e9

Handler = Any  # an RpcMethodHandler; grpc's is generic over messages that nothing here looks at
Behavior = Callable[..., Any]


def arriving(metadata: Iterable[Metadatum]) -> Scope:
    """The scope of an inbound call that has just been seen; it gets its deadline when its handler begins."""
    is_retry, criticality = False, ""
    for key, value in metadata:
        if key in _ATTEMPTS:
            is_retry = _is_number(value) and int(value) > 0
        elif key == mesh_context.CRITICALITY and value in BY_NAME:
            criticality = str(value)
    return Scope(is_retry=is_retry, criticality=criticality, arrived=time.monotonic())


def _is_number(value: str | bytes) -> bool:
    # Python refuses to read more than 4,300 digits.
    return isinstance(value, str) and len(value) <= MAX_DIGITS and value.isdecimal()


def _begun(context: Any) -> Scope:
    """The scope, entered, of the inbound call that ``context`` (of any of grpc's kinds) stands for."""
    scope = mesh_context.inbound()
    if scope is None or scope.begun:  # its arrival wasn't seen here
        scope = arriving(context.invocation_metadata())
        mesh_context.enter(scope)
    scope.begun = True
    left = context.time_remaining()
    if left is not None and left <= _NO_DEADLINE:
        scope.deadline = time.monotonic() + left
    return scope


def _trailers(own: Iterable[Metadatum] | None, failed: bool, scope: Scope, gate: Gate | None) -> tuple[Metadatum, ...]:
    """What goes out with a status: the handler's own trailers, and beside them "don't retry" after retries in vain
    (the handler's own word on that stands), and the load."""
    trailers = tuple(own or ())
    if failed and scope.exhausted and not any(key == PUSHBACK for key, _ in trailers):
        trailers = (*trailers, _DO_NOT_RETRY)
    if gate is not None and gate.reports is not None:
        trailers += gate.reports.trailers(time.monotonic())
    return trailers


def _status_for(behavior: Behavior, error: Exception, context: Any) -> tuple[grpc.StatusCode, str]:
    """The status that an exception ends a call with: a code that the handler had set stands; it is logged."""
    name = os.urandom(8).hex()
    LOG.error("internal error, id %s, in %s", name, getattr(behavior, "__qualname__", behavior), exc_info=error)
    code, details = context.code(), context.details()
    if code is None or code is grpc.StatusCode.OK:
        return grpc.StatusCode.INTERNAL, f"internal error, id {name}"
    if isinstance(details, bytes):  # the threaded context keeps them encoded
        details = details.decode("utf-8", "replace")
    return code, details or f"internal error, id {name}"


def _failed(context: Any) -> bool:
    code = context.code()
    return code is not None and code is not grpc.StatusCode.OK


# -- threads ----------------------------------------------------------------------------------------------------------
# grpc runs a handler, and each step of its responses, in one context of its own on one thread: entering the scope once
# is enough. Status and trailers leave when the handler has ended, so they are still to be had when an exception passes
# here.


def _entered(context: grpc.ServicerContext) -> Scope:
    begun()
    scope = _begun(context)
    # Called however the call ends; a scope that is closed by then cancels nothing.
    if not context.add_callback(scope.cancel):
        scope.cancel()
    return scope


def _sync_done(context: Any, scope: Scope, gate: Gate | None) -> None:
    if scope.exhausted or gate is not None:
        trailers = _trailers(context.trailing_metadata(), _failed(context), scope, gate)
        if trailers:
            context.set_trailing_metadata(trailers)


def _sync_raised(behavior: Behavior, error: Exception, context: Any, scope: Scope, gate: Gate | None) -> None:
    """Settle a call whose handler raised; returns when the error is grpc's own to deal with."""
    if scope.exhausted or gate is not None:
        context.set_trailing_metadata(_trailers(context.trailing_metadata(), True, scope, gate))
    if not context.is_active():  # what a handler raises because its client is gone is no fault of its own
        return
    # context.abort() raises a bare Exception after it has set the code: there is no other public sign of it.
    if type(error) is Exception and not error.args and _failed(context):
        return
    code, details = _status_for(behavior, error, context)
    context.abort(code, details)


def _sync_unary(behavior: Behavior, gate: Gate | None) -> Behavior:
    def handle(request: Any, context: Any) -> Any:
        scope = _entered(context)
        try:
            response = behavior(request, context)
        except Exception as error:
            _sync_raised(behavior, error, context, scope, gate)
            raise
        finally:
            scope.close()
        _sync_done(context, scope, gate)
        return response

    return handle


def _sync_stream(behavior: Behavior, gate: Gate | None) -> Behavior:
    def handle(request: Any, context: Any) -> Iterator[Any]:
        scope = _entered(context)
        try:
            yield from behavior(request, context)
        except Exception as error:
            _sync_raised(behavior, error, context, scope, gate)
            raise
        finally:
            scope.close()
        _sync_done(context, scope, gate)

    return handle


# -- asyncio ----------------------------------------------------------------------------------------------------------
# Each call has a task of its own, hence a context of its own. abort() sends status and trailers before it raises, so
# what is to go with them is put there by a context of ours.


class AioContext:
    """A handler's context on an aio server: grpc's own, whose ``abort`` adds the chain stop and the load."""

    __slots__ = ("_context", "_gate", "_scope")

    def __init__(self, context: Any, scope: Scope, gate: Gate | None) -> None:
        self._context = context
        self._scope = scope
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    # Beside what differs, only what streams call for each message.
    def read(self) -> Awaitable[Any]:
        return self._context.read()  # type: ignore[no-any-return]

    def write(self, message: Any) -> Awaitable[None]:
        return self._context.write(message)  # type: ignore[no-any-return]

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[Metadatum, ...] = ()
    ) -> None:
        if self._scope.exhausted or self._gate is not None:
            own = trailing_metadata or self._context.trailing_metadata()
            trailing_metadata = _trailers(own, True, self._scope, self._gate)
        await self._context.abort(code, details, trailing_metadata)

    async def abort_with_status(self, status: Any) -> None:
        await self.abort(status.code, status.details, status.trailing_metadata)


async def _aio_raised(behavior: Behavior, error: BaseException, context: AioContext, scope: Scope) -> None:
    """Settle a call whose handler raised; returns when the error is grpc's own to deal with."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        scope.cancel()
    if not isinstance(error, Exception):
        return
    if context.done():  # aborted: the status is sent
        return
    if isinstance(error, UnparsableError):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    if isinstance(error, grpc.aio.BaseError) and not isinstance(error, grpc.aio.UsageError):
        scope.cancel()  # a message couldn't be sent or received: the client is gone
        return
    await context.abort(*_status_for(behavior, error, context))


def _aio_coroutine(behavior: Behavior, gate: Gate | None) -> Behavior:
    async def handle(request: Any, context: Any) -> Any:
        scope = _begun(context)
        wrapped = AioContext(context, scope, gate)
        try:
            response = await behavior(request, wrapped)
        except BaseException as error:
            await _aio_raised(behavior, error, wrapped, scope)
            raise
        finally:
            scope.close()
        _set_trailers(context, scope, gate)
        return response

    return handle


def _aio_generator(behavior: Behavior, gate: Gate | None) -> Behavior:
    async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
        scope = _begun(context)
        wrapped = AioContext(context, scope, gate)
        try:
            async with aclosing(behavior(request, wrapped)) as responses:
                async for response in responses:
                    yield response
        except BaseException as error:
            await _aio_raised(behavior, error, wrapped, scope)
            raise
        finally:
            scope.close()
        _set_trailers(context, scope, gate)

    return handle


def _set_trailers(context: Any, scope: Scope, gate: Gate | None) -> None:
    if scope.exhausted or gate is not None:
        trailers = _trailers(context.trailing_metadata(), _failed(context), scope, gate)
        if trailers:
            context.set_trailing_metadata(trailers)


# -- both -------------------------------------------------------------------------------------------------------------


def _rebuilt(handler: Handler, wrap: Callable[[Behavior], Behavior], parse: Callable[..., Any]) -> Handler:
    """``handler`` with its behavior and its parser wrapped: the same kind, the same serializer."""
    serializers = (handler.request_deserializer and parse(handler.request_deserializer), handler.response_serializer)
    if handler.request_streaming:
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(wrap(handler.stream_stream), *serializers)
        return grpc.stream_unary_rpc_method_handler(wrap(handler.stream_unary), *serializers)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(wrap(handler.unary_stream), *serializers)
    return grpc.unary_unary_rpc_method_handler(wrap(handler.unary_unary), *serializers)


# Order, from the handler out: parsed, above nothing, because it only looks at what the handler reads; gated above it,
# because a call that waits should still be told what is wrong with it; the scope above both, because the gate needs the
# deadline, and what goes wrong anywhere below gets its plain end there.


def wrap_sync(handler: Handler, method: str = "", gate: ThreadGate | None = None) -> Handler:
    """``handler``, of a ``grpc.Server``, inside its inbound call's scope, behind ``gate``.

    ``method``: its full name.
    """

    def wrap(behavior: Behavior) -> Behavior:
        if getattr(behavior, "experimental_non_blocking", False):
            return behavior
        parsed = behavior
        if handler.request_deserializer is not None:
            parsed = sync_parsed(behavior, request_streaming=handler.request_streaming)
        if gate is not None:
            gated = sync_gated_responses if handler.response_streaming else sync_gated
            parsed = gated(
                parsed, method.lstrip("/"), gate, is_stream=handler.request_streaming or handler.response_streaming
            )
        wrapped = (_sync_stream if handler.response_streaming else _sync_unary)(parsed, gate)
        pool = getattr(behavior, "experimental_thread_pool", None)
        if pool is not None:
            wrapped.experimental_thread_pool = pool  # type: ignore[attr-defined]
        return wrapped

    return _rebuilt(handler, wrap, kept)


def wrap_aio(handler: Handler, method: str = "", pool: Executor | None = None, gate: AioGate | None = None) -> Handler:
    """``handler``, of a ``grpc.aio.Server``, inside its inbound call's scope, behind ``gate``. One that isn't async
    runs in ``pool``. ``method``: its full name."""

    def wrap(behavior: Behavior) -> Behavior:
        if not (inspect.isasyncgenfunction(behavior) or inspect.iscoroutinefunction(behavior)):
            behavior = async_behavior(
                behavior,
                pool,
                request_streaming=handler.request_streaming,
                response_streaming=handler.response_streaming,
            )
        # grpc and the interceptors of a server go by what kind of function a handler is: each layer keeps it.
        generates = inspect.isasyncgenfunction(behavior)
        if handler.request_deserializer is not None and not handler.request_streaming:
            behavior = aio_parsed(behavior)
        if gate is not None:
            is_stream = handler.request_streaming or handler.response_streaming
            gated = aio_gated_responses if generates else aio_gated_stream if is_stream else aio_gated
            behavior = gated(behavior, method.lstrip("/"), gate)
        return (_aio_generator if generates else _aio_coroutine)(behavior, gate)

    # A stream's messages are parsed where its handler reads them, so there it may raise.
    return _rebuilt(handler, wrap, raised if handler.request_streaming else kept)


def observe(handler: Handler, method: str, observer: ServerObserver) -> Handler:
    """``handler``, wrapped already, with ``observer`` told of its calls."""
    behavior = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    if getattr(behavior, "experimental_non_blocking", False):
        return handler
    wrap = observing(observer, method)

    def observed(behavior: Behavior) -> Behavior:
        wrapped = wrap(behavior)
        wrapped.__dict__.update(behavior.__dict__)  # its experimental_thread_pool
        return wrapped

    return _rebuilt(handler, observed, lambda parse: parse)


METHODS = 1000
"""Methods whose wrapped handlers are kept; past it the first is forgotten, and wrapped again when it is called."""


class Wrapped:
    """Handlers by method, each wrapped when first seen: one for a method at most, however handlers come and go.
    ``observer`` is told of their calls."""

    __slots__ = ("_known", "_observer", "_wrap")

    def __init__(self, wrap: Callable[[Handler, str], Handler], observer: ServerObserver | None = None) -> None:
        self._wrap = wrap
        self._observer = observer
        self._known: dict[str, tuple[Handler, Handler]] = {}

    def __call__(self, method: str, handler: Handler) -> Handler:
        known = self._known.get(method)
        if known is None or known[0] is not handler:
            if handler is None:
                return None
            wrapped = self._wrap(handler, method)
            if self._observer is not None:
                wrapped = observe(wrapped, method, self._observer)
            if method not in self._known and len(self._known) >= METHODS:  # a generic handler takes whatever is called
                oldest, *_ = tuple(self._known)
                self._known.pop(oldest, None)
            known = self._known[method] = (handler, wrapped)
        return known[1]


class ServerInterceptor(grpc.ServerInterceptor):
    """What ``mesh.serve`` puts around handlers, for a ``grpc.Server`` of one's own.

    Put it first, so that it stands around the other interceptors' handlers, too. ``gate``: overload protection and load
    reports; none without one.
    """

    def __init__(self, gate: ThreadGate | None = None) -> None:
        self._gate = gate
        self._gated = Wrapped(lambda handler, method: wrap_sync(handler, method, gate))
        self._ungated = Wrapped(wrap_sync)

    def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        mesh_context.enter(arriving(handler_call_details.invocation_metadata))
        if self._gate is not None:
            self._gate.arrivals += 1
        wrapped = self._ungated if method.startswith(UNGATED) else self._gated
        return wrapped(method, continuation(handler_call_details))


class AioServerInterceptor(grpc.aio.ServerInterceptor):
    """What ``mesh.aio.serve`` puts around handlers, for a ``grpc.aio.Server`` of one's own.

    ``pool`` runs the handlers that aren't async (the server's ``migration_thread_pool``; None for the loop's own
    executor). ``gate``: overload protection and load reports; none without one.
    """

    def __init__(self, pool: Executor | None = None, gate: AioGate | None = None) -> None:
        self._gate = gate
        self._gated = Wrapped(lambda handler, method: wrap_aio(handler, method, pool, gate))
        self._ungated = Wrapped(lambda handler, method: wrap_aio(handler, method, pool))

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        mesh_context.enter(arriving(handler_call_details.invocation_metadata))
        if self._gate is not None:
            self._gate.arrivals += 1
        wrapped = self._ungated if method.startswith(UNGATED) else self._gated
        return wrapped(method, await continuation(handler_call_details))
