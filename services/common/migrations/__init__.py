"""Brings a service's database to the newest schema when the service starts.

Each service keeps its alembic revisions in its own ``versions`` folder; ``env.py`` here serves them all. Revisions go
forwards only, and keep what the release before them uses: replicas of both may run side by side.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
import structlog

from services.common.database import Database

log = structlog.stdlib.get_logger()

_POSTGRESQL_LOCK = 0x77656674  # "weft": any number that no other program locks in the same database


def migrate(database: Database, versions: Path) -> None:
    """Apply the revisions in the folder ``versions`` that the database doesn't have: all of them, or none.

    Replicas that start together take turns, and the first does the work. A database that is newer than this program is
    left as it is. Raises OSError when the database's folder can't be written, and what ``Database.write`` raises.
    """
    known = sorted(path.name[1:5] for path in versions.glob("v[0-9]*.py"))  # v0001_users.py is revision 0001

    def work(connection: sa.Connection) -> None:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_POSTGRESQL_LOCK)))
        current = _revision(connection)
        if current == known[-1]:
            return
        if current is not None and current not in known:
            log.warning("schema is newer than this program", revision=current)
            return
        _upgrade(connection, versions)

    with _turn(database):
        database.write_blocking(work)


def _revision(connection: sa.Connection) -> str | None:
    """The schema's revision, as alembic has written it down; None before the first."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return revision


def _upgrade(connection: sa.Connection, versions: Path) -> None:
    # Imported where it is needed: it takes a quarter of a service's start, and most starts find the schema current.
    import alembic.command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", str(versions).replace("%", "%%"))
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")


@contextlib.contextmanager
def _turn(database: Database) -> Iterator[None]:
    """One process at a time on a SQLite file. It gets its WAL here, too: the switch waits for no other's switch."""
    if database.file is None:
        yield
        return
    lock_file = database.file.with_name(f"{database.file.name}.lock")
    _create_private(lock_file)
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _create_private(database.file)  # SQLite gives its other files the same mode
        database.use_wal()
        yield


def _create_private(file: Path) -> None:
    """Create a file for this user alone, unless it is there."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
