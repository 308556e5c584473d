"""Weft: a service mesh for gRPC in Python, with no sidecars. The public names, and nothing else."""

from mesh.channel.sync import insecure_channel, secure_channel
from mesh.context import detach, remaining
from mesh.errors import explain
from mesh.server.sync import serve

__all__ = ["detach", "explain", "insecure_channel", "remaining", "secure_channel", "serve"]
