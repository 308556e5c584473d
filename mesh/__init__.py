"""Weft: a service mesh for gRPC in Python, with no sidecars. The public names, and nothing else."""

from mesh.channel.sync.channel import insecure_channel, secure_channel
from mesh.context import detach, remaining
from mesh.errors import explain
from mesh.server.settings import ServerSettings
from mesh.server.sync import Server, serve

__all__ = [
    "Server",
    "ServerSettings",
    "detach",
    "explain",
    "insecure_channel",
    "remaining",
    "secure_channel",
    "serve",
]
