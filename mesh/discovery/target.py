"""What a target means: which resolver finds its endpoints, or that gRPC itself does.

The mesh's own: ``mesh:///SERVICE`` and ``mesh://REGISTRY/SERVICE``, ``static:///HOST:PORT,HOST:PORT``,
``dns:///HOST:PORT``, and ``dns:///_SERVICE._PROTO.NAME`` for SRV records. Every other target that grpc takes
(``host:port``, ``ipv4:``, ``unix:``, ``xds:``, ``dns://SERVER/HOST``, ...) is gRPC's. Source: gRPC's naming document,
for what gRPC takes and for the default port.
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
"""The environment variable that names the registry for ``mesh:///``: ``host:port``, or any target that gRPC takes."""

DEFAULT_PORT = 443
"""gRPC's own default port."""

OWN_SCHEMES = ("mesh", "static", "dns")

_URI = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?P<authority>[^/]*)(/(?P<path>.*))?", re.ASCII)
_SRV = re.compile(r"_[A-Za-z0-9-]+\._[A-Za-z]+\.(?P<domain>\S+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Target:
    """A target, taken apart.

    ``text``: as it was given.
    ``scheme``: ``mesh``, ``static`` or ``dns`` when a resolver of the mesh finds its endpoints; empty when gRPC does.
    ``health_service``: the name whose health the endpoints must report unless the service config says otherwise: the
    service for ``mesh``; None for others, whose health isn't watched.
    ``authority``: whom the endpoints' certificates must name: the service for ``mesh``, the name for ``dns`` (of SRV
    records the domain that has them); None when each endpoint's own address is that.
    """

    text: str
    scheme: str = ""
    health_service: str | None = None
    authority: str | None = None


LISTED = 2
"""How many addresses of a target log lines and errors repeat."""


def in_short(text: str) -> str:
    """A target as log lines and errors name it: of many addresses the first two."""
    addresses = text.split(",")
    more = len(addresses) - LISTED
    return f"{','.join(addresses[:LISTED])} (+{more} more)" if more > 0 else text


def resolver_for(text: str) -> tuple[Target, Resolver | None]:
    """Take a target apart and make its resolver; None when gRPC resolves it by itself, as one endpoint.

    Does no IO. ``MESH_REGISTRY`` is read here, when the target needs it. Raises ValueError for a target that neither
    the mesh nor gRPC takes, and says why.
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
    raise ValueError(f"target {text!r}: unknown scheme {scheme!r}; known are {known}, and host:port")


def _mesh(text: str, authority: str, service: str) -> Resolver:
    if not service and authority and ":" not in authority:
        raise ValueError(f"target {text!r}: write three slashes, mesh:///{authority}")
    if not service or "/" in service:
        raise ValueError(f"target {text!r}: name a service, as in mesh:///weft.user.v1.UserService")
    registry = authority or os.environ.get(REGISTRY_VARIABLE, "")
    if not registry:
        raise ValueError(
            f"target {text!r}: which registry? Set {REGISTRY_VARIABLE}=host:port, or write mesh://host:port/{service}"
        )
    try:
        if authority:
            parse(authority)
        else:
            check_target(registry)
    except ValueError as error:
        raise ValueError(f"target {text!r}: the registry must be host:port, not {registry!r}: {error}") from None
    return RegistryResolver(registry, service, cache=Cache.of_environment(registry, service))


def _static(text: str, authority: str, path: str) -> Resolver:
    if authority:
        raise ValueError(f"target {text!r}: write three slashes, static:///{authority}")
    addresses = [address.strip() for address in path.split(",") if address.strip()]
    if not addresses:
        raise ValueError(f"target {text!r}: names no address, as in static:///10.0.0.1:50051,10.0.0.2:50051")
    for address in addresses:
        try:
            if not is_local(address):
                parse(address, least_port=0)  # grpc takes port 0
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
        raise ValueError(f"target {text!r}: SRV records bring their ports; leave it out")
    try:
        return SrvResolver(name)
    except ImportError:
        raise ValueError(f"target {text!r}: SRV records need dnspython; install weft[dns]") from None
