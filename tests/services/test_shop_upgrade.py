"""A new release beside the old one: on a database with data and writers, without errors on either side."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.common.database import Database
from services.common.migrations import migrate
from services.common.paging import Page
from services.events.memory import MemoryBus
from services.events.relay import Relay
from services.notification import store as notification_store
from services.notification.store import NotificationStore
from services.order import store as order_store
from services.order.domain import Item, Money, Order, State
from services.order.store import OrderStore
from services.user import store as user_store
from services.user.domain import Name, User
from services.user.store import Listing, UserStore
from tests.processes import REPOSITORY
from tests.services import release_0001

NOW = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)

VERSIONS = {
    "user": user_store.VERSIONS,
    "order": order_store.VERSIONS,
    "notification": notification_store.VERSIONS,
}


@pytest.fixture
def old(database_url: Callable[[str], str], tmp_path: Path) -> Iterator[Callable[..., Database]]:
    """A service's database, as created by the first release or by a later revision."""
    with contextlib.ExitStack() as stack:

        def old(service: str, revision: int = 1) -> Database:
            first = tmp_path / "versions"
            first.mkdir()
            for number in range(1, revision + 1):
                (version,) = VERSIONS[service].glob(f"v{number:04}_*.py")
                (first / version.name).write_text(version.read_text())
            database = Database(database_url(service))
            stack.callback(database.close)
            migrate(database, first)
            return database

        yield old


async def test_users_of_the_old_release_are_users_of_the_new(old: Callable[..., Database]) -> None:
    database = old("user")
    before = [await release_0001.write(database, "user") for _ in range(3)]
    migrate(database, VERSIONS["user"])
    after = [await release_0001.write(database, "user") for _ in range(3)]
    users = UserStore(database)
    assert [user.id for user in await users.get_all(before + after)] == before + after
    listed = await users.list(10, None, Listing(order_by="name"))
    assert {user.id for user in listed.items} == {*before, *after}
    for user_id in (before[0], after[0]):
        user = await users.get(user_id)
        assert (user.version, user.delete_time, user.name.given) == (1, None, "Old")
        changed = await users.change(user_id, user.etag, lambda user: user.changed(NOW, name=Name.of_parts("N", "W")))
        assert await users.get(user_id) == changed
    new = User.new(str(uuid.uuid4()), name=Name.of_parts("Ann", "Smith"), email="ann@example.com", now=NOW)
    await users.create(new)
    found = await database.read(
        lambda connection: connection.execute(
            sa.text("SELECT name, email FROM users WHERE id = :id"), {"id": new.id}
        ).one()
    )
    assert tuple(found) == ("Ann Smith", "ann@example.com")


async def test_orders_of_the_old_release_are_orders_of_the_new(old: Callable[..., Database]) -> None:
    database = old("order")
    before = await release_0001.write(database, "order")
    migrate(database, VERSIONS["order"])
    after = await release_0001.write(database, "order")
    orders = OrderStore(database)
    for order_id in (before, after):
        order = await orders.get(order_id)
        assert (order.state, order.version, order.totals, order.user_stale) == (State.PENDING, 1, [], False)
        await orders.move(order_id, State.CONFIRMED, NOW)
        assert [each.state for each in await orders.history(order_id, 0)] == [State.PENDING, State.CONFIRMED]
    new = Order.new(str(uuid.uuid4()), user_id=before, items=(Item("tea", 2, Money("EUR", 5)),), now=NOW)
    assert await orders.create(new, str(uuid.uuid4())) == new
    page: Page[Order] = await orders.list(10)
    assert [order.id for order in page.items] == [before, after, new.id]


async def test_pending_events_in_the_outbox_of_revision_2_are_published(old: Callable[..., Database]) -> None:
    """A replica of revision 2 writes beside the new one, which publishes both replicas' events."""
    database = old("order", 2)
    kind = "TIMESTAMPTZ" if database.file is None else "TEXT"
    add = sa.text(
        "INSERT INTO outbox (id, type, subject, time, data, trace) "
        f"VALUES (:id, 'weft.test.v1.Happened', :subject, CAST('2026-01-02 00:00:00.000000' AS {kind}), :data, '{{}}')"
    )
    before, after = (str(uuid.uuid4()) for _ in range(2))
    await database.write(lambda connection: connection.execute(add, {"id": before, "subject": before, "data": b""}))
    migrate(database, VERSIONS["order"])
    await database.write(lambda connection: connection.execute(add, {"id": after, "subject": after, "data": b""}))
    bus = MemoryBus()
    async with Relay(database, order_store.outbox, bus, "new"), asyncio.timeout(10):
        while len(bus.stored) < 2:  # noqa: ASYNC110 - the bus has no asyncio.Event for it
            await asyncio.sleep(0.01)
    assert [event.subject for event in bus.stored] == [before, after]


async def test_notifications_of_the_old_release_get_a_key_for_their_tokens(old: Callable[..., Database]) -> None:
    database = old("notification")
    migrate(database, VERSIONS["notification"])
    first, second = NotificationStore(database), NotificationStore(database)
    assert second.tokens.after("list", first.tokens.make("list", 7)) == 7


START = """
import sys
from services.common.database import Database
from services.events.memory import MemoryBus
from services.events.relay import Relay
from services.common.migrations import migrate
from services.notification import store as notification_store
from services.notification.store import NotificationStore
from services import {service}
from services.{service}.store import VERSIONS

print("ready", flush=True)
sys.stdin.readline()
database = Database(sys.argv[1])
migrate(database, VERSIONS)
database.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("service", ["user", "order"])
async def test_two_replicas_migrate_concurrently_while_one_of_the_old_release_writes(
    old: Callable[..., Database], database_url: Callable[[str], str], service: str
) -> None:
    database = old(service)
    written = [await release_0001.write(database, service) for _ in range(5)]
    replicas = [_start(service, database_url(service)) for _ in range(2)]
    for replica in replicas:
        assert replica.stdout is not None
        assert await asyncio.to_thread(replica.stdout.readline) == "ready\n"
    ended = [asyncio.create_task(asyncio.to_thread(replica.communicate, "go\n", 30)) for replica in replicas]
    while not all(task.done() for task in ended):
        written.append(await release_0001.write(database, service))
    await asyncio.gather(*ended)
    assert [replica.returncode for replica in replicas] == [0, 0]
    written.append(await release_0001.write(database, service))
    ids = await database.read(lambda connection: set(connection.scalars(sa.text(f"SELECT id FROM {service}s"))))
    assert ids == set(written)
    assert await database.read(lambda connection: connection.scalar(sa.text("SELECT count(*) FROM token_key"))) == 1


def _start(service: str, url: str) -> subprocess.Popen[str]:
    """A process that migrates the database when it is signalled."""
    command = [sys.executable, "-c", START.format(service=service), url]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
