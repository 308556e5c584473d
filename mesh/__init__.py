"""Weft: a service mesh for gRPC in Python, without sidecars.

Channels through the mesh are drop-ins for gRPC's own; generated stubs work unchanged::

    with mesh.insecure_channel("mesh:///weft.user.v1.UserService") as channel:
        users = user_pb2_grpc.UserServiceStub(channel)
        user = users.GetUser(request, timeout=5)

Serving takes one call, with health checking, registration, deadlines, overload protection and graceful drain::

    sys.exit(mesh.serve([(user_pb2_grpc.add_UserServiceServicer_to_server, Users())]))

``mesh.aio`` has the same for asyncio.

Calling
    insecure_channel, secure_channel   create a ``grpc.Channel`` to a service
    Channel.stats()                    a snapshot of its endpoints: a ``ChannelStats`` of ``EndpointStats``
    explain(call_or_error)             the attempts made for a call: an ``Explanation`` of ``AttemptRecord``
    RpcError                           what a failed call raises: a ``grpc.RpcError`` with ``explain()``

Serving
    serve, Server                      serve until SIGTERM; or as a context manager
    ServerSettings                     their settings; from ``MESH_*`` variables without any
    Mode                               whether overload protection is on, only counts, or off
    ServerInterceptor                  the same deadlines and errors for a ``grpc.Server`` of your own; with a
    ServerAdmission                    also its overload protection and load reports
    ServerObserver                     is notified of each call that a server handled or refused

In a handler
    remaining()                        seconds until the inbound call's deadline
    detach()                           calls made in here outlive the inbound call
    Criticality                        how important a call is, for load shedding

In tests of your own code
    mesh.testing                       an in-process mesh, faults on demand, a fake clock, pytest fixtures

https://grpc.io/docs/guides/ explains the terms; docs/ in the repository documents the mesh.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mesh.channel.sync.channel import Channel, insecure_channel, secure_channel
from mesh.context import detach, remaining
from mesh.criticality import Criticality
from mesh.errors import RpcError, explain
from mesh.observe import AttemptRecord, ChannelStats, EndpointStats, Explanation, ServerObserver
from mesh.policy.server.admission import Mode
from mesh.server.handlers.admission import ThreadServerAdmission as ServerAdmission
from mesh.server.handlers.interceptors import ServerInterceptor
from mesh.server.settings import ServerSettings
from mesh.server.sync import Server, serve

if TYPE_CHECKING:
    from mesh import aio

    __version__: str

__all__ = [
    "AttemptRecord",
    "Channel",
    "ChannelStats",
    "Criticality",
    "EndpointStats",
    "Explanation",
    "Mode",
    "RpcError",
    "Server",
    "ServerAdmission",
    "ServerInterceptor",
    "ServerObserver",
    "ServerSettings",
    "__version__",
    "aio",
    "detach",
    "explain",
    "insecure_channel",
    "remaining",
    "secure_channel",
    "serve",
]


def __getattr__(name: str) -> Any:
    # On demand: most programs use either threads or asyncio, and don't read the version.
    if name == "aio":
        return import_module("mesh.aio")
    if name == "__version__":
        from importlib import metadata  # only this needs it, and it takes a while to import

        try:
            return metadata.version("weft")
        except metadata.PackageNotFoundError:  # a checkout on the path that isn't installed
            return "unknown"
    raise AttributeError(f"module 'mesh' has no attribute {name!r}")
