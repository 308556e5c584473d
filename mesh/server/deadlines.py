"""Deprecated: see ``mesh.ServerInterceptor`` and ``mesh.aio.ServerInterceptor``."""

from mesh.deprecation import moved

__getattr__ = moved(
    __name__,
    {
        "AioServerInterceptor": "mesh.aio.ServerInterceptor",
        "ServerInterceptor": "mesh.ServerInterceptor",
    },
)
