"""The parser for addresses: what servers listen on and advertise, what instances register, and what targets and
``MESH_REGISTRY`` name.

``host:port``, ``[ipv6]:port``, ``[ipv6%zone]:port``; where the port is optional, also a host alone, which may be an
IPv6 address with or without brackets (as in gRPC, more than one colon without brackets is an IPv6 address). Local
sockets are written as gRPC's targets: ``unix:path``, ``unix-abstract:name``, ``vsock:cid:port``.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

TARGET_SCHEMES = ("dns", "unix", "unix-abstract", "vsock", "ipv4", "ipv6", "xds", "google-c2p")
"""The schemes of gRPC's own targets."""

FORMS = "host:port, [ipv6]:port or unix:path"

_LOCAL = re.compile(r"(unix|unix-abstract|vsock):\S+")
_TARGET = re.compile(rf"({'|'.join(TARGET_SCHEMES)}):(?!\d+$)\S+")
_NAME = re.compile(r"[^\s:/,\[\]%@]+")
_FOUR_NUMBERS = re.compile(r"\d+(\.\d+){3}", re.ASCII)
_PORT = re.compile(r"\d{1,5}", re.ASCII)
_ZONE = re.compile(r"[^\s/\[\]%]+")


class Address(NamedTuple):
    """A host, without brackets, and a port."""

    host: str
    port: int

    @property
    def is_wildcard(self) -> bool:
        """Whether this means all of a machine's addresses: to listen on, not to call."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_local(text: str) -> bool:
    """Whether this is a local socket: ``unix:path`` and the like."""
    return text.isprintable() and _LOCAL.fullmatch(text) is not None


def is_ip(host: str) -> bool:
    """Whether a host, without brackets, is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def parse(text: str, *, port: int | None = None, min_port: int = 1) -> Address:
    """Parse an address. ``port``: the default port; None where a port is required.

    Raises ValueError, which says what is wrong and how to write it.
    """
    if not text.isprintable():
        raise ValueError(f"{text!r} contains an unprintable character")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or rest[:1] not in ("", ":"):
            raise ValueError("expected [ipv6]:port")
        _check_ipv6(host)
        colon, given = rest[:1], rest[1:]
    elif text.count(":") > 1:
        host, colon, given = text, "", ""
        before, _, after = text.rpartition(":")
        try:
            _check_ipv6(host)
        except ValueError:
            if _PORT.fullmatch(after) and is_ip(before):
                raise ValueError(f"an IPv6 address with a port is written [{before}]:{after}") from None
            raise
    else:
        host, colon, given = text.partition(":")
        if not _NAME.fullmatch(host):
            raise ValueError(f"{host!r} is not a host name")
        if _FOUR_NUMBERS.fullmatch(host) and not is_ip(host):
            raise ValueError(f"{host!r} is not an IPv4 address")
    if not colon:
        if port is None:
            raise ValueError("missing port" + (f"; write [{host}]:50051" if ":" in host else ""))
        return Address(host, port)
    if not _PORT.fullmatch(given) or not min_port <= int(given) <= 65535:
        raise ValueError(f"the port must be a number from {min_port} to 65535")
    return Address(host, int(given))


def check_target(text: str) -> None:
    """Raise ValueError unless ``text`` is an address, or another target that gRPC accepts (``dns:///name:port``)."""
    if not (text.isprintable() and _TARGET.fullmatch(text)):
        parse(text)


def _check_ipv6(host: str) -> None:
    address, percent, zone = host.partition("%")
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        raise ValueError(f"{host!r} is not an IPv6 address") from None
    if percent and not _ZONE.fullmatch(zone):
        raise ValueError(f"{zone!r} is not the name of a network interface")
