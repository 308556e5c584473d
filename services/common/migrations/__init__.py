"""Migrates a service's database to the newest schema when the service starts.

Each service has its alembic revisions in its own ``versions`` folder; ``env.py`` here is for all of them. Revisions
only go forward, and keep what the previous release uses: replicas of both may run side by side.
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

_POSTGRESQL_LOCK = 0x77656674  # "weft": any number that nothing else locks in the same database


def migrate(database: Database, versions: Path) -> None:
    """Apply the revisions in the folder ``versions`` that the database doesn't have yet: all of them, or none.

    Replicas that start at the same time take turns, and the first does the work. A database that is newer than this
    program is left alone. Raises OSError if the database's folder isn't writable, and what ``Database.write`` raises.
    """
    known = sorted(path.name[1:5] for path in versions.glob("v[0-9]*.py"))  # v0001_users.py is revision 0001

    def work(connection: sa.Connection) -> None:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_POSTGRESQL_LOCK)))
        current = _revision(connection)
        if current == known[-1]:
            return
        if current is not None and current not in known:
            log.warning("the database schema is newer than this program", revision=current)
            return
        _upgrade(connection, versions)

    with _locked(database):
        database.write_blocking(work)


def _revision(connection: sa.Connection) -> str | None:
    """The schema's revision, as recorded by alembic; None before the first."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return revision


def _upgrade(connection: sa.Connection, versions: Path) -> None:
    # Imported here: it takes a quarter of a service's startup, and usually the schema is current.
    import alembic.command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", str(versions).replace("%", "%%"))
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")


@contextlib.contextmanager
def _locked(database: Database) -> Iterator[None]:
    """Lock a SQLite file against other migrations. Also switches it to WAL, as concurrent switches fail."""
    if database.file is None:
        yield
        return
    lock_file = database.file.with_name(f"{database.file.name}.lock")
    _create_private(lock_file)
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _create_private(database.file)  # SQLite copies this mode to its other files
        database.use_wal()
        yield


def _create_private(file: Path) -> None:
    """Create a file that only this user can access, unless it exists."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
