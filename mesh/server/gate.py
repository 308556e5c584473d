"""Deprecated: see ``mesh.ServerAdmission`` and ``mesh.aio.ServerAdmission``."""

from mesh.deprecation import moved

__getattr__ = moved(
    __name__,
    {
        "AioGate": "mesh.aio.ServerAdmission",
        "ThreadGate": "mesh.ServerAdmission",
    },
)
