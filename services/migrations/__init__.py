"""Brings a service's database to the newest schema when the service starts.

Each service keeps its alembic revisions in its own ``versions`` folder; ``env.py`` here serves them all. Revisions go
forwards only, and keep what the release before them uses: replicas of both may run side by side.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import alembic.command
import sqlalchemy as sa
import structlog
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from services.database import Database

log = structlog.stdlib.get_logger()

_POSTGRESQL_LOCK = 0x77656674  # "weft": any number that no other program locks in the same database


def migrate(database: Database, versions: Path) -> None:
    """Apply the revisions in the folder ``versions`` that the database doesn't have: all of them, or none.

    Replicas that start together take turns, and the first does the work. A database that is newer than this program is
    left as it is. Raises OSError when the database's folder can't be written, and what ``Database.write`` raises.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", str(versions).replace("%", "%%"))

    def work(connection: sa.Connection) -> None:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_POSTGRESQL_LOCK)))
        current = MigrationContext.configure(connection).get_current_revision()
        script = ScriptDirectory.from_config(config)
        if current == script.get_current_head():
            return
        if current is not None and current not in {known.revision for known in script.walk_revisions()}:
            log.warning("schema is newer than this program", revision=current)
            return
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")

    with _turn(database):
        database.write_blocking(work)


@contextlib.contextmanager
def _turn(database: Database) -> Iterator[None]:
    """One process at a time on a SQLite file. It gets its WAL here, too: the switch waits for no other's switch."""
    if database.file is None:
        yield
        return
    with database.file.with_name(f"{database.file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        database.use_wal()
        yield
