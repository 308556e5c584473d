"""``mesh.testing.Mesh``: replicas on threads, and channels with blocking calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import grpc

import mesh
from mesh import ServerSettings
from mesh.server.handlers.registrar import Servicers
from mesh.testing.base import BaseMesh, BaseReplica, environment
from mesh.testing.calls import Calls
from mesh.testing.handlers import Tap
from mesh.testing.registry import RegistryThread


class Replica(BaseReplica):
    """One server of a test mesh: a ``mesh.Server`` on a free port."""

    def __init__(
        self,
        servicers: Servicers,
        settings: ServerSettings | None,
        registry: str,
        tap: Tap,
        registered: Callable[[Replica], None],
    ) -> None:
        super().__init__(servicers, settings, registry, tap)
        self._registered = registered
        self._server = mesh.Server((), self.settings)

    def start(self) -> None:
        """Start it again after ``drain`` or ``stop``, on another port, as a replacement would. Returns when it is
        registered; clients learn of it a moment later."""
        self._check_ended()
        server = mesh.Server(self._servicers, self.settings)
        server.start()
        self._server = server
        self._started(server)
        self._registered(self)

    def drain(self) -> None:
        """Shut it down as SIGTERM does: it deregisters, takes no new calls, and finishes its calls within its grace."""
        self._running = False
        self._server.drain()

    def stop(self) -> None:
        """Stop it as if it were killed: its calls fail, and the registry lists it until its lease expires."""
        self._running = False
        self._server.kill()


class Mesh(BaseMesh):
    """A mesh in the test's process: a registry, replicas of your servicers, and channels to them::

        with mesh.testing.Mesh() as mesh_:
            mesh_.serve([(add_UserServiceServicer_to_server, Users())], replicas=3)
            users = UserServiceStub(mesh_.channel("weft.user.v1.UserService"))
            mesh_.faults.fail(grpc.StatusCode.UNAVAILABLE, times=1)
            assert users.GetUser(GetUserRequest(id="1"), timeout=5).user.name == "Ada"
            assert len(mesh_.calls.wait(2)) == 2  # it was retried

    Registry, replicas and channels are real, on free ports of 127.0.0.1. Leaving the block closes the channels, removes
    the faults and drains the replicas. Inside it ``MESH_REGISTRY`` names the registry, so code under test that creates
    its own channel to ``mesh:///SERVICE`` finds the replicas, too. In ``unittest``:
    ``self.enterContext(Mesh())``.

    ``faults``: see ``Faults``. ``calls``: see ``Calls``. ``replicas``: all that were started, including
    stopped ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls(self._methods, self._recorder)
        self.replicas: list[Replica] = []
        self._thread = RegistryThread()
        self._stack = ExitStack()

    def serve(
        self, servicers: Servicers, *, replicas: int = 1, settings: ServerSettings | None = None
    ) -> list[Replica]:
        """Serve the servicers on ``replicas`` servers. Returns these once they are registered.

        ``servicers``: pairs of a generated ``add_XServicer_to_server`` and a servicer, as for ``mesh.serve``; all these
        replicas share the servicer. ``settings``: their settings, except for the address, the registry and the
        instance id, which the mesh sets.
        """
        registry = self._running()
        taps = self._taps(servicers, replicas)
        new = [Replica(servicers, settings, registry.address, tap, self._await_registration) for tap in taps]
        for replica in new:
            replica.start()
            self.replicas.append(replica)
        return new

    def channel(
        self,
        service: str,
        options: Sequence[tuple[str, Any]] | None = None,
        compression: grpc.Compression | None = None,
    ) -> mesh.Channel:
        """A ``mesh.insecure_channel`` to a service, closed when the block is left."""
        channel = mesh.insecure_channel(self.target(service), options, compression)
        self._stack.callback(channel.close)
        return channel

    def configure(self, service: str, config: str | Mapping[str, Any]) -> None:
        """Set the registry's service config for ``service``, as JSON text or as a dict. New channels use it from their
        first call on; channels already in use get it soon. Raises ValueError, with the field's path."""
        self._thread.run(self._running().configure(service, config))

    def _await_registration(self, replica: Replica) -> None:
        if replica.settings.ready is None:
            self._thread.run(self._running().registered(replica.services, replica.name))

    def _drain(self) -> None:
        running = [replica for replica in self.replicas if replica.running]
        if running:
            with ThreadPoolExecutor(len(running), thread_name_prefix="mesh-testing-drain") as pool:
                list(pool.map(Replica.drain, running))

    def __enter__(self) -> Mesh:
        self._enter()
        with ExitStack() as stack:
            self._registry = self._thread.start()
            stack.callback(self._thread.stop)
            stack.enter_context(environment(self._registry.address))
            stack.callback(self._drain)
            stack.callback(self.faults.clear)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._stack.close()
        finally:
            self._registry = None
