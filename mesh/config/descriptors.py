"""What the protobuf descriptors loaded in this process say of services and methods."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor

from mesh.config.reader import MAX_WARNINGS, nearest
from mesh.config.settings import ServiceConfig

_LOOKED_AT = 200
"""How many of a config's services are looked at: finding what is meant takes a while."""

_ALIKE = 0.9
"""How much a service's name must be like a known one to be taken for a slip: about one letter in ten."""


def unknown_names(config: ServiceConfig, services: Iterable[str] = ()) -> tuple[str, ...]:
    """The services and methods in a config's ``methodConfig`` that are likely slips, a line each.

    A method is unknown when its service's descriptor is loaded and doesn't have it. Of a service that isn't loaded
    nothing is known: it may be another process's. It is named only when it is nearly the name of one that is known:
    of ``services`` (those of the channel), or of those that are loaded. A version alone is no slip.
    """
    found: list[str] = []
    known: set[str] | None = None
    methods: dict[str, list[str]] = {}
    for service, method in config.methods:
        methods.setdefault(service, []).append(method)
    for service in sorted(methods.keys() - {""})[:_LOOKED_AT]:
        descriptor = _service(service)
        if descriptor is None:
            known = _loaded() | set(services) if known is None else known
            others = [each for each in known if _unversioned(each) != _unversioned(service)]
            if service not in known and (hint := nearest(service, others, _ALIKE)):
                found.append(f"methodConfig: unknown service {service!r}{hint}")
            continue
        for method in sorted(methods[service]):
            if method and method not in descriptor.methods_by_name and len(found) < MAX_WARNINGS:
                hint = nearest(method, descriptor.methods_by_name)
                known_methods = hint or f"; known: {', '.join(sorted(descriptor.methods_by_name)) or 'none'}"
                found.append(f"methodConfig: {service} has no method {method!r}{known_methods}")
    return tuple(found[:MAX_WARNINGS])


def _service(name: str) -> ServiceDescriptor | None:
    try:
        return descriptor_pool.Default().FindServiceByName(name)
    except KeyError:
        return None


def _loaded() -> set[str]:
    """The services of the generated modules that are loaded: the pool itself can't be listed."""
    modules = [module for name, module in tuple(sys.modules.items()) if name.endswith("_pb2") and module is not None]
    files = [vars(module).get("DESCRIPTOR") for module in modules]
    return {
        service.full_name
        for file in files
        if isinstance(file, FileDescriptor)
        for service in file.services_by_name.values()
    }


def _unversioned(service: str) -> str:
    return re.sub(r"\d+", "", service)
