"""Where a server listens, and the address that clients are given for it."""

from __future__ import annotations

import socket
from typing import Any

from mesh.addresses import Address, is_local, parse
from mesh.listening import Listener, bind
from mesh.server.settings import ServerSettings


def listen(server: Any, settings: ServerSettings) -> Listener:
    """Have ``server`` listen where the settings say. Raises OSError, saying what is in the way."""
    return bind(server, settings.listen, share=bool(dict(settings.server_options()).get("grpc.so_reuseport")))


def advertised(settings: ServerSettings, port: int) -> str:
    """The address that clients are given for a server that listens on ``port``."""
    told = settings.advertise or settings.listen
    if is_local(told):
        return told
    address = parse(told, port=0, min_port=0)
    if settings.advertise:
        return str(address._replace(port=address.port or port))
    return str(Address(_own_host(settings.registry) if address.is_wildcard else address.host, port))


def listening(listen: str, port: int, address: str) -> str:
    """Where a server listens, for people: its address, and the one that clients are given where that is another."""
    bound = listen if is_local(listen) else str(parse(listen, min_port=0)._replace(port=port))
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
