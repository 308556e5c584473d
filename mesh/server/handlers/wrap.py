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
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import aclosing
from typing import Any

import grpc

from mesh.context import Scope
from mesh.observe import ServerObserver
from mesh.server.handlers.admitted import (
    aio_gated,
    aio_gated_responses,
    aio_gated_stream,
    sync_gated,
    sync_gated_responses,
)
from mesh.server.handlers.gate import AioGate, Gate, ThreadGate
from mesh.server.handlers.observed import observing
from mesh.server.handlers.parsing import UnparsableError, aio_parsed, kept, raised, sync_parsed
from mesh.server.handlers.scope import AioContext, Behavior, Handler, has_failed, start_scope, status_for, trailers_for
from mesh.server.handlers.threads import async_behavior
from mesh.server.thread_pool import begun

# -- threads ----------------------------------------------------------------------------------------------------------
# grpc runs a handler, and each step of its responses, in one context of its own on one thread: entering the scope once
# is enough. Status and trailers leave when the handler has ended, so they are still to be had when an exception passes
# here.


def _entered(context: grpc.ServicerContext) -> Scope:
    begun()
    scope = start_scope(context)
    # Called however the call ends; a scope that is closed by then cancels nothing.
    if not context.add_callback(scope.cancel):
        scope.cancel()
    return scope


def _sync_done(context: Any, scope: Scope, gate: Gate | None) -> None:
    if scope.exhausted or gate is not None:
        trailers = trailers_for(context.trailing_metadata(), has_failed(context), scope, gate)
        if trailers:
            context.set_trailing_metadata(trailers)


def _sync_raised(behavior: Behavior, error: Exception, context: Any, scope: Scope, gate: Gate | None) -> None:
    """Settle a call whose handler raised; returns when the error is grpc's own to deal with."""
    if scope.exhausted or gate is not None:
        context.set_trailing_metadata(trailers_for(context.trailing_metadata(), True, scope, gate))
    if not context.is_active():  # what a handler raises because its client is gone is no fault of its own
        return
    # context.abort() raises a bare Exception after it has set the code: there is no other public sign of it.
    if type(error) is Exception and not error.args and has_failed(context):
        return
    code, details = status_for(behavior, error, context)
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
    await context.abort(*status_for(behavior, error, context))


def _aio_coroutine(behavior: Behavior, gate: Gate | None) -> Behavior:
    async def handle(request: Any, context: Any) -> Any:
        scope = start_scope(context)
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
        scope = start_scope(context)
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
        trailers = trailers_for(context.trailing_metadata(), has_failed(context), scope, gate)
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
