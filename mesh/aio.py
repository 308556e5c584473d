"""The public names for asyncio, and nothing else."""

from mesh.channel.aio.channel import insecure_channel, secure_channel
from mesh.server.aio import Server, serve

__all__ = ["Server", "insecure_channel", "secure_channel", "serve"]
