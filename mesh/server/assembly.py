"""What a server is put together from, in both worlds: servicers and their names, an address, the registry's entry."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc

from mesh.addresses import Address, is_local, parse
from mesh.listening import Listener, bind
from mesh.observe import ServerObserver
from mesh.server.deadlines import LOG, Handler, Wrapped
from mesh.server.settings import ServerSettings
from weft.mesh.v1 import registry_pb2 as pb

Servicers = Sequence[tuple[Callable[[Any, Any], object], object]]
"""Pairs of a generated ``add_XServicer_to_server`` and a servicer."""

Arrived = Callable[[grpc.HandlerCallDetails], None]
"""Told of each call that comes in, before its request is read."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What ends a server: the first in good order, the second at once."""

BAD_START = 2
"""The exit code when a server can't start as it was told to."""


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


def add_reflection(services: Iterable[str], server: Any, settings: ServerSettings) -> None:
    """Have the server describe its services, where that is asked for and grpcio-reflection is there."""
    if not settings.reflection:
        return
    try:
        from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]
    except ImportError:
        LOG.warning("reflection is asked for, but grpcio-reflection isn't installed; serving without it")
        return
    reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], server)


def add_channelz(server: Any, settings: ServerSettings) -> None:
    """Have the server tell of its connections and calls, where grpcio-channelz is there."""
    if not settings.channelz:
        return
    try:
        from grpc_channelz.v1 import channelz  # type: ignore[import-untyped]
    except ImportError:
        return
    channelz.add_channelz_servicer(server)


def listen(server: Any, settings: ServerSettings) -> Listener:
    """Have ``server`` listen where the settings say. Raises OSError, saying what is in the way."""
    return bind(server, settings.listen, share=bool(dict(settings.server_options()).get("grpc.so_reuseport")))


def advertised(settings: ServerSettings, port: int) -> str:
    """The address that clients are given for a server that listens on ``port``."""
    told = settings.advertise or settings.listen
    if is_local(told):
        return told
    address = parse(told, port=0, least_port=0)
    if settings.advertise:
        return str(address._replace(port=address.port or port))
    return str(Address(_own_host(settings.registry) if address.is_wildcard else address.host, port))


def listening(listen: str, port: int, address: str) -> str:
    """Where a server listens, for people: its address, and the one that clients are given where that is another."""
    bound = listen if is_local(listen) else str(parse(listen, least_port=0)._replace(port=port))
    return bound if bound == address else f"{bound}, advertised as {address}"


def _own_host(registry: str) -> str:
    """This machine's address on the way to ``registry``: what a UDP socket gets that is connected and sends nothing."""
    try:
        there = parse(registry) if registry else Address(socket.gethostname(), 9)
        family, kind, protocol, _, address = socket.getaddrinfo(*there, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as route:
            route.connect(address)
            return str(route.getsockname()[0])
    except (OSError, ValueError):
        return socket.gethostname()


def instances(services: Iterable[str], settings: ServerSettings, address: str) -> list[pb.Instance]:
    """What the registry is told: an instance for each service, under one id."""
    return [
        pb.Instance(
            id=settings.instance_id or address,
            service=service,
            address=address,
            locality=pb.Locality(region=settings.region, zone=settings.zone, sub_zone=settings.sub_zone),
            weight=settings.weight,
            metadata=settings.metadata,
        )
        for service in services
    ]
