"""The registry of a test mesh: a real one, on an event loop of the test's process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import grpc

from mesh import core
from mesh.registry.server import RegistryServer
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

T = TypeVar("T")

BOUND = 10.0
"""How long the registry of a test mesh may take to respond, and a replica to register. Seconds."""

POLL = 0.002
"""The interval between two checks for a registration. Seconds."""


class Registry:
    """A registry on the running loop, on a free port."""

    def __init__(self) -> None:
        self._server = RegistryServer()

    @property
    def address(self) -> str:
        return self._server.address

    async def start(self) -> None:
        await self._server.start("127.0.0.1:0")

    async def stop(self) -> None:
        await self._server.stop(0.0)

    async def registered(self, services: Iterable[str], instance_id: str) -> None:
        """Wait until the instance is registered for all these services. Raises TimeoutError if that takes too long."""
        waiting = set(services)
        try:
            async with asyncio.timeout(BOUND):
                while waiting := {each for each in waiting if not self._server.book.find(each, instance_id)}:  # noqa: ASYNC110
                    await asyncio.sleep(POLL)
        except TimeoutError:
            raise TimeoutError(f"{instance_id} didn't register {', '.join(waiting)} within {BOUND:g} s") from None

    async def configure(self, service: str, config: str | Mapping[str, Any]) -> None:
        """Set the service config. Raises ValueError, with the field's path, if it is invalid."""
        text = config if isinstance(config, str) else json.dumps(config)
        async with core.aio_channel(self.address, ()) as channel:
            stub: pb_grpc.RegistryAsyncStub = pb_grpc.RegistryStub(channel)
            try:
                request = pb.SetServiceConfigRequest(service=service, service_config=text)
                await stub.SetServiceConfig(request, timeout=BOUND)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                    raise
                raise ValueError(error.details()) from None


class RegistryThread:
    """A ``Registry`` on an event loop in a thread of its own, for tests with blocking calls."""

    def __init__(self) -> None:
        self._started: Future[Registry] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="mesh-testing-registry", daemon=True)

    def start(self) -> Registry:
        self._thread.start()
        return self._started.result(BOUND)

    def stop(self) -> None:
        assert self._loop is not None
        assert self._stopping is not None
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(BOUND)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` on the registry's loop, and wait for the result."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * BOUND)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        registry = Registry()
        await registry.start()
        self._started.set_result(registry)
        await self._stopping.wait()
        await registry.stop()
