"""A service's process, from startup to exit code."""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog

from mesh.server.settings import ServerSettings
from services.common import logs, settings
from services.common.database import Database
from services.common.errors import RefusedError
from services.common.migrations import migrate

log = structlog.stdlib.get_logger()

STARTUP_ERRORS = (ValueError, OSError, ImportError, RefusedError, sa.exc.SQLAlchemyError, sqlite3.Error)
"""Errors at startup that are not bugs of the service."""

Own = TypeVar("Own", bound=settings.Settings)
Serve = Callable[[Database, Own, ServerSettings], Coroutine[Any, Any, int]]

CANNOT_START = 2
"""The exit code of a process that would fail in the same way if it were restarted."""


class CannotStartError(Exception):
    """Raised by ``serve`` at startup, when a restart would fail in the same way; the message is one line."""


def main(service: str, versions: Path, serve: Serve[Own], kind: type[Own]) -> int:
    """Run ``service``, with its database migrated to the newest of ``versions``; returns the exit code.

    ``serve`` serves until it is signalled to stop; ``kind`` is the class of the service's own settings. If the service
    can't start (an invalid variable, a data folder that isn't writable, an unreachable database), it prints one line to
    stderr and exits with code 2.
    """
    argparse.ArgumentParser(
        prog=f"python -m services.{service}",
        description=f"The shop's {service} service. Settings come from the environment, then from a file.",
        epilog=settings.describe(kind),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        settings.read_file()
        own, server = kind.from_env(), settings.server_settings()
        logs.configure(service, own.log_level)
        database = _open(service, own, versions)
    except STARTUP_ERRORS as error:
        return _cannot_start(service, error.orig if isinstance(error, sa.exc.DBAPIError) else error)
    log.info("starting", listen=server.listen, database=database.location)
    try:
        return asyncio.run(serve(database, own, server))
    except CannotStartError as error:
        return _cannot_start(service, error)
    finally:
        database.close()
        log.info("stopped")


def _cannot_start(service: str, why: BaseException | None) -> int:
    print(f"{service}: {' '.join(str(why).split())}", file=sys.stderr)
    return CANNOT_START


def _open(service: str, own: settings.Settings, versions: Path) -> Database:
    url = own.database(service)
    if not own.database_url:
        try:
            own.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"MESH_DATA={str(own.data)!r}: can't create the data folder: {error.strerror}") from None
    database = Database(url)
    try:
        migrate(database, versions)
    except BaseException:
        database.close()
        raise
    return database
