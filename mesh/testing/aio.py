"""``mesh.testing`` for asyncio::

    async with mesh.testing.aio.Mesh() as mesh_:
        await mesh_.serve([(add_UserServiceServicer_to_server, Users())], replicas=3)
        users = UserServiceStub(mesh_.channel("weft.user.v1.UserService"))

Registry, replicas and channels run on the test's own event loop, so servicers and the test may share objects that are
bound to a loop. ``Mesh``, ``Replica`` and ``Calls`` are as in ``mesh.testing``, except that methods that wait are
coroutines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any

import grpc.aio

import mesh.aio
from mesh import ServerSettings
from mesh.server.handlers.registrar import Servicers
from mesh.testing.base import BaseMesh, BaseReplica, environment
from mesh.testing.calls import WAIT, CallLog
from mesh.testing.handlers import Tap
from mesh.testing.recording import RecordedCall
from mesh.testing.registry import Registry

__all__ = ["Calls", "Mesh", "Replica"]


class Calls(CallLog):
    """Like ``mesh.testing.Calls``, but ``wait`` is a coroutine."""

    async def wait(
        self,
        count: int = 1,
        method: str | None = None,
        *,
        replica: BaseReplica | str | None = None,
        ended: bool = False,
        timeout: float = WAIT,  # noqa: ASYNC109 - its TimeoutError lists the calls
    ) -> tuple[RecordedCall, ...]:
        """Wait until ``count`` calls have arrived, including earlier ones, and return them; other arguments as in
        ``of``. Raises TimeoutError, which lists the calls that did arrive, after ``timeout`` seconds."""
        loop, happened = asyncio.get_running_loop(), asyncio.Event()
        stop = self._recorder.watch(lambda: loop.call_soon_threadsafe(happened.set))
        end = time.monotonic() + timeout
        try:
            while True:
                happened.clear()
                found = self.of(method, replica=replica, ended=ended)
                if len(found) >= count:
                    return found
                try:
                    async with asyncio.timeout(end - time.monotonic()):
                        await happened.wait()
                except TimeoutError:
                    raise self._missing(count, timeout, method, len(found)) from None
        finally:
            stop()


class Replica(BaseReplica):
    """One server of a test mesh: a ``mesh.aio.Server`` on a free port."""

    def __init__(
        self,
        servicers: Servicers,
        settings: ServerSettings | None,
        registry: str,
        tap: Tap,
        registered: Callable[[Replica], Awaitable[None]],
    ) -> None:
        super().__init__(servicers, settings, registry, tap)
        self._registered = registered
        self._server = mesh.aio.Server((), self.settings)

    async def start(self) -> None:
        """Start it again after ``drain`` or ``stop``, on another port, as a replacement would. Returns when it is
        registered; clients learn of it a moment later."""
        self._check_ended()
        server = mesh.aio.Server(self._servicers, self.settings)
        await server.start()
        self._server = server
        self._started(server)
        await self._registered(self)

    async def drain(self) -> None:
        """Shut it down as SIGTERM does: it deregisters, takes no new calls, and finishes its calls within its grace."""
        self._running = False
        await self._server.drain()

    async def stop(self) -> None:
        """Stop it as if it were killed: its calls fail, and the registry lists it until its lease expires."""
        self._running = False
        await self._server.kill()


class Mesh(BaseMesh):
    """A mesh in the test's process, on its event loop::

        async with mesh.testing.aio.Mesh() as mesh_:
            await mesh_.serve([(add_UserServiceServicer_to_server, Users())], replicas=3)
            users = UserServiceStub(mesh_.channel("weft.user.v1.UserService"))
            assert (await users.GetUser(GetUserRequest(id="1"), timeout=5)).user.name == "Ada"
            [call] = await mesh_.calls.wait()

    Everything else is as in ``mesh.testing.Mesh``. Servicers whose methods aren't async run on threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls(self._methods, self._recorder)
        self.replicas: list[Replica] = []
        self._stack = AsyncExitStack()

    async def serve(
        self, servicers: Servicers, *, replicas: int = 1, settings: ServerSettings | None = None
    ) -> list[Replica]:
        """Serve the servicers on ``replicas`` servers. Returns these once they are registered.

        ``servicers``: pairs of a generated ``add_XServicer_to_server`` and a servicer, as for ``mesh.aio.serve``; all
        these replicas share the servicer. ``settings``: their settings, except for the address, the registry and the
        instance id, which the mesh sets.
        """
        registry = self._running()
        taps = self._taps(servicers, replicas)
        new = [Replica(servicers, settings, registry.address, tap, self._await_registration) for tap in taps]
        for replica in new:
            await replica.start()
            self.replicas.append(replica)
        return new

    def channel(
        self,
        service: str,
        options: Sequence[tuple[str, Any]] | None = None,
        compression: grpc.Compression | None = None,
        interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None,
    ) -> mesh.aio.Channel:
        """A ``mesh.aio.insecure_channel`` to a service, closed when the block is left."""
        channel = mesh.aio.insecure_channel(self.target(service), options, compression, interceptors)
        self._stack.push_async_callback(channel.close)
        return channel

    async def configure(self, service: str, config: str | Mapping[str, Any]) -> None:
        """Set the registry's service config for ``service``, as JSON text or as a dict. New channels use it from their
        first call on; channels already in use get it soon. Raises ValueError, with the field's path."""
        await self._running().configure(service, config)

    async def _await_registration(self, replica: Replica) -> None:
        if replica.settings.ready is None:
            await self._running().registered(replica.services, replica.name)

    async def _drain(self) -> None:
        await asyncio.gather(*(replica.drain() for replica in self.replicas if replica.running))

    async def __aenter__(self) -> Mesh:
        self._enter()
        async with AsyncExitStack() as stack:
            registry = Registry()
            await registry.start()
            self._registry = registry
            stack.push_async_callback(registry.stop)
            stack.enter_context(environment(registry.address))
            stack.push_async_callback(self._drain)
            stack.callback(self.faults.clear)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._stack.aclose()
        finally:
            self._registry = None
