"""A service's database: transactions off the event loop, and errors that make sense to a caller.

A unit of work is a plain function of a SQLAlchemy connection, run in one transaction on a worker thread. SQLite is the
default: several replicas on one machine share a file in WAL mode, where readers and writers don't block each other.
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
"""Seconds that a writer waits for a lock before it gives up."""

CONNECT_TIMEOUT = 5
"""Seconds that PostgreSQL has to accept a connection."""

MAX_GROUP = 64
"""Units of work that SQLite commits together, at most."""

POSTGRESQL_THREADS = 4
"""Threads for reads on PostgreSQL, and as many for writes."""

# SQLite's primary result codes, and what they mean to a caller. Others are bugs, and are raised as they are.
_SQLITE_REFUSALS: Mapping[int, tuple[type[RefusedError], str, str]] = {
    sqlite3.SQLITE_BUSY: (UnavailableError, "DATABASE_LOCKED", "the database is locked by another process"),
    sqlite3.SQLITE_LOCKED: (UnavailableError, "DATABASE_LOCKED", "the database is locked by another connection"),
    sqlite3.SQLITE_READONLY: (UnavailableError, "DATABASE_READ_ONLY", "the database is read-only"),
    sqlite3.SQLITE_CANTOPEN: (UnavailableError, "DATABASE_AWAY", "can't open the database"),
    sqlite3.SQLITE_IOERR: (UnavailableError, "DATABASE_AWAY", "can't read or write the database"),
    sqlite3.SQLITE_FULL: (ExhaustedError, "DATABASE_FULL", "the database, or the disk under it, is full"),
}

# PostgreSQL's SQLSTATEs; the longest matching prefix counts.
_POSTGRESQL_REFUSALS: Mapping[str, tuple[type[RefusedError], str, str]] = {
    "08": (UnavailableError, "DATABASE_AWAY", "lost the connection to the database"),
    "57P": (UnavailableError, "DATABASE_AWAY", "the database is shutting down or starting"),
    "25006": (UnavailableError, "DATABASE_READ_ONLY", "the database is read-only"),
    "40": (UnavailableError, "DATABASE_LOCKED", "conflict with another transaction"),
    "55P03": (UnavailableError, "DATABASE_LOCKED", "another transaction holds a lock"),
    "57014": (UnavailableError, "DATABASE_SLOW", "the database took too long"),
    "53": (ExhaustedError, "DATABASE_FULL", "the database is out of resources"),
    "53300": (UnavailableError, "DATABASE_BUSY", "the database accepts no more connections"),
    "58": (UnavailableError, "DATABASE_AWAY", "the database can't read or write its files"),
}


class UtcDateTime(sa.TypeDecorator[dt.datetime]):
    """A UTC datetime on both sides, whether or not the database stores time zones (SQLite doesn't)."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:  # noqa: ARG002
        return None if value is None else value.astimezone(dt.UTC)

    def process_result_value(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
"""The type of a string that lists are sorted by or filtered by prefix: compared by code points in both databases."""

SEQUENCE = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""The type of an auto-incremented key (SQLite increments only INTEGER)."""


class Database:
    """One service's database: SQLite, or PostgreSQL with psycopg.

    ``url``: a SQLAlchemy URL; SQLite needs a file. ``busy_timeout``: seconds that a writer waits for a lock (SQLite's
    single writer, PostgreSQL's locks). ``file``: the SQLite database; None on PostgreSQL.

    Reads and writes have separate threads, so that writers waiting for a lock don't block reads. SQLite gets one of
    each: it has a single writer anyway, and its reads are CPU-bound, which a second thread would only slow down (the
    two hand the GIL back and forth: 380 µs a read instead of 260). Its pending writes are committed as a group, in one
    transaction with a savepoint for each: so they wait for the disk once, not one after another.

    Raises ValueError for an unusable URL, ImportError if the URL's driver isn't installed.
    """

    def __init__(self, url: str | sa.URL, *, busy_timeout: float = BUSY_TIMEOUT) -> None:
        self._url = sa.make_url(url)
        kind = self._url.get_backend_name()
        if kind not in {"sqlite", "postgresql"}:
            raise ValueError(f"unsupported database {kind}; expected sqlite:///... or postgresql://...")
        if kind == "sqlite":
            if self._url.database in {None, "", ":memory:"}:
                raise ValueError("SQLite needs a file: sqlite:///path/to/file.db")
            self.file: Path | None = Path(str(self._url.database))
            workers = 1
            connect_args: dict[str, Any] = {"timeout": busy_timeout}
        else:
            self.file = None
            workers = POSTGRESQL_THREADS
            connect_args = {
                "connect_timeout": CONNECT_TIMEOUT,
                "options": f"{self._url.query.get('options', '')} -c lock_timeout={round(busy_timeout * 1000)}",
            }
        self.engine = sa.create_engine(
            self._url,
            pool_size=2 * workers,
            max_overflow=0,
            connect_args=connect_args,
            hide_parameters=True,  # parameters are personal data, and errors are logged
        )
        if kind == "sqlite":
            sa.event.listen(self.engine, "connect", _disable_implicit_transactions)
            sa.event.listen(self.engine, "begin", _begin)
            self._for_reads: sa.Engine = self.engine
            self._for_writes: sa.Engine = self.engine.execution_options(begin="BEGIN IMMEDIATE")
        else:
            # A unit of work reads one snapshot, as transactions in SQLite always do.
            self._for_reads = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            self._for_writes = self.engine
        self._pending: collections.deque[_PendingWrite] = collections.deque()  # only for SQLite
        self._readers = ThreadPoolExecutor(workers, "database-read")
        self._writers = ThreadPoolExecutor(workers, "database-write")

    def __repr__(self) -> str:
        return f"<Database {self.location}>"

    @property
    def location(self) -> str:
        """SQLite's file, or PostgreSQL's URL without its password."""
        if self.file is not None:
            return str(self.file)
        return self._url.set(query={}).render_as_string(hide_password=True)  # a password may be in the query, too

    async def read(self, work: Callable[[sa.Connection], Result]) -> Result:
        """Run ``work`` in a read-only transaction that sees one snapshot of the database.

        Raises what ``work`` raises, and UnavailableError or ExhaustedError when the database can't serve it now.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._readers, _run_in_transaction, self._for_reads, work
        )

    def read_blocking(self, work: Callable[[sa.Connection], Result]) -> Result:
        """Like ``read``, in this thread: for use before the event loop runs."""
        return _run_in_transaction(self.engine, work)

    async def write(self, work: Callable[[sa.Connection], Result]) -> Result:
        """Run ``work`` in a transaction, which is rolled back if it raises.

        Once begun it finishes, even if the caller is cancelled. ``work`` may check for a row before it inserts one, and
        may run more than once: when a concurrent writer (PostgreSQL) inserts the same key after the check, ``work``
        runs again, and then finds the other's row. Raises what ``read`` does.
        """
        if self.file is None:
            return await asyncio.get_running_loop().run_in_executor(self._writers, self.write_blocking, work)
        unit = _PendingWrite(work)
        self._pending.append(unit)
        # The first to run commits all pending writes; the others then find nothing to do.
        self._writers.submit(self._write_pending)
        return cast("Result", await asyncio.wrap_future(unit.future))

    def write_blocking(self, work: Callable[[sa.Connection], Result]) -> Result:
        """Like ``write``, in this thread: for use before the event loop runs."""
        try:
            return _run_in_transaction(self._for_writes, work)
        except sa.exc.IntegrityError:
            return _run_in_transaction(self._for_writes, work)

    def _write_pending(self) -> None:
        units: list[_PendingWrite] = []
        while self._pending and len(units) < MAX_GROUP:
            unit = self._pending.popleft()
            if unit.future.set_running_or_notify_cancel():
                units.append(unit)
        if len(units) > 1 and self._group_commit(units):
            return
        for unit in units:
            try:
                unit.future.set_result(self.write_blocking(unit.work))
            except BaseException as error:
                unit.future.set_exception(error)

    def _group_commit(self, units: Sequence[_PendingWrite]) -> bool:
        """Run ``units`` in one transaction. Returns False if the database failed and rolled back all of them."""
        with contextlib.ExitStack() as stack:
            try:
                with _translated_errors():
                    connection = stack.enter_context(self._for_writes.connect())
                    transaction = connection.begin()
            except Exception as error:
                for unit in units:
                    unit.future.set_exception(error)
                return True
            try:
                results = [_run_in_savepoint(connection, unit.work) for unit in units]
                transaction.commit()
            except (sa.exc.DBAPIError, sqlite3.Error):
                return False
        for unit, (result, raised) in zip(units, results, strict=True):
            if raised is None:
                unit.future.set_result(result)
            else:
                unit.future.set_exception(raised)
        return True

    def use_wal(self) -> None:
        """Switch the SQLite file to a write-ahead log, permanently. Fails if another process does so at the same
        time."""
        with _translated_errors(), contextlib.closing(self.engine.raw_connection()) as connection:
            connection.cursor().execute("PRAGMA journal_mode = WAL")

    def close(self) -> None:
        """Wait for units of work that have begun, cancel those that haven't, and close the connections."""
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown(cancel_futures=True)
        for unit in self._pending:
            unit.future.cancel()
        self.engine.dispose()


class _PendingWrite:
    """A unit of work that waits to be written, and its result."""

    def __init__(self, work: Callable[[sa.Connection], Any]) -> None:
        self.work = work
        self.future: Future[Any] = Future()


def _run_in_savepoint(connection: sa.Connection, work: Callable[[sa.Connection], Any]) -> tuple[Any, Exception | None]:
    """What ``work`` returns or raises; if it raises, it is rolled back. Errors of the database are raised."""
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


def _run_in_transaction(engine: sa.Engine, work: Callable[[sa.Connection], Result]) -> Result:
    with _translated_errors(), engine.begin() as connection:
        return work(connection)


@contextlib.contextmanager
def _translated_errors() -> Iterator[None]:
    """Raise database errors that concern the caller as errors of ``services.common.errors``."""
    try:
        yield
    except (sa.exc.DBAPIError, sqlite3.Error) as error:
        translated = _translate(error)
        if translated is None:
            raise
        raise translated from error


def _translate(error: sa.exc.DBAPIError | sqlite3.Error) -> RefusedError | None:
    """The error for the caller when the database can't serve it now; None if the error is a bug of ours."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    if isinstance(cause, sqlite3.Error):
        # Errors that the sqlite3 module itself raises have no code.
        found = _SQLITE_REFUSALS.get(getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF)
    else:
        # A connection that failed before the database answered has no SQLSTATE.
        state = getattr(cause, "sqlstate", None) or ("08" if isinstance(error, sa.exc.OperationalError) else "")
        prefixes = (state[:length] for length in range(len(state), 0, -1))
        found = next((_POSTGRESQL_REFUSALS[prefix] for prefix in prefixes if prefix in _POSTGRESQL_REFUSALS), None)
    if found is not None:
        kind, reason, message = found
        return kind(reason, message)
    if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
        return UnavailableError("DATABASE_AWAY", "lost the connection to the database")
    return None


def _disable_implicit_transactions(connection: sqlite3.Connection, _record: object) -> None:
    """Keep the sqlite3 module from beginning transactions: it would do so too late, and never IMMEDIATE."""
    connection.isolation_level = None


def _begin(connection: sa.Connection) -> None:
    # A deferred transaction that starts to write after another has written fails immediately, whatever the busy
    # timeout; so a writer acquires the lock first, and waits for it.
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    driver.execute(connection.get_execution_options().get("begin", "BEGIN"))
