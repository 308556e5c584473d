"""A service's process, from its start to its exit code."""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog
from alembic.util import CommandError

from mesh.server.settings import ServerSettings
from services import logs, settings
from services.database import Database
from services.errors import RefusedError
from services.migrations import migrate

log = structlog.stdlib.get_logger()

CANNOT = (ValueError, OSError, ImportError, RefusedError, CommandError, sa.exc.SQLAlchemyError, sqlite3.Error)
"""What a service may raise before it serves, for reasons outside of it."""

Serve = Callable[[Database, ServerSettings], Coroutine[Any, Any, int]]

CANNOT_START = 2
"""The exit code of a process that would fail again in the same way."""


def main(service: str, versions: Path, serve: Serve) -> int:
    """Run ``service`` with its database brought to the newest of ``versions``; returns the exit code.

    ``serve`` serves until it is told to stop. What keeps the service from starting (a wrong variable, a data folder
    that can't be written, a database that can't be reached) is said in one line on stderr, with exit code 2.
    """
    argparse.ArgumentParser(
        prog=f"python -m services.{service}",
        description=f"The shop's {service} service. It is told what to do by its environment.",
        epilog=settings.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        own, server = settings.Settings.from_env(), settings.server_settings()
        logs.configure(service, own.log_level)
        database = _open(service, own, versions)
    except CANNOT as error:
        cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        print(f"{service}: {' '.join(str(cause).split())}", file=sys.stderr)
        return CANNOT_START
    log.info("starting", listen=server.listen, database=repr(database))
    try:
        return asyncio.run(serve(database, server))
    finally:
        database.close()
        log.info("stopped")


def _open(service: str, own: settings.Settings, versions: Path) -> Database:
    url = own.database(service)
    if not own.database_url:
        try:
            own.data.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"MESH_DATA={str(own.data)!r}: can't be a data folder: {error.strerror}") from None
    database = Database(url)
    try:
        migrate(database, versions)
    except BaseException:
        database.close()
        raise
    return database
