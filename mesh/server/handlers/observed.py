"""Handlers that report their calls to a ``mesh.observe.ServerObserver``. This is the outermost wrapper: inside it a
call's status is final."""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from mesh import context as mesh_context
from mesh.context import REFUSAL_REASON, Scope
from mesh.observe import ServerObserver
from mesh.server.handlers.scope import LOG, Behavior

Wrap = Callable[[Behavior], Behavior]


def observing(observer: ServerObserver, method: str) -> Wrap:
    """A wrapper for the handler of ``method`` that reports its calls to ``observer``. It keeps the handler's kind."""

    @contextmanager
    def observed(context: Any) -> Iterator[None]:
        started = time.monotonic()
        REFUSAL_REASON.set("")
        scope = mesh_context.inbound()  # now: a generator may be closed in another context
        raised = True
        try:
            yield
            raised = False
        finally:
            reason, code = REFUSAL_REASON.get(), _code(context, scope, raised)
            try:
                if reason:
                    observer.refused(method, reason)
                else:
                    observer.handled(method, code, time.monotonic() - started)
            except Exception as error:
                LOG.error("the observer failed for %s", method, exc_info=error)

    def wrap(behavior: Behavior) -> Behavior:
        async def aio(request: Any, context: Any) -> Any:
            with observed(context):
                return await behavior(request, context)

        async def aio_responses(request: Any, context: Any) -> AsyncIterator[Any]:
            with observed(context):
                async with aclosing(behavior(request, context)) as responses:
                    async for response in responses:
                        yield response

        def sync(request: Any, context: Any) -> Any:
            with observed(context):
                return behavior(request, context)

        def sync_responses(request: Any, context: Any) -> Iterator[Any]:
            with observed(context):
                yield from behavior(request, context)

        if inspect.isasyncgenfunction(behavior):
            return aio_responses
        if inspect.iscoroutinefunction(behavior):
            return aio
        return sync_responses if inspect.isgeneratorfunction(behavior) else sync

    return wrap


def _code(context: Any, scope: Scope | None, raised: bool) -> int:
    """The status of a call of ``scope``. ``raised``: its handler raised."""
    is_aio = isinstance(context, grpc.aio.ServicerContext) or not hasattr(context, "is_active")
    cancelled = context.cancelled() if is_aio else not context.is_active()
    code = context.code()
    number = int(code.value[0] if isinstance(code, grpc.StatusCode) else code or 0)
    # Errors of handlers have become a status by now; if one raised and there is none, the client has gone.
    if cancelled or (raised and number == 0):
        late = scope is not None and scope.deadline is not None and time.monotonic() >= scope.deadline
        return int((grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED).value[0])
    return number
