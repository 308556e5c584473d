"""Deprecated: see ``mesh.server.handlers.admission``."""

from mesh.deprecation import moved

__getattr__ = moved(
    __name__,
    {
        "AioGate": "mesh.server.handlers.admission.AioServerAdmission",
        "ThreadGate": "mesh.server.handlers.admission.ThreadServerAdmission",
    },
)
