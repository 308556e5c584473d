"""The wrapper around each handler: the inbound call's scope, and a proper status for whatever goes wrong.

Each handler, of any kind, threaded or asyncio, runs inside a ``mesh.context.Scope``. So ``mesh.remaining()`` returns
the time left for the inbound call, and the calls that the handler makes inherit its deadline, its cancellation and the
chain stop. An exception becomes INTERNAL with an id that is also logged; nothing else of it reaches the caller. When a
handler fails after a call made for it used up its retries, its caller gets "don't retry" (``grpc-retry-pushback-ms:
-1``, gRFC A6), so that retries don't multiply down a call tree.

``mesh.serve`` wraps handlers when they are registered, so no interceptor runs per call. For a ``grpc.Server`` of your
own there are ``ServerInterceptor`` and ``AioServerInterceptor``.

A wrapped handler keeps its kind and its serializer. A callback handler (``experimental_non_blocking``: the health
service's Watch) is not wrapped.
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
from mesh.server.handlers.admission import AioServerAdmission, ServerAdmission, ThreadServerAdmission
from mesh.server.handlers.admitted import (
    aio_admitted,
    aio_admitted_responses,
    aio_admitted_stream,
    sync_admitted,
    sync_admitted_responses,
)
from mesh.server.handlers.observed import observing
from mesh.server.handlers.parsing import (
    UnparsableError,
    aio_parsed,
    parse_or_raise,
    parse_or_sentinel,
    sync_parsed,
)
from mesh.server.handlers.scope import (
    AioContext,
    Behavior,
    Handler,
    has_failed,
    set_trailers,
    start_scope,
    status_for,
    trailers_for,
)
from mesh.server.handlers.threads import async_behavior
from mesh.server.thread_pool import mark_handler_started

# -- threads ----------------------------------------------------------------------------------------------------------
# grpc runs a handler, and each step of its responses, in one context on one thread: entering the scope once is enough.
# Status and trailers are sent after the handler has ended, so they can still be set when an exception passes here.


def _enter_scope(context: grpc.ServicerContext) -> Scope:
    mark_handler_started()
    scope = start_scope(context)
    # Called however the call ends; cancelling a closed scope does nothing.
    if not context.add_callback(scope.cancel):
        scope.cancel()
    return scope


def _sync_error(
    behavior: Behavior, error: Exception, context: Any, scope: Scope, admission: ServerAdmission | None
) -> None:
    """End a call whose handler raised; returns if grpc deals with the error itself."""
    if scope.exhausted or admission is not None:
        context.set_trailing_metadata(trailers_for(context.trailing_metadata(), True, scope, admission))
    if not context.is_active():  # the client has gone: its handler may raise
        return
    # context.abort() raises a bare Exception after it has set the code; there is no other public sign of it.
    if type(error) is Exception and not error.args and has_failed(context):
        return
    code, details = status_for(behavior, error, context)
    context.abort(code, details)


def _sync_response(behavior: Behavior, admission: ServerAdmission | None) -> Behavior:
    def handle(request: Any, context: Any) -> Any:
        scope = _enter_scope(context)
        try:
            response = behavior(request, context)
        except Exception as error:
            _sync_error(behavior, error, context, scope, admission)
            raise
        finally:
            scope.close()
        set_trailers(context, scope, admission)
        return response

    return handle


def _sync_responses(behavior: Behavior, admission: ServerAdmission | None) -> Behavior:
    def handle(request: Any, context: Any) -> Iterator[Any]:
        scope = _enter_scope(context)
        try:
            yield from behavior(request, context)
        except Exception as error:
            _sync_error(behavior, error, context, scope, admission)
            raise
        finally:
            scope.close()
        set_trailers(context, scope, admission)

    return handle


# -- asyncio ----------------------------------------------------------------------------------------------------------
# Each call has its own task, hence its own context. abort() sends status and trailers before it raises, so AioContext
# adds the trailers.


async def _aio_error(behavior: Behavior, error: BaseException, context: AioContext, scope: Scope) -> None:
    """End a call whose handler raised; returns if grpc deals with the error itself."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        scope.cancel()
    if not isinstance(error, Exception):
        return
    if context.done():  # aborted: the status has been sent
        return
    if isinstance(error, UnparsableError):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    if isinstance(error, grpc.aio.BaseError) and not isinstance(error, grpc.aio.UsageError):
        scope.cancel()  # a message couldn't be sent or received: the client has gone
        return
    await context.abort(*status_for(behavior, error, context))


def _aio_response(behavior: Behavior, admission: ServerAdmission | None) -> Behavior:
    async def handle(request: Any, context: Any) -> Any:
        scope = start_scope(context)
        wrapped = AioContext(context, scope, admission)
        try:
            response = await behavior(request, wrapped)
        except BaseException as error:
            await _aio_error(behavior, error, wrapped, scope)
            raise
        finally:
            scope.close()
        set_trailers(context, scope, admission)
        return response

    return handle


def _aio_responses(behavior: Behavior, admission: ServerAdmission | None) -> Behavior:
    async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
        scope = start_scope(context)
        wrapped = AioContext(context, scope, admission)
        try:
            async with aclosing(behavior(request, wrapped)) as responses:
                async for response in responses:
                    yield response
        except BaseException as error:
            await _aio_error(behavior, error, wrapped, scope)
            raise
        finally:
            scope.close()
        set_trailers(context, scope, admission)

    return handle


# -- both -------------------------------------------------------------------------------------------------------------


def rebuilt(
    handler: Handler,
    wrap: Callable[[Behavior], Behavior],
    parse: Callable[..., Any] = lambda deserializer: deserializer,
) -> Handler:
    """``handler`` with its behavior and its parser wrapped: the same kind, the same serializer."""
    serializers = (handler.request_deserializer and parse(handler.request_deserializer), handler.response_serializer)
    if handler.request_streaming:
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(wrap(handler.stream_stream), *serializers)
        return grpc.stream_unary_rpc_method_handler(wrap(handler.stream_unary), *serializers)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(wrap(handler.unary_stream), *serializers)
    return grpc.unary_unary_rpc_method_handler(wrap(handler.unary_unary), *serializers)


# Order, from the handler out: parsing is innermost, because it only checks what the handler reads; admission is above
# it, because a call that waits should still learn that its request is invalid; the scope is above both, because
# admission needs the deadline, and errors from anywhere below become a status there.


def wrap_sync(handler: Handler, method: str = "", admission: ThreadServerAdmission | None = None) -> Handler:
    """``handler``, of a ``grpc.Server``, inside its inbound call's scope and behind ``admission``.

    ``method``: its full name.
    """
    is_stream = handler.request_streaming or handler.response_streaming

    def wrap(behavior: Behavior) -> Behavior:
        if getattr(behavior, "experimental_non_blocking", False):
            return behavior
        wrapped = behavior
        if handler.request_deserializer is not None:
            wrapped = sync_parsed(wrapped, request_streaming=handler.request_streaming)
        if admission is not None:
            admitted = sync_admitted_responses if handler.response_streaming else sync_admitted
            wrapped = admitted(wrapped, method.lstrip("/"), admission, is_stream=is_stream)
        wrapped = (_sync_responses if handler.response_streaming else _sync_response)(wrapped, admission)
        pool = getattr(behavior, "experimental_thread_pool", None)
        if pool is not None:
            wrapped.experimental_thread_pool = pool  # type: ignore[attr-defined]
        return wrapped

    return rebuilt(handler, wrap, parse_or_sentinel)


def wrap_aio(
    handler: Handler, method: str = "", pool: Executor | None = None, admission: AioServerAdmission | None = None
) -> Handler:
    """``handler``, of a ``grpc.aio.Server``, inside its inbound call's scope and behind ``admission``.

    ``method``: its full name. A handler that isn't async runs in ``pool``.
    """
    is_stream = handler.request_streaming or handler.response_streaming

    def wrap(behavior: Behavior) -> Behavior:
        if not (inspect.isasyncgenfunction(behavior) or inspect.iscoroutinefunction(behavior)):
            behavior = async_behavior(
                behavior,
                pool,
                request_streaming=handler.request_streaming,
                response_streaming=handler.response_streaming,
            )
        # grpc and the interceptors of a server look at what kind of function a handler is: each wrapper keeps it.
        generates = inspect.isasyncgenfunction(behavior)
        wrapped = behavior
        if handler.request_deserializer is not None and not handler.request_streaming:
            wrapped = aio_parsed(wrapped)
        if admission is not None:
            admitted = aio_admitted_responses if generates else aio_admitted_stream if is_stream else aio_admitted
            wrapped = admitted(wrapped, method.lstrip("/"), admission)
        return (_aio_responses if generates else _aio_response)(wrapped, admission)

    # A stream's messages are parsed when its handler reads them, so the parser may raise.
    return rebuilt(handler, wrap, parse_or_raise if handler.request_streaming else parse_or_sentinel)


def observe(handler: Handler, method: str, observer: ServerObserver) -> Handler:
    """``handler``, wrapped already, reporting its calls to ``observer``."""
    behavior = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    if getattr(behavior, "experimental_non_blocking", False):
        return handler
    wrap = observing(observer, method)

    def observed(behavior: Behavior) -> Behavior:
        wrapped = wrap(behavior)
        wrapped.__dict__.update(behavior.__dict__)  # its experimental_thread_pool
        return wrapped

    return rebuilt(handler, observed, lambda parse: parse)
