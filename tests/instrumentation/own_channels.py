"""Has the mesh's own channels made by gRPC's own functions, as they were when this was imported: before any
instrumentation."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio

_OWN = {
    "_insecure_channel": grpc.insecure_channel,
    "_secure_channel": grpc.secure_channel,
    "_aio_insecure_channel": grpc.aio.insecure_channel,
    "_aio_secure_channel": grpc.aio.secure_channel,
}


class _Grpc(SimpleNamespace):
    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def use() -> None:
    aio = _Grpc(module=grpc.aio, insecure_channel=_OWN["_aio_insecure_channel"])
    for name in ("mesh.discovery.registry", "mesh.server.registration"):
        vars(importlib.import_module(name))["grpc"] = _Grpc(module=grpc, aio=aio)
    vars(importlib.import_module("mesh.channel.subchannels")).update(_OWN)
