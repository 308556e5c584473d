"""Checks a config's service and method names against the protobuf descriptors that are loaded in this process."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor

from mesh.config.reader import MAX_WARNINGS, did_you_mean
from mesh.config.settings import ServiceConfig

_MAX_CHECKED = 200
"""How many of a config's services are checked: searching for similar names is slow."""

_SIMILARITY = 0.9
"""How similar a service's name must be to a known one to count as a typo: about one letter in ten differs."""


def unknown_names(config: ServiceConfig, services: Iterable[str] = ()) -> tuple[str, ...]:
    """The likely typos among services and methods in a config's ``methodConfig``, a line each.

    A method is unknown when its service's descriptor is loaded and doesn't have it. A service that isn't loaded may be
    another process's, so it is reported only when its name is similar to a known one: one of ``services`` (the
    channel's), or one that is loaded. Names that differ only in the version aren't typos.
    """
    found: list[str] = []
    known: set[str] | None = None
    methods: dict[str, list[str]] = {}
    for service, method in config.methods:
        methods.setdefault(service, []).append(method)
    for service in sorted(methods.keys() - {""})[:_MAX_CHECKED]:
        descriptor = _service(service)
        if descriptor is None:
            known = _loaded() | set(services) if known is None else known
            others = [each for each in known if _unversioned(each) != _unversioned(service)]
            if service not in known and (hint := did_you_mean(service, others, _SIMILARITY)):
                found.append(f"methodConfig: unknown service {service!r}{hint}")
            continue
        for method in sorted(methods[service]):
            if method and method not in descriptor.methods_by_name and len(found) < MAX_WARNINGS:
                hint = did_you_mean(method, descriptor.methods_by_name)
                known_methods = hint or f"; known: {', '.join(sorted(descriptor.methods_by_name)) or 'none'}"
                found.append(f"methodConfig: {service} has no method {method!r}{known_methods}")
    return tuple(found[:MAX_WARNINGS])


def _service(name: str) -> ServiceDescriptor | None:
    try:
        return descriptor_pool.Default().FindServiceByName(name)
    except KeyError:
        return None


def _loaded() -> set[str]:
    """The services of the generated modules that are imported; the descriptor pool can't be listed."""
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
