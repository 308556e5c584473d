"""A service's database: units of work off the event loop, and errors that a caller can understand.

A unit of work is a plain function of a SQLAlchemy connection, run in one transaction in one thread hop. SQLite is the
default: several replicas on one machine share a file, in WAL mode, where readers and writers don't wait for each other.
PostgreSQL is for replicas on several machines.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import datetime as dt
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import sqlalchemy as sa

from services.common.errors import ExhaustedError, RefusedError, UnavailableError

Result = TypeVar("Result")

BUSY_TIMEOUT = 5.0
"""Seconds that a writer waits for those who hold what it needs, before it gives up."""

CONNECT_TIMEOUT = 5
"""Seconds that PostgreSQL has to accept a connection."""

TOGETHER = 64
"""Units of work that SQLite keeps in one transaction, at the most."""

WORKERS = 4
"""Units of work that may read at a time, and as many that may write, on PostgreSQL."""

# SQLite's primary result codes, and what they mean to a caller. Others are bugs, and stay what they are.
_SQLITE_REFUSALS: Mapping[int, tuple[type[RefusedError], str, str]] = {
    sqlite3.SQLITE_BUSY: (UnavailableError, "DATABASE_LOCKED", "the database is locked by another process"),
    sqlite3.SQLITE_LOCKED: (UnavailableError, "DATABASE_LOCKED", "the database is locked by another connection"),
    sqlite3.SQLITE_READONLY: (UnavailableError, "DATABASE_READ_ONLY", "the database is read-only"),
    sqlite3.SQLITE_CANTOPEN: (UnavailableError, "DATABASE_AWAY", "the database can't be opened"),
    sqlite3.SQLITE_IOERR: (UnavailableError, "DATABASE_AWAY", "the database can't be read or written"),
    sqlite3.SQLITE_FULL: (ExhaustedError, "DATABASE_FULL", "the database, or the disk under it, is full"),
}

# PostgreSQL's SQLSTATEs, by their longest prefix that is here.
_POSTGRESQL_REFUSALS: Mapping[str, tuple[type[RefusedError], str, str]] = {
    "08": (UnavailableError, "DATABASE_AWAY", "the connection to the database is lost"),
    "57P": (UnavailableError, "DATABASE_AWAY", "the database is shutting down or starting"),
    "25006": (UnavailableError, "DATABASE_READ_ONLY", "the database is read-only"),
    "40": (UnavailableError, "DATABASE_LOCKED", "another transaction was in the way"),
    "55P03": (UnavailableError, "DATABASE_LOCKED", "another transaction holds what this one needs"),
    "57014": (UnavailableError, "DATABASE_SLOW", "the database took too long"),
    "53": (ExhaustedError, "DATABASE_FULL", "the database has no room for it"),
    "53300": (UnavailableError, "DATABASE_BUSY", "the database takes no more connections"),
    "58": (UnavailableError, "DATABASE_AWAY", "the database can't read or write its files"),
}


class UtcDateTime(sa.TypeDecorator[dt.datetime]):
    """An instant, aware and in UTC on both sides, whether or not the database keeps time zones (SQLite doesn't)."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:  # noqa: ARG002
        return None if value is None else value.astimezone(dt.UTC)

    def process_result_value(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
"""The type of a string that is listed in order, or by prefix: by code points, in both databases."""

SEQUENCE = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""The type of an auto-incremented key (SQLite increments INTEGER alone)."""


class Database:
    """One service's database: SQLite, or PostgreSQL by psycopg.

    ``url``: a SQLAlchemy URL; SQLite needs a file. ``busy_timeout``: seconds that a writer waits for those who hold
    what it needs (SQLite's one writer, PostgreSQL's locks). ``file``: the SQLite database; None on PostgreSQL.

    Reads and writes have threads of their own, so that writers which wait for a lock don't hold up reads. SQLite gets
    one of each: it has one writer at a time whatever we do, and its reads are CPU, which a second thread would only
    slow down (the two pass the GIL to and fro: 380 µs a read instead of 260). Its units of work that wait to write are
    kept together, in one transaction with a savepoint for each: so they wait for the disk once, and not one after the
    other.

    Raises ValueError for a URL that can't be used, ImportError for one whose driver isn't installed.
    """

    def __init__(self, url: str | sa.URL, *, busy_timeout: float = BUSY_TIMEOUT) -> None:
        self._url = sa.make_url(url)
        kind = self._url.get_backend_name()
        if kind not in {"sqlite", "postgresql"}:
            raise ValueError(f"a database is SQLite or PostgreSQL: sqlite:///..., postgresql://...; this is {kind}")
        if kind == "sqlite":
            if self._url.database in {None, "", ":memory:"}:
                raise ValueError("a SQLite database needs a file: sqlite:///path/to/file.db")
            self.file: Path | None = Path(str(self._url.database))
            workers = 1
            connect_args: dict[str, Any] = {"timeout": busy_timeout}
        else:
            self.file = None
            workers = WORKERS
            connect_args = {
                "connect_timeout": CONNECT_TIMEOUT,
                "options": f"{self._url.query.get('options', '')} -c lock_timeout={round(busy_timeout * 1000)}",
            }
        self.engine = sa.create_engine(
            self._url,
            pool_size=2 * workers,
            max_overflow=0,
            connect_args=connect_args,
            hide_parameters=True,  # they are personal data, and errors are logged
        )
        if kind == "sqlite":
            sa.event.listen(self.engine, "connect", _leave_transactions_to_us)
            sa.event.listen(self.engine, "begin", _begin)
            self._for_reads: sa.Engine = self.engine
            self._for_writes: sa.Engine = self.engine.execution_options(begin="BEGIN IMMEDIATE")
        else:
            # One state for all that a unit of work reads, as a transaction of SQLite has by itself.
            self._for_reads = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            self._for_writes = self.engine
        self._waiting: collections.deque[_Unit] = collections.deque()  # to be written to SQLite
        self._readers = ThreadPoolExecutor(workers, "database-read")
        self._writers = ThreadPoolExecutor(workers, "database-write")

    def __repr__(self) -> str:
        return f"<Database {self.where}>"

    @property
    def where(self) -> str:
        """SQLite's file, or PostgreSQL's URL without the password."""
        if self.file is not None:
            return str(self.file)
        return self._url.set(query={}).render_as_string(hide_password=True)  # a password may be in the query, too

    async def read(self, work: Callable[[sa.Connection], Result]) -> Result:
        """Run ``work`` in a transaction that sees one state of the database and changes nothing.

        Raises what ``work`` raises; UnavailableError or ExhaustedError when the database can't serve it now.
        """
        return await asyncio.get_running_loop().run_in_executor(self._readers, _perform, self._for_reads, work)

    def read_blocking(self, work: Callable[[sa.Connection], Result]) -> Result:
        """Run ``work``, which only reads, in this thread: for what happens before there is a loop."""
        return _perform(self.engine, work)

    async def write(self, work: Callable[[sa.Connection], Result]) -> Result:
        """Run ``work`` in a transaction that is kept whole, or not at all if it raises.

        Once begun it ends, even if the caller is cancelled. ``work`` may look before it inserts, and may run more than
        once: where writers run side by side (PostgreSQL), a key that another takes in between makes it run once more,
        and then its look finds the other's row. Raises as ``read`` does.
        """
        if self.file is None:
            return await asyncio.get_running_loop().run_in_executor(self._writers, self.write_blocking, work)
        unit = _Unit(work)
        self._waiting.append(unit)
        # Whoever comes first performs all that wait; the others then find nothing to do.
        self._writers.submit(self._write_waiting)
        return cast("Result", await asyncio.wrap_future(unit.ending))

    def write_blocking(self, work: Callable[[sa.Connection], Result]) -> Result:
        """As ``write``, in this thread: for what happens before there is a loop."""
        try:
            return _perform(self._for_writes, work)
        except sa.exc.IntegrityError:
            return _perform(self._for_writes, work)

    def _write_waiting(self) -> None:
        units: list[_Unit] = []
        while self._waiting and len(units) < TOGETHER:
            unit = self._waiting.popleft()
            if unit.ending.set_running_or_notify_cancel():
                units.append(unit)
        if len(units) > 1 and self._keep_together(units):
            return
        for unit in units:
            try:
                unit.ending.set_result(self.write_blocking(unit.work))
            except BaseException as error:
                unit.ending.set_exception(error)

    def _keep_together(self, units: Sequence[_Unit]) -> bool:
        """Perform ``units`` in one transaction. False when the database failed on the way, and kept none of them."""
        with contextlib.ExitStack() as stack:
            try:
                with _refusals():
                    connection = stack.enter_context(self._for_writes.connect())
                    transaction = connection.begin()
            except Exception as error:
                for unit in units:
                    unit.ending.set_exception(error)
                return True
            try:
                endings = [_saved(connection, unit.work) for unit in units]
                transaction.commit()
            except (sa.exc.DBAPIError, sqlite3.Error):
                return False
        for unit, (result, raised) in zip(units, endings, strict=True):
            if raised is None:
                unit.ending.set_result(result)
            else:
                unit.ending.set_exception(raised)
        return True

    def use_wal(self) -> None:
        """Have the SQLite file keep a write-ahead log, for good. Fails when another process does the same now."""
        with _refusals(), contextlib.closing(self.engine.raw_connection()) as connection:
            connection.cursor().execute("PRAGMA journal_mode = WAL")

    def close(self) -> None:
        """Wait for the units of work that have begun, drop those that haven't, and close the connections."""
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown(cancel_futures=True)
        for unit in self._waiting:
            unit.ending.cancel()
        self.engine.dispose()


class _Unit:
    """A unit of work that waits to be written, and how it ends."""

    def __init__(self, work: Callable[[sa.Connection], Any]) -> None:
        self.work = work
        self.ending: Future[Any] = Future()


def _saved(connection: sa.Connection, work: Callable[[sa.Connection], Any]) -> tuple[Any, Exception | None]:
    """What ``work`` returns, or raises: then nothing of it is kept. The database's own errors are raised."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    driver.execute("SAVEPOINT unit")
    try:
        result, raised = work(connection), None
    except (sa.exc.DBAPIError, sqlite3.Error):
        raise
    except Exception as error:
        result, raised = None, error
        driver.execute("ROLLBACK TO unit")
    driver.execute("RELEASE unit")
    return result, raised


def _perform(engine: sa.Engine, work: Callable[[sa.Connection], Result]) -> Result:
    with _refusals(), engine.begin() as connection:
        return work(connection)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Have errors of the database that a caller can understand raised as such."""
    try:
        yield
    except (sa.exc.DBAPIError, sqlite3.Error) as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        raise refusal from error


def _refusal(error: sa.exc.DBAPIError | sqlite3.Error) -> RefusedError | None:
    """What a caller is told when the database can't serve it now; None when the error is a bug of ours."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    if isinstance(cause, sqlite3.Error):
        # Raised by the sqlite3 module itself, an error has no code.
        found = _SQLITE_REFUSALS.get(getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF)
    else:
        # A connection that failed before the database said anything has no state.
        state = getattr(cause, "sqlstate", None) or ("08" if isinstance(error, sa.exc.OperationalError) else "")
        prefixes = (state[:length] for length in range(len(state), 0, -1))
        found = next((_POSTGRESQL_REFUSALS[prefix] for prefix in prefixes if prefix in _POSTGRESQL_REFUSALS), None)
    if found is not None:
        kind, reason, message = found
        return kind(reason, message)
    if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
        return UnavailableError("DATABASE_AWAY", "the connection to the database is lost")
    return None


def _leave_transactions_to_us(connection: sqlite3.Connection, _record: object) -> None:
    """Keep the sqlite3 module from opening transactions by itself: it would do so late, and never IMMEDIATE."""
    connection.isolation_level = None


def _begin(connection: sa.Connection) -> None:
    # A deferred transaction that turns to writing after another's write fails at once, whatever the busy timeout; so a
    # writer takes the lock, and waits for it, first.
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    driver.execute(connection.get_execution_options().get("begin", "BEGIN"))
