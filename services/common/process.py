"""A service's process, from its start to its exit code."""

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

CANNOT = (ValueError, OSError, ImportError, RefusedError, sa.exc.SQLAlchemyError, sqlite3.Error)
"""What a service may raise before it serves, for reasons outside of it."""

Own = TypeVar("Own", bound=settings.Settings)
Serve = Callable[[Database, Own, ServerSettings], Coroutine[Any, Any, int]]

CANNOT_START = 2
"""The exit code of a process that would fail again in the same way."""


class CannotStartError(Exception):
    """What ``serve`` raises, before it serves, when it would fail again in the same way; says why in one line."""


def main(service: str, versions: Path, serve: Serve[Own], kind: type[Own]) -> int:
    """Run ``service`` with its database brought to the newest of ``versions``; returns the exit code.

    ``serve`` serves until it is told to stop; ``kind`` is what it is told, beside how to serve. What keeps the service
    from starting (a wrong variable, a data folder that can't be written, a database that can't be reached) is said in
    one line on stderr, with exit code 2.
    """
    argparse.ArgumentParser(
        prog=f"python -m services.{service}",
        description=f"The shop's {service} service. It reads its settings from the environment, then from a file.",
        epilog=settings.describe(kind),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        settings.read_file()
        own, server = kind.from_env(), settings.server_settings()
        logs.configure(service, own.log_level)
        database = _open(service, own, versions)
    except CANNOT as error:
        return _cannot_start(service, error.orig if isinstance(error, sa.exc.DBAPIError) else error)
    log.info("starting", listen=server.listen, database=database.where)
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
            raise ValueError(f"MESH_DATA={str(own.data)!r}: can't be a data folder: {error.strerror}") from None
    database = Database(url)
    try:
        migrate(database, versions)
    except BaseException:
        database.close()
        raise
    return database
