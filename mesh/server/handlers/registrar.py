"""Registering handlers: servicers are added to a ``HandlerRegistrar``, which wraps their handlers for the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc

from mesh.observe import ServerObserver
from mesh.server.handlers.scope import Handler
from mesh.server.handlers.wrap import observe

Servicers = Sequence[tuple[Callable[[Any, Any], object], object]]
"""Pairs of a generated ``add_XServicer_to_server`` and a servicer."""

OnArrival = Callable[[grpc.HandlerCallDetails], None]
"""Called for each call that arrives, before its request is read."""

CACHE_SIZE = 1000
"""Methods whose wrapped handlers are cached. Beyond it the oldest is dropped, and wrapped again at its next call."""


class HandlerCache:
    """Wrapped handlers by method, each wrapped at its first call. Calls go to ``observer``, if given."""

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
            if method not in self._known and len(self._known) >= CACHE_SIZE:  # a generic handler takes any method
                oldest, *_ = tuple(self._known)
                self._known.pop(oldest, None)
            known = self._known[method] = (handler, wrapped)
        return known[1]


class _WrappedService(grpc.ServiceRpcHandler):
    """A service's handlers, wrapped. gRPC looks handlers up here when a call arrives, in the context that the handler
    will have: the call's scope begins here."""

    def __init__(self, handler: grpc.GenericRpcHandler, name: str, cache: HandlerCache, on_arrival: OnArrival) -> None:
        self._handler = handler
        self._name = name
        self._cache = cache
        self._on_arrival = on_arrival

    def service_name(self) -> str:
        return self._name

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = self._handler.service(handler_call_details)
        if handler is None:
            return None
        self._on_arrival(handler_call_details)
        return self._cache(handler_call_details.method, handler)


class HandlerRegistrar:
    """Takes the server's place while servicers are added: wraps their handlers and records their services' names."""

    def __init__(
        self,
        server: Any,
        wrap: Callable[[Handler, str], Handler],
        on_arrival: OnArrival,
        observer: ServerObserver | None = None,
    ) -> None:
        self._server = server
        self._wrap = wrap
        self._observer = observer
        self._on_arrival = on_arrival
        # A dict for its order.
        self._services: dict[str, None] = {}

    @property
    def services(self) -> tuple[str, ...]:
        return tuple(self._services)

    def add(self, servicers: Servicers) -> None:
        for add_to_server, servicer in servicers:
            add_to_server(servicer, self)

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        services = []
        for handler in generic_rpc_handlers:
            name = handler.service_name() if isinstance(handler, grpc.ServiceRpcHandler) else ""
            if name:
                self._services[name] = None
            services.append(_WrappedService(handler, name, HandlerCache(self._wrap, self._observer), self._on_arrival))
        self._server.add_generic_rpc_handlers(services)

    def add_registered_method_handlers(self, service_name: str, method_handlers: dict[str, Handler]) -> None:
        """Record the name only: generated code adds the same handlers in both ways. The generic way sees calls arrive,
        and is cheaper on an aio server, which waits for a call of each registered method."""
        del method_handlers
        self._services[service_name] = None
