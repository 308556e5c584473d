"""Stands in for a server while servicers are added to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc

from mesh.observe import ServerObserver
from mesh.server.handlers.interceptors import Wrapped
from mesh.server.handlers.scope import Handler

Servicers = Sequence[tuple[Callable[[Any, Any], object], object]]
"""Pairs of a generated ``add_XServicer_to_server`` and a servicer."""


Arrived = Callable[[grpc.HandlerCallDetails], None]
"""Told of each call that comes in, before its request is read."""


class _Wrapping(grpc.ServiceRpcHandler):
    """A service's handlers, wrapped. gRPC looks here when a call comes in, in the context that its handler will have:
    the call's scope begins here."""

    def __init__(self, handler: grpc.GenericRpcHandler, name: str, wrapped: Wrapped, arrived: Arrived) -> None:
        self._handler = handler
        self._name = name
        self._wrapped = wrapped
        self._arrived = arrived

    def service_name(self) -> str:
        return self._name

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = self._handler.service(handler_call_details)
        if handler is None:
            return None
        self._arrived(handler_call_details)
        return self._wrapped(handler_call_details.method, handler)


class Recorder:
    """Stands in for the server while servicers are added: wraps their handlers, and notes their services' names."""

    def __init__(
        self,
        server: Any,
        wrap: Callable[[Handler, str], Handler],
        arrived: Arrived,
        observer: ServerObserver | None = None,
    ) -> None:
        self._server = server
        self._wrap = wrap
        self._observer = observer
        self._arrived = arrived
        # A dict for its order.
        self._services: dict[str, None] = {}

    @property
    def services(self) -> tuple[str, ...]:
        return tuple(self._services)

    def add(self, servicers: Servicers) -> None:
        for add_to_server, servicer in servicers:
            add_to_server(servicer, self)

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        wrapping = []
        for handler in generic_rpc_handlers:
            name = handler.service_name() if isinstance(handler, grpc.ServiceRpcHandler) else ""
            if name:
                self._services[name] = None
            wrapping.append(_Wrapping(handler, name, Wrapped(self._wrap, self._observer), self._arrived))
        self._server.add_generic_rpc_handlers(wrapping)

    def add_registered_method_handlers(self, service_name: str, method_handlers: dict[str, Handler]) -> None:
        """Note the name alone: generated code adds the same handlers both ways, and the generic way tells when a call
        comes in (and costs an aio server less: it waits for a call of each registered method)."""
        del method_handlers
        self._services[service_name] = None
