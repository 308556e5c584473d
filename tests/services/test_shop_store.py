"""What the shop's databases promise: what is written once is stored once, whatever other writers do."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import fcntl
import os
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from services.common.database import Database
from services.common.errors import ExhaustedError, RequestIdReusedError, UnavailableError
from services.common.migrations import migrate
from services.order import store as order_store
from services.order.domain import Item, Order, OrderNotFoundError
from services.order.store import Listing, OrderStore
from services.user import store as user_store
from services.user.domain import EmailTakenError, Name, User, UserNotFoundError
from services.user.store import UserStore
from tests.processes import eventually
from tests.services.conftest import Open

if TYPE_CHECKING:
    from tests.services.postgresql import PostgreSQL

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=dt.UTC)


def user(email: str = "ann@example.com", name: str = "Ann") -> User:
    return User.new(str(uuid.uuid4()), name=Name.of_full(name), email=email, now=NOW)


def order(user_id: str = "ann", *items: Item) -> Order:
    return Order.new(str(uuid.uuid4()), user_id=user_id, items=items or (Item("tea", 1), Item("milk", 2)), now=NOW)


async def ending(work: Awaitable[Order]) -> Order | Exception:
    try:
        return await work
    except Exception as error:
        return error


@pytest.fixture
def users(open_database: Open) -> UserStore:
    return UserStore(open_database("user", user_store.VERSIONS))


@pytest.fixture
def orders(open_database: Open) -> OrderStore:
    return OrderStore(open_database("order", order_store.VERSIONS))


async def test_a_user_is_read_as_it_was_written(users: UserStore) -> None:
    ann = await users.create(user())
    assert await users.get(ann.id) == ann
    assert (await users.get(ann.id)).create_time.tzinfo is dt.UTC


async def test_times_in_other_zones_are_stored_in_utc(users: UserStore) -> None:
    tokyo = NOW.astimezone(dt.timezone(dt.timedelta(hours=9)))
    ann = await users.create(User.new(str(uuid.uuid4()), name=Name.of_full("Ann"), email="ann@example.com", now=tokyo))
    assert (await users.get(ann.id)).create_time.isoformat() == NOW.isoformat()


async def test_a_missing_user_is_not_found_in_the_store(users: UserStore) -> None:
    with pytest.raises(UserNotFoundError):
        await users.get(str(uuid.uuid4()))


async def test_an_email_is_unique_whatever_its_case(users: UserStore) -> None:
    await users.create(user("Ann@Example.com"))
    with pytest.raises(EmailTakenError):
        await users.create(user("aNN@example.COM"))
    assert len((await users.list(10)).items) == 1


async def test_the_same_request_creates_one_user(users: UserStore) -> None:
    first = await users.create(user(), "r1")
    assert await users.create(user(), "r1") == first
    with pytest.raises(RequestIdReusedError):
        await users.create(user(name="Anne"), "r1")


async def test_a_failed_request_is_not_recorded(users: UserStore) -> None:
    await users.create(user())
    with pytest.raises(EmailTakenError):
        await users.create(user(), "r1")
    other = await users.create(user("bob@example.com"), "r1")
    assert other.email == "bob@example.com"


async def test_users_written_between_two_pages_shift_no_others(users: UserStore) -> None:
    created = [await users.create(user(f"{n}@example.com")) for n in range(5)]
    first = await users.list(3)
    late = await users.create(user("late@example.com"))
    second = await users.list(3, first.last)
    assert [*first.items, *second.items] == [*created, late]
    assert (first.more, second.more) == (True, False)


async def test_an_order_is_read_with_its_items_in_order(orders: OrderStore) -> None:
    lines = [Item(f"sku-{n}", n + 1) for n in range(12)]
    taken = await orders.create(order("ann", *lines), "r1")
    assert await orders.get(taken.id) == taken
    with pytest.raises(OrderNotFoundError):
        await orders.get(str(uuid.uuid4()))


async def test_orders_are_listed_for_everybody_and_for_one_user(orders: OrderStore) -> None:
    taken = [await orders.create(order(user_id), f"r{n}") for n, user_id in enumerate(["ann", "bob", "ann", "bob"])]
    assert list((await orders.list(10)).items) == taken
    page = await orders.list(1, listing=Listing("bob"))
    assert list(page.items) == [taken[1]]
    assert page.more
    assert list((await orders.list(1, page.last, Listing("bob"))).items) == [taken[3]]


async def test_the_same_request_creates_one_order(orders: OrderStore) -> None:
    assert await orders.find(order(), "r1") is None
    first = await orders.create(order(), "r1")
    assert await orders.create(order(), "r1") == first
    assert await orders.find(order(), "r1") == first
    with pytest.raises(RequestIdReusedError):
        await orders.create(order("bob"), "r1")
    assert list((await orders.list(10)).items) == [first]


async def test_replicas_racing_with_the_same_request_create_one_order(open_database: Open) -> None:
    replicas = [OrderStore(open_database("order", order_store.VERSIONS)) for _ in range(3)]
    taken = await asyncio.gather(*(replicas[n % 3].create(order(), "r1") for n in range(30)))
    assert len({each.id for each in taken}) == 1
    assert len((await replicas[0].list(10)).items) == 1


RACER = """
import asyncio, datetime as dt, sys, uuid
from services.common.database import Database
from services.common.migrations import migrate
from services.order.domain import Item, Order
from services.order.store import VERSIONS, OrderStore

async def race(database):
    store = OrderStore(database)
    for n in range(20):
        now = dt.datetime.now(dt.UTC)
        new = Order.new(str(uuid.uuid4()), user_id="ann", items=(Item("tea", 1),), now=now)
        print(n, (await store.create(new, f"request-{n}")).id)

database = Database(f"sqlite:///{sys.argv[1]}")
migrate(database, VERSIONS)
asyncio.run(race(database))
database.close()
"""


@pytest.mark.slow
def test_processes_that_start_and_write_concurrently_agree_on_every_order(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path / "order.db")]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [racer.communicate(timeout=30)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert len(answers[0].splitlines()) == 20
    assert answers[0] == answers[1] == answers[2]


def test_replicas_that_migrate_concurrently_all_succeed(tmp_path: Path) -> None:
    databases = [Database(f"sqlite:///{tmp_path}/user.db") for _ in range(8)]
    start = threading.Barrier(len(databases))

    def start_replica(database: Database) -> None:
        start.wait()
        migrate(database, user_store.VERSIONS)
        migrate(database, user_store.VERSIONS)
        database.close()

    with ThreadPoolExecutor(len(databases)) as replicas:
        list(replicas.map(start_replica, databases))
    with contextlib.closing(sqlite3.connect(tmp_path / "user.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_starting_replica_waits_for_one_that_migrates(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/user.db")
    with (tmp_path / "user.db.lock").open("w") as lock, ThreadPoolExecutor(1) as replica:
        fcntl.flock(lock, fcntl.LOCK_EX)
        inode = f":{os.fstat(lock.fileno()).st_ino} "
        migrated = replica.submit(migrate, database, user_store.VERSIONS)
        try:
            # A waiter's line in /proc/locks starts with an arrow.
            eventually(
                lambda: any("->" in held and inode in held for held in Path("/proc/locks").read_text().splitlines()),
                what="the replica waits for the lock",
            )
            assert not (tmp_path / "user.db").exists()
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
        migrated.result(timeout=10)
    database.close()


@pytest.mark.parametrize("store", [user_store, order_store], ids=["user", "order"])
def test_migrations_create_the_tables_that_the_store_uses(open_database: Open, store: object) -> None:
    database = open_database("any", store.VERSIONS)  # type: ignore[attr-defined]
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), store.metadata) == []  # type: ignore[attr-defined]


async def test_a_database_newer_than_the_program_is_left_alone(open_database: Open) -> None:
    newer = open_database("user", user_store.VERSIONS)
    with newer.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    older = UserStore(open_database("user", user_store.VERSIONS))
    ann = await older.create(user())
    assert await older.get(ann.id) == ann


async def test_while_another_process_holds_the_lock_reads_continue_and_writes_fail(
    open_sqlite: Open, tmp_path: Path
) -> None:
    users = UserStore(open_sqlite("user", user_store.VERSIONS))
    ann = await users.create(user())
    other = sqlite3.connect(tmp_path / "user.db", isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError, match="locked by another process"):
            await users.create(user("bob@example.com"))
        assert await users.get(ann.id) == ann
        other.execute("ROLLBACK")
    finally:
        other.close()
    await users.create(user("bob@example.com"))


async def test_a_full_database_stores_no_part_of_an_order(open_sqlite: Open) -> None:
    database = open_sqlite("order", order_store.VERSIONS)
    orders = OrderStore(database)
    many = [Item("sku", 1)] * 100

    def limit_pages(connection: sa.Connection) -> None:
        used = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {used}")

    await database.write(limit_pages)
    answers = [await ending(orders.create(order("ann", *many), f"r{n}")) for n in range(20)]
    assert isinstance(answers[-1], ExhaustedError)
    taken = [answer for answer in answers if isinstance(answer, Order)]
    assert list((await orders.list(100)).items) == taken
    assert await orders.find(order("ann", *many), "r19") is None


async def test_a_read_only_database_refuses_writes_and_serves_reads(open_sqlite: Open) -> None:
    database = open_sqlite("user", user_store.VERSIONS)
    users = UserStore(database)
    ann = await users.create(user())
    await database.write(lambda connection: connection.exec_driver_sql("PRAGMA query_only = 1"))
    with pytest.raises(UnavailableError, match="read-only"):
        await users.create(user("bob@example.com"))
    assert await users.get(ann.id) == ann


# The same on PostgreSQL.


@pytest.fixture
def open_postgresql(postgresql: PostgreSQL) -> Iterator[Callable[..., Database]]:
    """Opens the same migrated PostgreSQL database each time, with given settings."""
    url = postgresql.empty()
    opened = []

    def open_postgresql(versions: Path, **settings: str) -> Database:
        database = Database(
            url + "".join(quote(f" -c {name}={value}") for name, value in settings.items()), busy_timeout=0.2
        )
        opened.append(database)
        if not settings:
            migrate(database, versions)
        return database

    yield open_postgresql
    for database in opened:
        database.close()


@pytest.mark.slow
@pytest.mark.xdist_group("postgresql")
class TestPostgreSQL:
    async def test_while_another_holds_the_lock_reads_continue_and_writes_fail(
        self, open_postgresql: Callable[..., Database]
    ) -> None:
        database = open_postgresql(user_store.VERSIONS)
        users = UserStore(database)
        ann = await users.create(user())
        with database.engine.begin() as other:
            other.exec_driver_sql("LOCK TABLE users IN EXCLUSIVE MODE")
            with pytest.raises(UnavailableError, match="another transaction holds"):
                await users.create(user("bob@example.com"))
            assert await users.get(ann.id) == ann
        await users.create(user("bob@example.com"))

    async def test_a_full_disk_stores_no_part_of_an_order(self, open_postgresql: Callable[..., Database]) -> None:
        database = open_postgresql(order_store.VERSIONS)
        orders = OrderStore(database)

        def fill(connection: sa.Connection) -> None:
            # Raises the server's error for a full disk, in the last statement.
            connection.exec_driver_sql(
                "CREATE FUNCTION full() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE 'No space left on device' USING ERRCODE = 'disk_full'; END $$"
            )
            connection.exec_driver_sql("CREATE TRIGGER t BEFORE INSERT ON outbox EXECUTE FUNCTION full()")

        await database.write(fill)
        with pytest.raises(ExhaustedError, match="out of resources"):
            await orders.create(order(), "r1")
        assert list((await orders.list(10)).items) == []
        await database.write(lambda connection: connection.exec_driver_sql("DROP TRIGGER t ON outbox"))
        assert await orders.find(order(), "r1") is None
        await orders.create(order(), "r1")

    async def test_a_read_only_database_refuses_writes_and_serves_reads(
        self, open_postgresql: Callable[..., Database]
    ) -> None:
        ann = await UserStore(open_postgresql(user_store.VERSIONS)).create(user())
        users = UserStore(open_postgresql(user_store.VERSIONS, default_transaction_read_only="on"))
        with pytest.raises(UnavailableError, match="read-only"):
            await users.create(user("bob@example.com"))
        assert await users.get(ann.id) == ann

    async def test_lost_connections_are_reopened(
        self, open_postgresql: Callable[..., Database], postgresql: PostgreSQL
    ) -> None:
        database = open_postgresql(user_store.VERSIONS)
        users = UserStore(database)
        ann = await users.create(user())
        # Sequential units of work all use one connection.
        pid = await database.read(lambda c: c.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
        postgresql.execute(f"SELECT pg_terminate_backend({pid})")
        eventually(lambda: not postgresql.execute(f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid}"))
        with pytest.raises(UnavailableError):
            await users.get(ann.id)
        assert await users.get(ann.id) == ann

    async def test_a_missing_server_is_unavailable(self, tmp_path: Path) -> None:
        database = Database(f"postgresql://nobody@/none?host={tmp_path}")
        with pytest.raises(UnavailableError, match="connection"):
            await UserStore(database).get("any")
        database.close()


async def test_a_write_that_lost_to_another_writer_runs_again(open_database: Open) -> None:
    database = open_database("user", user_store.VERSIONS)
    runs = 0

    def lose_once(connection: sa.Connection) -> str:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise sa.exc.IntegrityError("INSERT", {}, sqlite3.IntegrityError("UNIQUE constraint failed"))
        return "found"

    assert await database.write(lose_once) == "found"


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_sqlite_database_needs_a_file(url: str) -> None:
    with pytest.raises(ValueError, match="needs a file"):
        Database(url)


async def test_in_a_group_commit_one_that_fails_is_rolled_back_without_affecting_others(open_database: Open) -> None:
    database = open_database("user", user_store.VERSIONS)
    users = UserStore(database)
    begun, go_on = threading.Event(), threading.Event()

    def hold(connection: sa.Connection) -> None:
        begun.set()
        assert go_on.wait(10)

    def fail(connection: sa.Connection) -> None:
        connection.execute(sa.update(user_store.users).values(name="nobody"))
        raise RuntimeError("on purpose")

    first = asyncio.create_task(database.write(hold))
    await asyncio.to_thread(begun.wait, 10)
    # Meanwhile these wait, and are then committed as a group.
    writes = [asyncio.create_task(users.create(user(f"{n}@example.com"))) for n in range(5)]
    writes.insert(3, asyncio.create_task(database.write(fail)))  # type: ignore[arg-type]
    writes.append(asyncio.create_task(users.create(user("3@example.com"))))
    cancelled = asyncio.create_task(users.create(user("gone@example.com")))
    await asyncio.sleep(0)
    cancelled.cancel()
    go_on.set()
    await first
    ended = await asyncio.gather(*writes, return_exceptions=True)
    assert type(ended[3]) is RuntimeError
    # Two have the same email; either may be first.
    assert Counter(type(ending) for ending in ended) == {User: 5, EmailTakenError: 1, RuntimeError: 1}
    kept = await users.list(10)
    assert {each.name.full for each in kept.items} == {"Ann"}
    assert {each.email for each in kept.items} - {"gone@example.com"} == {f"{n}@example.com" for n in range(5)}


async def test_many_writers_of_a_locked_database_wait_no_longer_than_one(open_sqlite: Open, tmp_path: Path) -> None:
    users = UserStore(open_sqlite("user", user_store.VERSIONS))
    other = sqlite3.connect(tmp_path / "user.db", isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        writes = [users.create(user(f"{n}@example.com")) for n in range(50)]
        async with asyncio.timeout(5):  # one by one: 10 s
            ended = await asyncio.gather(*writes, return_exceptions=True)
    finally:
        other.close()
    assert {type(ending) for ending in ended} == {UnavailableError}
