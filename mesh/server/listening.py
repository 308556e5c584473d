"""Where a server listens, and the address that it advertises."""

from __future__ import annotations

import socket
from typing import Any

from mesh.addresses import Address, is_local, parse
from mesh.listening import Listener, bind
from mesh.server.settings import ServerSettings


def listen(server: Any, settings: ServerSettings) -> Listener:
    """Have ``server`` listen where the settings say. Raises OSError with the reason if it can't."""
    return bind(server, settings.listen, share=bool(dict(settings.server_options()).get("grpc.so_reuseport")))


def advertised_address(settings: ServerSettings, port: int) -> str:
    """The address that clients get for a server that listens on ``port``."""
    target = settings.advertise or settings.listen
    if is_local(target):
        return target
    address = parse(target, port=0, min_port=0)
    if settings.advertise:
        return str(address._replace(port=address.port or port))
    return str(Address(_own_host(settings.registry) if address.is_wildcard else address.host, port))


def display_address(listen: str, port: int, address: str) -> str:
    """Where a server listens, for people: its address, and the advertised one if that differs."""
    bound = listen if is_local(listen) else str(parse(listen, min_port=0)._replace(port=port))
    return bound if bound == address else f"{bound}, advertised as {address}"


def _own_host(registry: str) -> str:
    """This machine's address on the route to ``registry``: a UDP socket gets it on connecting, without sending."""
    try:
        there = parse(registry) if registry else Address(socket.gethostname(), 9)
        family, kind, protocol, _, address = socket.getaddrinfo(*there, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as route:
            route.connect(address)
            return str(route.getsockname()[0])
    except (OSError, ValueError):
        return socket.gethostname()
