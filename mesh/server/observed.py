"""Handlers whose calls a ``mesh.observe.ServerObserver`` is told of, around all else that stands around them: how a
call ends is settled by then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from mesh import context as mesh_context
from mesh.context import REFUSED
from mesh.observe import ServerObserver

Behavior = Callable[..., Any]
Wrap = Callable[[Behavior], Behavior]


def observing(observer: ServerObserver, method: str, *, is_aio: bool, response_streaming: bool) -> Wrap:
    """What wraps the handler of ``method``, so that ``observer`` is told of its calls."""

    @contextmanager
    def observed(context: Any) -> Iterator[None]:
        started = time.monotonic()
        REFUSED.set("")
        failed = True
        try:
            yield
            failed = False
        finally:
            reason, code = REFUSED.get(), _code(context, failed)
            try:
                if reason:
                    observer.refused(method, reason)
                else:
                    observer.handled(method, code, time.monotonic() - started)
            except Exception as error:
                logging.getLogger("mesh.server").error("the observer failed, for %s", method, exc_info=error)

    def wrap(behavior: Behavior) -> Behavior:
        async def aio(request: Any, context: Any) -> Any:
            with observed(context):
                return await behavior(request, context)

        def sync(request: Any, context: Any) -> Any:
            with observed(context):
                return behavior(request, context)

        def sync_responses(request: Any, context: Any) -> Iterator[Any]:
            with observed(context):
                yield from behavior(request, context)

        return aio if is_aio else sync_responses if response_streaming else sync

    return wrap


def _code(context: Any, failed: bool) -> int:
    """The status that a call ends with; ``failed``: its handler raised."""
    is_aio = isinstance(context, grpc.aio.ServicerContext) or not hasattr(context, "is_active")
    gone = context.cancelled() if is_aio else not context.is_active()
    code = context.code()
    number = int(code.value[0] if isinstance(code, grpc.StatusCode) else code or 0)
    # Whatever else was raised has been aborted with a status: without one, the client is gone.
    if gone or (failed and number == 0):
        scope = mesh_context.current()
        late = scope is not None and scope.deadline is not None and time.monotonic() >= scope.deadline
        return int((grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED).value[0])
    return number
