"""A registry on this loop, behind a real server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc

from mesh.registry.book import LOG_SIZE, Book
from mesh.registry.limits import SEND_TIMEOUT
from mesh.registry.server import OPTIONS
from mesh.registry.service import RegistryService
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

USER = "weft.user.v1.UserService"
ORDER = "weft.order.v1.OrderService"

BOUND = 30.0
"""Seconds that anything may take."""

_epochs = itertools.count(1)


def instance(id: str, service: str = USER, address: str = "10.0.0.1:50051", **metadata: str) -> pb.Instance:
    return pb.Instance(id=id, service=service, address=address, metadata=metadata)


@dataclass
class Serving:
    """``stub`` calls the registry over the network."""

    address: str
    port: int
    book: Book
    service: RegistryService
    stub: pb_grpc.RegistryAsyncStub

    async def register(self, registered: pb.Instance) -> str:
        return (await self.stub.Register(pb.RegisterRequest(instance=registered), timeout=BOUND)).lease_id


@contextlib.asynccontextmanager
async def serving(
    port: int = 0, log_size: int = LOG_SIZE, send_timeout: float = SEND_TIMEOUT
) -> AsyncIterator[Serving]:
    """A new registry, empty, with an epoch of its own. It ends all streams and stops at the end."""
    book = Book(f"epoch-{next(_epochs)}", log_size=log_size)
    service = RegistryService(book, send_timeout)
    server = grpc.aio.server(options=OPTIONS)
    pb_grpc.add_RegistryServicer_to_server(service, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Serving(f"127.0.0.1:{port}", port, book, service, pb_grpc.RegistryStub(channel))
    finally:
        service.close()
        await server.stop(0)


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(BOUND):
        while not condition():  # noqa: ASYNC110 - what it asks has no event
            await asyncio.sleep(0.005)
