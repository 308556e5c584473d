"""Validates what is registered: each field of a request.

Pure, except for asking the operating system whether an address is this host's.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import unquote

from mesh.addresses import is_local, parse
from mesh.config.descriptors import unknown_names
from mesh.config.parse import parse as parse_config
from mesh.model import MAX_WEIGHT
from mesh.registry.limits import MAX_CONFIG, MAX_INSTANCE_BYTES, MAX_METADATA, MAX_TEXT
from weft.mesh.v1 import registry_pb2 as pb

Violations = list[tuple[str, str]]
"""Pairs of a field's path and what is wrong with it."""

_IP = ipaddress.IPv4Address | ipaddress.IPv6Address

_FULL_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def instance(given: pb.Instance, peer: str) -> Violations:
    """What is wrong with an instance that ``peer``, as gRPC names it, registers."""
    violations = service("instance.service", given.service)
    if not given.id:
        violations.append(("instance.id", "must be set"))
    violations += _address("instance.address", given.address, peer)
    # These appear in logs and on screens, where line breaks and escape sequences could fake other output.
    names = {
        "instance.id": given.id,
        "instance.locality.region": given.locality.region,
        "instance.locality.zone": given.locality.zone,
        "instance.locality.sub_zone": given.locality.sub_zone,
    }
    violations += [
        (path, "contains an unprintable character") for path, text in names.items() if not text.isprintable()
    ]
    if given.weight > MAX_WEIGHT:
        violations.append(("instance.weight", f"must be from 1 to {MAX_WEIGHT}, or 0 for 1"))
    if len(given.metadata) > MAX_METADATA:
        violations.append(("instance.metadata", f"has more than {MAX_METADATA} labels"))
    texts = {
        **names,
        "instance.address": given.address,
        "instance.metadata": max((text for label in given.metadata.items() for text in label), key=len, default=""),
    }
    violations += [(path, f"is longer than {MAX_TEXT}") for path, text in texts.items() if len(text) > MAX_TEXT]
    if not violations and (size := given.ByteSize()) > MAX_INSTANCE_BYTES:
        violations.append(("instance", f"has {size} bytes; the limit is {MAX_INSTANCE_BYTES}"))
    return violations


def service(path: str, name: str) -> Violations:
    """What is wrong with a service's name, which is in the field ``path``."""
    if len(name) > MAX_TEXT or not _FULL_NAME.fullmatch(name):
        return [(path, 'must be a service\'s full name, such as "weft.user.v1.UserService"')]
    return []


def service_config(name: str, text: str) -> tuple[Violations, tuple[str, ...]]:
    """What is wrong with a service's config, and what in it is unknown and so ignored."""
    violations = service("service", name)
    if not text:
        return violations, ()
    if (size := len(text.encode())) > MAX_CONFIG:
        return [*violations, ("service_config", f"has {size} bytes; the limit is {MAX_CONFIG}")], ()
    try:
        parsed = parse_config(text)
    except ValueError as error:
        # "service config: methodConfig[0].timeout: expected ...", or "service config: not JSON: ..."
        path, _, what = str(error).removeprefix("service config: ").partition(": ")
        found = ("service_config", f"{path}: {what}") if " " in path else (f"service_config.{path}", what)
        return [*violations, found], ()
    return violations, (*parsed.warnings, *unknown_names(parsed, [name]))


def _address(path: str, address: str, peer: str) -> Violations:
    if is_local(address):
        return [] if on_this_host(peer) else [(path, _only_here(f"{address.partition(':')[0]}: address", peer))]
    try:
        host = parse(address).host
    except ValueError as error:
        return [(path, f'must be "host:port", "[ipv6]:port" or "unix:path": {error}')]
    ip = _ip(host)
    if ip is None:
        name = host.rstrip(".").lower()
        kind = "loopback address" if name == "localhost" or name.endswith(".localhost") else ""
    elif ip.is_unspecified:
        return [(path, "must be an address that other hosts can reach, not a wildcard")]
    elif ip.is_multicast or ip == ipaddress.IPv4Address("255.255.255.255"):
        return [(path, "must be the address of one host, not of many")]
    else:
        kind = "loopback address" if ip.is_loopback else "link-local address" if ip.is_link_local else ""
    if kind and not on_this_host(peer):
        return [(path, _only_here(kind, peer))]
    return []


def _only_here(kind: str, peer: str) -> str:
    return (
        f"must be an address that other hosts can reach: a {kind} is accepted only from the registry's own host, and "
        f"{peer} is another host; set MESH_ADVERTISE"
    )


def on_this_host(peer: str) -> bool:
    """Whether a peer, as gRPC names it (``ipv4:10.0.0.1:4711``), runs on this host."""
    scheme, _, rest = unquote(peer).partition(":")
    if scheme not in ("ipv4", "ipv6"):
        return scheme in ("unix", "unix-abstract")
    host = rest.rpartition(":")[0].strip("[]")
    ip = _ip(host)
    if ip is None:
        return False
    if ip.is_loopback:
        return True
    # The peer may use any of its host's addresses; only this host's can be bound.
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(socket.getaddrinfo(host if ip.version == 6 else str(ip), 0, family, socket.SOCK_DGRAM)[0][4])
        except OSError:
            return False
    return True


def _ip(host: str) -> _IP | None:
    """``host`` as an IP address, in any form that resolvers accept (``127.1``, ``0x7f000001``); None for a name."""
    try:
        ip: _IP = ipaddress.ip_address(host)
    except ValueError:
        try:
            ip = ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return None
    return ip.ipv4_mapped or ip if isinstance(ip, ipaddress.IPv6Address) else ip
