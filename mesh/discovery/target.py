"""Target parsing: which resolver a target uses, the mesh's or gRPC's.

The mesh resolves ``mesh:///SERVICE`` and ``mesh://REGISTRY/SERVICE``, ``static:///HOST:PORT,HOST:PORT``,
``dns:///HOST:PORT``, and ``dns:///_SERVICE._PROTO.NAME`` for SRV records. Every other target that grpc accepts
(``host:port``, ``ipv4:``, ``unix:``, ``xds:``, ``dns://SERVER/HOST``, ...) is resolved by gRPC. Source: gRPC's naming
document, for its targets and the default port.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote

from mesh.addresses import FORMS, TARGET_SCHEMES, check_target, is_local, parse
from mesh.discovery.cache import Cache
from mesh.discovery.dns import DnsResolver
from mesh.discovery.registry import RegistryResolver
from mesh.discovery.resolver import Resolver
from mesh.discovery.srv import SrvResolver
from mesh.discovery.static import StaticResolver

REGISTRY_VARIABLE = "MESH_REGISTRY"
"""The environment variable with the registry for ``mesh:///``: ``host:port``, or any target that gRPC accepts."""

DEFAULT_PORT = 443
"""gRPC's own default port."""

OWN_SCHEMES = ("mesh", "static", "dns")

_URI = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?P<authority>[^/]*)(/(?P<path>.*))?", re.ASCII)
_SRV = re.compile(r"_[A-Za-z0-9-]+\._[A-Za-z]+\.(?P<domain>\S+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed target.

    ``text``: the target as given.
    ``scheme``: ``mesh``, ``static`` or ``dns`` when the mesh resolves it; empty when gRPC does.
    ``health_service``: the service name for health checks, unless the service config sets one: the service for
    ``mesh``; None for others, which have no health checks.
    ``authority``: the name that the endpoints' certificates must have: the service for ``mesh``, the name for ``dns``
    (for SRV records, their domain); None when it is each endpoint's own address.
    """

    text: str
    scheme: str = ""
    health_service: str | None = None
    authority: str | None = None


LISTED = 2
"""How many of a target's addresses log lines and errors show."""


def short_target(text: str) -> str:
    """A target for log lines and errors: only the first two of many addresses."""
    addresses = text.split(",")
    more = len(addresses) - LISTED
    return f"{','.join(addresses[:LISTED])} (+{more} more)" if more > 0 else text


def resolver_for(text: str) -> tuple[Target, Resolver | None]:
    """Parse a target and make its resolver; None when gRPC resolves it, as one endpoint.

    Does no IO. Reads ``MESH_REGISTRY`` if the target needs it. Raises ValueError, with the reason, for a target that
    neither the mesh nor gRPC accepts.
    """
    uri = _URI.fullmatch(text)
    if uri is None:
        own = re.match(r"(mesh|static):(?!\d+$)", text)
        if own:
            raise ValueError(f"target {text!r}: write {own[1]}:///...")
        return Target(text), None
    scheme, authority, path = uri["scheme"].lower(), uri["authority"], unquote(uri["path"] or "")
    if scheme == "mesh":
        return Target(text, scheme, health_service=path, authority=path), _mesh(text, authority, path)
    if scheme == "static":
        return Target(text, scheme), _static(text, authority, path)
    if scheme == "dns" and not authority and (srv := _SRV.fullmatch(path)):
        return Target(text, scheme, authority=srv["domain"]), _srv(text, path)
    if scheme == "dns" and not authority:
        return Target(text, scheme, authority=path), _dns(text, path)
    if scheme in TARGET_SCHEMES:
        return Target(text), None
    known = ", ".join(dict.fromkeys(OWN_SCHEMES + TARGET_SCHEMES))
    raise ValueError(f"target {text!r}: unknown scheme {scheme!r}; known: {known}, and host:port")


def _mesh(text: str, authority: str, service: str) -> Resolver:
    if not service and authority and ":" not in authority:
        raise ValueError(f"target {text!r}: write three slashes, mesh:///{authority}")
    if not service or "/" in service:
        raise ValueError(f"target {text!r}: name a service, as in mesh:///weft.user.v1.UserService")
    registry = authority or os.environ.get(REGISTRY_VARIABLE, "")
    if not registry:
        raise ValueError(
            f"target {text!r}: no registry; set {REGISTRY_VARIABLE}=host:port, or write mesh://host:port/{service}"
        )
    try:
        if authority:
            parse(authority)
        else:
            check_target(registry)
    except ValueError as error:
        raise ValueError(f"target {text!r}: the registry must be host:port, not {registry!r}: {error}") from None
    return RegistryResolver(registry, service, cache=Cache.from_environment(registry, service))


def _static(text: str, authority: str, path: str) -> Resolver:
    if authority:
        raise ValueError(f"target {text!r}: write three slashes, static:///{authority}")
    addresses = [address.strip() for address in path.split(",") if address.strip()]
    if not addresses:
        raise ValueError(f"target {text!r}: no addresses; write static:///10.0.0.1:50051,10.0.0.2:50051")
    for address in addresses:
        try:
            if not is_local(address):
                parse(address, min_port=0)  # grpc accepts port 0
        except ValueError as error:
            raise ValueError(f"target {text!r}: {address!r} is not {FORMS}: {error}") from None
    return StaticResolver(addresses)


def _dns(text: str, path: str) -> Resolver:
    try:
        return DnsResolver(*parse(path, port=DEFAULT_PORT))
    except ValueError as error:
        raise ValueError(f"target {text!r}: {path!r} is not host or host:port: {error}") from None


def _srv(text: str, name: str) -> Resolver:
    if ":" in name:
        raise ValueError(f"target {text!r}: SRV records have their own ports; remove the port")
    try:
        return SrvResolver(name)
    except ImportError:
        raise ValueError(f"target {text!r}: SRV records need dnspython; install weft[dns]") from None
