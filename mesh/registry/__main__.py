"""``python -m mesh.registry``: the registry as a process, with health and reflection."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import uuid
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2_grpc  # type: ignore[import-untyped]

from mesh import variables
from mesh.addresses import is_local, parse
from mesh.files import InUseError
from mesh.health import NOT_SERVING, SERVING, AioHealth
from mesh.listening import bind, limit_streams
from mesh.registry.book import Book
from mesh.registry.limits import HANDSHAKE_TIMEOUT, MAX_MESSAGE_BYTES, MAX_STREAMS
from mesh.registry.service import SERVICE_NAME, RegistryService
from mesh.registry.state import VARIABLE, State
from weft.mesh.v1 import registry_pb2_grpc

try:
    from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]
except ImportError:  # pragma: no cover - reflection is an extra
    reflection = None

DEFAULT_LISTEN = "127.0.0.1:50050"

GRACE = 2.0
"""How long calls may take to end after SIGTERM. Seconds; all streams are ended at once, so only unary calls need it."""

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    *limit_streams(MAX_STREAMS),
    ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_TIMEOUT * 1000)),
    # A port in use is an error, and not a port shared with another registry.
    ("grpc.so_reuseport", 0),
    # Watchers send keepalive pings to find out that their registry is gone; core's own limit would cut them off.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    # And the registry lets go of watchers whose host is gone. All three are needed.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
]

_log = logging.getLogger("mesh.registry")


class SettingError(Exception):
    """What was asked for can't be done; the text says what to change."""


def main() -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code: 0 after a stop, 2 when the registry can't start."""
    parser = argparse.ArgumentParser(prog="python -m mesh.registry", description="The registry of the mesh.")
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        default=os.environ.get("MESH_REGISTRY_LISTEN") or DEFAULT_LISTEN,
        help=f"where to listen; default: MESH_REGISTRY_LISTEN, or {DEFAULT_LISTEN}",
    )
    parser.add_argument(
        "--state",
        metavar="DIR",
        default=os.environ.get(VARIABLE) or "",
        help=f"where service configs are kept across restarts; default: {VARIABLE}, or nowhere",
    )
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    variables.warn_once()
    try:
        check(given.listen)
        asyncio.run(serve(given.listen, given.state))
    except SettingError as error:
        print(f"mesh.registry: {error}", file=sys.stderr)
        return 2
    return 0


def check(listen: str) -> None:
    """Raise SettingError unless ``listen`` is an address."""
    try:
        if not is_local(listen):
            parse(listen, min_port=0)
    except ValueError as error:
        raise SettingError(f"MESH_REGISTRY_LISTEN or --listen must be HOST:PORT, not {listen!r}: {error}") from None


def restore(book: Book, folder: str) -> State | None:
    """Have the book know the configs that are kept in ``folder``. Raises SettingError when it can't be used."""
    if not folder:
        _log.info("service configs are kept in memory only: set %s=DIR to keep them across restarts", VARIABLE)
        return None
    try:
        state = State(Path(folder))
        configs = state.load()
    except InUseError as error:
        raise SettingError(f"{error}: a registry needs a folder of its own in {VARIABLE} or --state") from None
    except OSError as error:
        raise SettingError(f"cannot use {folder} ({VARIABLE} or --state): {error.strerror}") from error
    for service, text in configs.items():
        book.configure(service, text)
    _log.info("service configs are kept in %s; %d restored", folder, len(configs))
    return state


async def serve(listen: str, folder: str = "") -> None:
    """Serve a new registry on ``listen`` until SIGTERM or SIGINT. It begins with the configs kept in ``folder``."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    book = Book(epoch=uuid.uuid4().hex)
    service = RegistryService(book)
    checks = AioHealth()
    server = grpc.aio.server(options=OPTIONS)
    registry_pb2_grpc.add_RegistryServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    if reflection is not None:
        reflection.enable_server_reflection([SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    try:
        listener = bind(server, listen)
    except OSError as error:
        raise SettingError(str(error.strerror)) from error
    # After the address is had: a registry that finds another one there leaves its files alone.
    service.state = restore(book, folder)
    await server.start()
    checks.set(SERVING, [SERVICE_NAME])
    at = listen if is_local(listen) else parse(listen, min_port=0)._replace(port=listener.port)
    _log.info("serving on %s", at)

    await stop.wait()
    _log.info("stopping")
    checks.set(NOT_SERVING, [SERVICE_NAME])
    checks.end_watches()
    service.close()
    await server.stop(GRACE)
    listener.close()
    if service.state is not None:
        service.state.close()


if __name__ == "__main__":
    sys.exit(main())
