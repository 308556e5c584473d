"""What the protobuf descriptors loaded in this process say of services and methods."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor

from mesh.config import MAX_WARNINGS, ServiceConfig, nearest

_LOOKED_AT = 200
"""How many of a config's services are looked at: finding what is meant takes a while."""


def unknown_names(config: ServiceConfig, services: Iterable[str] = ()) -> tuple[str, ...]:
    """The services and methods in a config's ``methodConfig`` that are likely slips, a line each.

    A method is unknown when its service's descriptor is loaded and doesn't have it. Of a service that isn't loaded
    nothing is known; it is named only when it looks like one that is: of ``services`` (those of the channel), of
    the config's others, or of the files that define these.
    """
    named = {service: _service(service) for service, _ in config.methods if service}
    loaded = {service: found for service in (*named, *services) if (found := _service(service)) is not None}
    siblings = {each.full_name for found in loaded.values() for each in found.file.services_by_name.values()}
    lines = []
    for service, found in tuple(named.items())[:_LOOKED_AT]:
        if found is None:
            if hint := nearest(service, siblings):
                lines.append(f"methodConfig: unknown service {service!r}{hint}")
            continue
        methods = sorted(method for of, method in config.methods if of == service and method)
        for method in methods:
            if method not in found.methods_by_name and len(lines) < MAX_WARNINGS:
                hint = nearest(method, found.methods_by_name)
                known = hint or f"; known: {', '.join(sorted(found.methods_by_name)) or 'none'}"
                lines.append(f"methodConfig: {service} has no method {method!r}{known}")
    return tuple(lines)


def _service(name: str) -> ServiceDescriptor | None:
    try:
        return descriptor_pool.Default().FindServiceByName(name)
    except KeyError:
        return None
