"""A registry with its server, on the running event loop: what ``python -m mesh.registry`` and ``mesh.testing`` run."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2_grpc  # type: ignore[import-untyped]

from mesh.addresses import Address, is_local, parse
from mesh.health import NOT_SERVING, SERVING, AioHealth
from mesh.listening import Listener, bind, limit_streams
from mesh.registry.book import Book
from mesh.registry.limits import HANDSHAKE_TIMEOUT, MAX_MESSAGE_BYTES, MAX_STREAMS
from mesh.registry.service import SERVICE_NAME, RegistryService
from mesh.registry.state import State
from weft.mesh.v1 import registry_pb2_grpc

GRACE = 2.0
"""How long unary calls may take to end after SIGTERM; streams are ended at once. Seconds."""

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    *limit_streams(MAX_STREAMS),
    ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_TIMEOUT * 1000)),
    # A port in use is an error: two registries must not share one.
    ("grpc.so_reuseport", 0),
    # Watchers send keepalive pings to detect a dead registry; with core's default limit they would be disconnected.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    # And the registry detects watchers whose host is gone. All three are needed.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
]


class RegistryServer:
    """A new registry, with health checking. ``book``: its state; ``address``: where it listens, once started."""

    def __init__(self) -> None:
        self.book = Book(epoch=uuid.uuid4().hex)
        self.address = ""
        self._service = RegistryService(self.book)
        self._health = AioHealth()
        self._listener = Listener()
        self._server = grpc.aio.server(options=OPTIONS)
        registry_pb2_grpc.add_RegistryServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def add_reflection(self) -> None:
        """Serve reflection, if grpcio-reflection is installed."""
        try:
            from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]
        except ImportError:  # pragma: no cover - reflection is an extra
            return
        reflection.enable_server_reflection([SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    async def start(self, listen: str, restore: Callable[[Book], State | None] = lambda _: None) -> None:
        """Serve on ``listen``. ``restore`` fills the book and returns where service configs are kept, or None. It is
        called once the address is bound: a registry whose address is in use must not touch the other one's files.

        Raises OSError if it can't listen.
        """
        self._listener = bind(self._server, listen)
        self._service.state = restore(self.book)
        await self._server.start()
        self._health.set(SERVING, [SERVICE_NAME])
        self.address = listen if is_local(listen) else _with_port(parse(listen, min_port=0), self._listener.port)

    async def stop(self, grace: float = GRACE) -> None:
        """End all streams at once, and unary calls within ``grace`` seconds."""
        self._health.set(NOT_SERVING, [SERVICE_NAME])
        self._health.end_watches()
        self._service.close()
        await self._server.stop(grace)
        self._listener.close()
        if self._service.state is not None:
            self._service.state.close()


def _with_port(address: Address, port: int) -> str:
    return str(address._replace(port=port))
