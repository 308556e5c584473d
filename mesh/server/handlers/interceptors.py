"""Interceptors that give the handlers of a server of one's own what ``mesh.serve`` gives its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import grpc

from mesh import context as mesh_context
from mesh.observe import ServerObserver
from mesh.server.handlers.gate import UNGATED, AioGate, ThreadGate
from mesh.server.handlers.scope import Handler, arriving
from mesh.server.handlers.wrap import observe, wrap_aio, wrap_sync

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
