"""What a server is put together from, in both worlds: servicers and their names, an address, the registry's entry."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import Any

from mesh.server.handlers.scope import LOG
from mesh.server.settings import ServerSettings
from weft.mesh.v1 import registry_pb2 as pb

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What ends a server: the first in good order, the second at once."""

BAD_START = 2
"""The exit code when a server can't start as it was told to."""


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
