"""``python -m mesh.registry``: the registry as a process, with health checking and reflection."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from mesh import variables
from mesh.addresses import is_local, parse
from mesh.files import InUseError
from mesh.registry.book import Book
from mesh.registry.server import RegistryServer
from mesh.registry.state import VARIABLE, State

DEFAULT_LISTEN = "127.0.0.1:50050"

_log = logging.getLogger("mesh.registry")


class SettingError(Exception):
    """The registry can't start with its settings; the text says what to change."""


def main() -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code: 0 after a stop, 2 if the registry can't start."""
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
        help=f"folder for service configs, to keep them across restarts; default: {VARIABLE}, or none",
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
    """Load the configs in ``folder`` into the book. Raises SettingError if the folder can't be used."""
    if not folder:
        _log.info("service configs are kept in memory only: set %s=DIR to keep them across restarts", VARIABLE)
        return None
    try:
        state = State(Path(folder))
        configs = state.load()
    except InUseError as error:
        raise SettingError(f"{error}: give each registry its own folder in {VARIABLE} or --state") from None
    except OSError as error:
        raise SettingError(f"cannot use {folder} ({VARIABLE} or --state): {error.strerror}") from error
    for service, text in configs.items():
        book.configure(service, text)
    _log.info("service configs are kept in %s; %d restored", folder, len(configs))
    return state


async def serve(listen: str, folder: str = "") -> None:
    """Serve a new registry on ``listen`` until SIGTERM or SIGINT. It starts with the configs in ``folder``."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    server = RegistryServer()
    server.add_reflection()
    try:
        await server.start(listen, lambda book: restore(book, folder))
    except OSError as error:
        raise SettingError(str(error.strerror)) from error
    _log.info("serving on %s", server.address)

    await stop.wait()
    _log.info("stopping")
    await server.stop()


if __name__ == "__main__":
    sys.exit(main())
