"""Deprecated: see ``mesh.server.handlers.interceptors``."""

from mesh.deprecation import moved

__getattr__ = moved(
    __name__,
    {
        "AioServerInterceptor": "mesh.server.handlers.interceptors.AioServerInterceptor",
        "ServerInterceptor": "mesh.server.handlers.interceptors.ServerInterceptor",
    },
)
