"""The order service's database."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from services.common import filters, paging
from services.common.database import SEQUENCE, Database, UtcDateTime
from services.common.idempotency import Requests
from services.common.paging import Page, Tokens
from services.events.outbox import Outbox
from services.order.domain import NANOS, Item, Money, Order, OrderNotFoundError, State
from services.order.messages import event_message

VERSIONS = Path(__file__).parent / "versions"
"""The migrations of this database."""

metadata = sa.MetaData()

orders = sa.Table(
    "orders",
    metadata,
    sa.Column("sequence", SEQUENCE, primary_key=True),  # the order of creation
    sa.Column("id", sa.String(36), nullable=False, unique=True),
    sa.Column("user_id", sa.String(36), nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("update_time", UtcDateTime, nullable=False),
    sa.Column("state", sa.String(16), nullable=False, server_default=State.PENDING.value),
    sa.Column("version", sa.Integer, nullable=False, server_default="1"),
    sa.Column("user_stale", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Index("orders_of_user", "user_id", "sequence"),
    sa.Index("orders_in_state", "state", "sequence"),
    sqlite_autoincrement=True,  # numbers are never reused, so a page token never points into the past
)

items = sa.Table(
    "items",
    metadata,
    sa.Column("order_id", sa.String(36), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("sku", sa.Text, nullable=False),
    sa.Column("quantity", sa.Integer, nullable=False),
    # The unit price: all three, or none.
    sa.Column("currency", sa.String(3)),
    sa.Column("units", sa.BigInteger),
    sa.Column("nanos", sa.Integer),
)

# The history of each order: a row for each version after the first, which is the order as it was created.
changes = sa.Table(
    "changes",
    metadata,
    sa.Column("order_id", sa.String(36), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("time", UtcDateTime, nullable=False),
)

# Users that the user service has confirmed, for when it is unavailable.
known_users = sa.Table("known_users", metadata, sa.Column("user_id", sa.String(36), primary_key=True))

requests = Requests(metadata)
outbox = Outbox(metadata, "/weft/order")
paging.add_key(metadata)

_ITEMS = (items.c.order_id, items.c.sku, items.c.quantity, items.c.currency, items.c.units, items.c.nanos)
# Built once: building a statement takes longer than SQLite takes to run it.
_ADD_ORDER = sa.insert(orders).inline()
_ADD_ITEMS = sa.insert(items)
_GET = sa.select(orders).where(orders.c.id == sa.bindparam("id"))
_GET_TO_CHANGE = _GET.with_for_update()

_FILTERS = {
    "state": filters.choice(orders.c.state, [state.value for state in State]),
    "create_time": filters.instant(orders.c.create_time),
    "update_time": filters.instant(orders.c.update_time),
}
_MAX_CACHED_USERS = 100_000  # at 100 bytes each
_MAX_IDS = 1_000  # ids in a query; SQLite accepts 32,766

MAX_ITEMS = 5_000
"""A page ends once its orders have this many items: 1,000 orders of 100 items are more than a client accepts (4 MiB),
and would delay others."""

_ORDER_BATCH = 50
"""How many orders' items are read at once."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Which orders a request lists. ``user_id``: whose orders; everybody's if empty."""

    user_id: str = ""
    filter: str = ""


class OrderStore:
    """Stores orders, and writes their events to the outbox in the same transaction.

    Each method is one transaction, and may raise what ``Database`` does besides what it says.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.tokens = Tokens.of(database)
        self._confirmed_users: set[str] = set()  # a cache of known_users

    async def find(self, order: Order, request_id: str) -> Order | None:
        """The order that the same request created before; None if it is new. Raises RequestIdReusedError."""
        return await self._database.read(lambda connection: _find(connection, order, request_id))

    async def create(self, order: Order, request_id: str, trace: Mapping[str, str] = {}) -> Order:
        """Add an order; returns the one that the same request created before, if any. ``trace``: for its event.

        Raises RequestIdReusedError.
        """
        remember = not order.user_stale and order.user_id not in self._confirmed_users

        def work(connection: sa.Connection) -> Order:
            earlier = _find(connection, order, request_id)
            if earlier is not None:
                return earlier
            # First, so that replicas that get the same request at the same time wait here for each other.
            requests.add(connection, request_id, order.fingerprint, order.id, order.create_time)
            connection.execute(
                _ADD_ORDER,
                {
                    "id": order.id,
                    "user_id": order.user_id,
                    "create_time": order.create_time,
                    "update_time": order.update_time,
                    "state": order.state.value,
                    "version": order.version,
                    "user_stale": order.user_stale,
                },
            )
            connection.execute(
                _ADD_ITEMS,
                [_item_values(order.id, position, item) for position, item in enumerate(order.items)],
            )
            if remember and not _knows(connection, order.user_id):
                connection.execute(sa.insert(known_users).values(user_id=order.user_id))
            _add_event(connection, order, trace)
            return order

        created = await self._database.write(work)
        if remember:
            if len(self._confirmed_users) >= _MAX_CACHED_USERS:
                self._confirmed_users.clear()
            self._confirmed_users.add(order.user_id)
        return created

    async def get(self, order_id: str) -> Order:
        """One order. Raises OrderNotFoundError."""
        return await self._database.read(lambda connection: _get(connection, order_id))

    async def list(self, size: int, after: int = 0, listing: Listing = Listing()) -> Page[Order]:
        """At most ``size`` orders, in order of creation, after the sequence number ``after``; fewer once they have
        MAX_ITEMS items.

        Raises InvalidFieldError if ``listing`` is invalid.
        """
        query = sa.select(orders).where(orders.c.sequence > after, *filters.conditions(listing.filter, _FILTERS))
        if listing.user_id:
            query = query.where(orders.c.user_id == listing.user_id)
        query = query.order_by(orders.c.sequence).limit(size + 1)

        def work(connection: sa.Connection) -> Page[Order]:
            rows = connection.execute(query).all()
            page: list[Order] = []
            while len(page) < min(len(rows), size) and sum(len(order.items) for order in page) < MAX_ITEMS:
                page += _with_items(connection, rows[len(page) : min(len(page) + _ORDER_BATCH, size)])
            last = rows[len(page) - 1].sequence if page else 0
            return Page(page, last, more=len(rows) > len(page))

        return await self._database.read(work)

    async def move(self, order_id: str, state: State, now: dt.datetime, trace: Mapping[str, str] = {}) -> Order:
        """Change an order's state to ``state``, if it isn't already. ``trace``: for its event.

        Raises OrderNotFoundError and WrongStateError.
        """

        def work(connection: sa.Connection) -> Order:
            order = _get(connection, order_id, _GET_TO_CHANGE)
            moved = order.moved(state, now)
            if moved is order:
                return order
            connection.execute(
                sa.update(orders)
                .where(orders.c.id == order_id)
                .values(state=moved.state.value, version=moved.version, update_time=moved.update_time)
            )
            connection.execute(
                sa.insert(changes).values(
                    order_id=order_id, version=moved.version, state=moved.state.value, time=moved.update_time
                )
            )
            _add_event(connection, moved, trace)
            return moved

        return await self._database.write(work)

    async def history(self, order_id: str, after: int) -> Sequence[Order]:
        """The order after each of its changes, from the version after ``after``. Raises OrderNotFoundError."""

        def work(connection: sa.Connection) -> list[Order]:
            order = _get(connection, order_id)
            original = dataclasses.replace(order, state=State.PENDING, version=1, update_time=order.create_time)
            rows = connection.execute(
                sa.select(changes.c.version, changes.c.state, changes.c.time)
                .where(changes.c.order_id == order_id, changes.c.version > after)
                .order_by(changes.c.version)
            ).all()
            later = [
                dataclasses.replace(order, state=State(state), version=version, update_time=time)
                for version, state, time in rows
            ]
            return later if after else [original, *later]

        return await self._database.read(work)

    async def versions(self, order_ids: Collection[str]) -> Mapping[str, int]:
        """The versions of several orders."""
        ids = list(order_ids)
        query = sa.select(orders.c.id, orders.c.version)

        def work(connection: sa.Connection) -> dict[str, int]:
            found: dict[str, int] = {}
            for begin in range(0, len(ids), _MAX_IDS):
                some = orders.c.id.in_(ids[begin : begin + _MAX_IDS])
                found.update((row.id, row.version) for row in connection.execute(query.where(some)))
            return found

        return await self._database.read(work)

    async def knows(self, user_id: str) -> bool:
        """Whether the user service has confirmed the user, and has not reported it deleted since."""
        return await self._database.read(lambda connection: _knows(connection, user_id))

    async def forget(self, user_id: str) -> None:
        """Forget that the user service has confirmed the user."""
        if await self.knows(user_id):
            self._confirmed_users.discard(user_id)
            await self._database.write(
                lambda connection: connection.execute(sa.delete(known_users).where(known_users.c.user_id == user_id))
            )


def _add_event(connection: sa.Connection, order: Order, trace: Mapping[str, str]) -> None:
    message = event_message(order)
    outbox.add(connection, message.DESCRIPTOR.full_name, order.id, message, trace, time=order.update_time)


def _knows(connection: sa.Connection, user_id: str) -> bool:
    found = connection.execute(sa.select(known_users.c.user_id).where(known_users.c.user_id == user_id))
    return found.first() is not None


def _find(connection: sa.Connection, order: Order, request_id: str) -> Order | None:
    earlier = requests.find(connection, request_id, order.fingerprint)
    return None if earlier is None else _get(connection, earlier)


def _get(connection: sa.Connection, order_id: str, query: sa.Select[Any] = _GET) -> Order:
    rows = connection.execute(query, {"id": order_id}).all()
    if not rows:
        raise OrderNotFoundError(order_id)
    return _with_items(connection, rows)[0]


def _with_items(connection: sa.Connection, rows: Sequence[sa.Row[Any]]) -> list[Order]:
    lines: dict[str, list[Item]] = collections.defaultdict(list)
    found = connection.execute(
        sa.select(*_ITEMS)
        .where(items.c.order_id.in_([row.id for row in rows]))
        .order_by(items.c.order_id, items.c.position)
    )
    for order_id, sku, quantity, currency, units, nanos in found:
        price = None if currency is None else Money(currency, units * NANOS + nanos)
        lines[order_id].append(Item(sku, quantity, price))
    return [
        Order(
            row.id,
            row.user_id,
            tuple(lines[row.id]),
            row.create_time,
            row.update_time,
            State(row.state),
            row.version,
            row.user_stale,
        )
        for row in rows
    ]


def _item_values(order_id: str, position: int, item: Item) -> dict[str, Any]:
    price = item.price
    return {
        "order_id": order_id,
        "position": position,
        "sku": item.sku,
        "quantity": item.quantity,
        "currency": None if price is None else price.currency,
        "units": None if price is None else price.units,
        "nanos": None if price is None else price.fraction,
    }
