"""Databases of the shop's services, and their servicers behind a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from services.database import Database
from services.migrations import migrate

Open = Callable[[str, Path], Database]


@pytest.fixture
def open_database(tmp_path: Path) -> Iterator[Open]:
    """Opens a migrated SQLite database by name; more than once, as the replicas of a service do."""
    opened: list[Database] = []

    def open_database(name: str, versions: Path) -> Database:
        database = Database(f"sqlite:///{tmp_path / name}.db", busy_timeout=0.2)
        opened.append(database)
        migrate(database, versions)
        return database

    yield open_database
    for database in opened:
        database.close()


@asynccontextmanager
async def serving(add: Callable[[grpc.aio.Server], None]) -> AsyncIterator[grpc.aio.Channel]:
    """A plain channel to a plain server on a real socket."""
    server = grpc.aio.server()
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)
