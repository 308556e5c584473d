"""Interceptors that give the handlers of your own server what ``mesh.serve`` gives its own."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import grpc

from mesh import context as mesh_context
from mesh import deprecation
from mesh.server.handlers.admission import EXEMPT, AioServerAdmission, ThreadServerAdmission
from mesh.server.handlers.registrar import HandlerCache
from mesh.server.handlers.scope import scope_from_metadata
from mesh.server.handlers.wrap import wrap_aio, wrap_sync


class ServerInterceptor(grpc.ServerInterceptor):
    """What ``mesh.serve`` does for handlers, for a ``grpc.Server`` of your own.

    Put it first, so that it wraps the handlers of the other interceptors, too. ``admission``: overload protection and
    load reports; neither without it.
    """

    def __init__(
        self, admission: ThreadServerAdmission | None = None, *, gate: ThreadServerAdmission | None = None
    ) -> None:
        admission = deprecation.renamed("ServerInterceptor", "gate", gate, "admission", admission)
        self._admission = admission
        self._admitted = HandlerCache(lambda handler, method: wrap_sync(handler, method, admission))
        self._exempt = HandlerCache(wrap_sync)

    def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        mesh_context.enter(scope_from_metadata(handler_call_details.invocation_metadata))
        if self._admission is not None:
            self._admission.arrivals += 1
        handlers = self._exempt if method.startswith(EXEMPT) else self._admitted
        return handlers(method, continuation(handler_call_details))


class AioServerInterceptor(grpc.aio.ServerInterceptor):
    """What ``mesh.aio.serve`` does for handlers, for a ``grpc.aio.Server`` of your own.

    ``pool`` runs the handlers that aren't async (the server's ``migration_thread_pool``; None for the loop's default
    executor). ``admission``: overload protection and load reports; neither without it.
    """

    def __init__(
        self,
        pool: Executor | None = None,
        admission: AioServerAdmission | None = None,
        *,
        gate: AioServerAdmission | None = None,
    ) -> None:
        admission = deprecation.renamed("AioServerInterceptor", "gate", gate, "admission", admission)
        self._admission = admission
        self._admitted = HandlerCache(lambda handler, method: wrap_aio(handler, method, pool, admission))
        self._exempt = HandlerCache(lambda handler, method: wrap_aio(handler, method, pool))

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        mesh_context.enter(scope_from_metadata(handler_call_details.invocation_metadata))
        if self._admission is not None:
            self._admission.arrivals += 1
        handlers = self._exempt if method.startswith(EXEMPT) else self._admitted
        return handlers(method, await continuation(handler_call_details))
