"""The public names for asyncio, and nothing else."""

from mesh.channel.aio import insecure_channel, secure_channel
from mesh.server.aio import serve

__all__ = ["insecure_channel", "secure_channel", "serve"]
