"""``python -m mesh.registry``: the registry as a process, with health and reflection."""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import re
import signal
import socket
import sys
import uuid

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from mesh import variables
from mesh.registry.book import Book
from mesh.registry.service import SERVICE_NAME, RegistryService
from weft.mesh.v1 import registry_pb2_grpc

try:
    from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]
except ImportError:  # pragma: no cover - reflection is an extra
    reflection = None

DEFAULT_LISTEN = "127.0.0.1:50050"

GRACE = 2.0
"""How long calls may take to end after SIGTERM. Seconds; all streams are ended at once, so only unary calls need it."""

OPTIONS = [
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
    listen = parser.parse_args().listen
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    variables.warn_once()
    try:
        check(listen)
        asyncio.run(serve(listen))
    except SettingError as error:
        print(f"mesh.registry: {error}", file=sys.stderr)
        return 2
    return 0


def check(listen: str) -> None:
    """Raise SettingError unless ``listen`` is an address that can be listened on now.

    gRPC would say only that it failed, with lines of its own on stderr; the system says why.
    """
    match = re.fullmatch(r"\[?(?P<host>[^\[\]/]+?)\]?:(?P<port>\d{1,5})", listen)
    if match is None or int(match["port"]) > 65535:
        raise SettingError(f"MESH_REGISTRY_LISTEN or --listen must be HOST:PORT, not {listen!r}")
    try:
        addresses = socket.getaddrinfo(match["host"], int(match["port"]), type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise SettingError(f"cannot listen on {listen}: {error.strerror}") from error
    errors = []
    for family, type_, protocol, _, address in addresses:
        try:
            with socket.socket(family, type_, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            errors.append(error)
    # A name may also have addresses of a family that this host lacks: gRPC listens on the others, and so may we.
    if errors and (len(errors) == len(addresses) or any(error.errno == errno.EADDRINUSE for error in errors)):
        raise SettingError(f"cannot listen on {listen}: {errors[0].strerror}")


async def serve(listen: str) -> None:
    """Serve a new, empty registry on ``listen`` until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    service = RegistryService(Book(epoch=uuid.uuid4().hex))
    checks = health.aio.HealthServicer()
    server = grpc.aio.server(options=OPTIONS)
    registry_pb2_grpc.add_RegistryServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    if reflection is not None:
        reflection.enable_server_reflection([SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise SettingError(f"cannot listen on {listen}: {error}") from error
    await server.start()
    for name in ("", SERVICE_NAME):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    _log.info("serving on %s:%d", listen.rpartition(":")[0], port)

    await stop.wait()
    _log.info("stopping")
    await checks.enter_graceful_shutdown()
    service.close()
    await server.stop(GRACE)


if __name__ == "__main__":
    sys.exit(main())
