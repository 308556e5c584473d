"""The public names for asyncio: ``mesh.aio.insecure_channel`` and its kin."""

from mesh.server.aio import serve

__all__ = ["serve"]
