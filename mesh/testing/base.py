"""The common parts of sync and asyncio meshes and replicas."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mesh import ServerSettings
from mesh.server.handlers.registrar import Servicers
from mesh.testing.faults import Faults
from mesh.testing.handlers import Tap
from mesh.testing.injection import Injections
from mesh.testing.methods import Methods
from mesh.testing.recording import CallRecorder
from mesh.testing.registry import Registry

SETTINGS = ServerSettings(drain_wait=0.05, grace=5.0, stream_grace=1.0)
"""The default settings of replicas: as in production, but they drain sooner. ``MESH_*`` variables have no effect on
them."""

_VARIABLE = "MESH_REGISTRY"


class BaseReplica:
    """One server of a test mesh. ``name``: the service's short name and a number ("UserService-0"), which is also its
    instance id; ``address``: where it listens, on another port after a restart; ``services``: their full names;
    ``settings``: how it serves."""

    def __init__(self, servicers: Servicers, settings: ServerSettings | None, registry: str, tap: Tap) -> None:
        self.name = tap.replica
        self.address = ""
        self.services: tuple[str, ...] = ()
        self._servicers = tap.around(servicers)
        self.settings = dataclasses.replace(
            settings or SETTINGS, listen="127.0.0.1:0", advertise="", registry=registry, instance_id=self.name
        )
        self._running = False

    @property
    def running(self) -> bool:
        """Whether it serves: it was neither drained nor stopped."""
        return self._running

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<Replica {self.name} at {self.address}{'' if self._running else ', ended'}>"

    # -- for the sync and asyncio replicas

    def _check_ended(self) -> None:
        if self._running:
            raise RuntimeError(f"{self.name} is running")

    def _started(self, server: Any) -> None:
        self.address = server.address
        self.services = server.services
        self._running = True


class BaseMesh:
    """The parts that sync and asyncio test meshes share."""

    def __init__(self) -> None:
        self._methods = Methods()
        self._names: Counter[str] = Counter()
        self._entered = False
        self._registry: Registry | None = None
        self._recorder = CallRecorder()
        self._injections = Injections()
        self.faults = Faults(self._methods, self._injections, self._replica_names)

    @property
    def registry(self) -> str:
        """The address of the registry. Raises RuntimeError outside the ``with`` block."""
        return self._running().address

    def target(self, service: str) -> str:
        """The target of a service, for channels that the code under test creates. Inside the block ``MESH_REGISTRY`` is
        set, so ``mesh:///SERVICE`` means the same."""
        return f"mesh://{self.registry}/{service}"

    def _replica_names(self) -> list[str]:
        return [f"{short}-{number}" for short, count in self._names.items() for number in range(count)]

    def _enter(self) -> None:
        if self._entered:
            raise RuntimeError("a mesh can be entered only once: create another one")
        self._entered = True

    def _running(self) -> Registry:
        if self._registry is None:
            raise RuntimeError("the mesh is not running: use it in a with block")
        return self._registry

    def _taps(self, servicers: Servicers, count: int) -> list[Tap]:
        """A tap for each new replica; it has the replica's name."""
        if count < 1:
            raise ValueError(f"expected at least 1 replica, got {count}")
        services = _ServiceNames()
        for add_to_server, servicer in servicers:
            add_to_server(servicer, services)
        if not services.names:
            raise ValueError("no servicers were given")
        short = services.names[0].rpartition(".")[2]
        taps = []
        for _ in range(count):
            taps.append(Tap(f"{short}-{self._names[short]}", self._methods, self._recorder, self._injections))
            self._names[short] += 1
        return taps

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.Mesh {self._registry.address if self._registry else 'not running'}>"


class _ServiceNames:
    """Stands in for a server, to find out which services the servicers implement."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self.names += [each.service_name() for each in handlers if hasattr(each, "service_name")]

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        pass


_entered: list[str] = []
"""The registries of the meshes that run, in the order in which they were entered."""

_before: str | None = None


@contextmanager
def environment(registry: str) -> Iterator[None]:
    """``MESH_REGISTRY`` names the registry in the block. Of several meshes, which may end in any order, it names that
    of the last one entered."""
    global _before
    if not _entered:
        _before = os.environ.get(_VARIABLE)
    _entered.append(registry)
    os.environ[_VARIABLE] = registry
    try:
        yield
    finally:
        _entered.remove(registry)
        value = _entered[-1] if _entered else _before
        if value is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = value
