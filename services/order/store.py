"""The order service's database."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from services.database import SEQUENCE, Database, UtcDateTime
from services.idempotency import Requests
from services.order.domain import Item, Order, OrderNotFoundError
from services.paging import Page

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
    sa.Index("orders_of_user", "user_id", "sequence"),
    sqlite_autoincrement=True,  # no number is given twice, so a page token never points into the past
)

items = sa.Table(
    "items",
    metadata,
    sa.Column("order_id", sa.String(36), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("sku", sa.Text, nullable=False),
    sa.Column("quantity", sa.Integer, nullable=False),
)

requests = Requests(metadata)


class OrderStore:
    """Keeps the orders. Each method is one transaction, and may raise what ``Database`` does besides what it says."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, order: Order, request_id: str) -> Order | None:
        """The order that the same request made before; None when it is new. Raises RequestIdReusedError."""
        return await self._database.read(lambda connection: _find(connection, order, request_id))

    async def create(self, order: Order, request_id: str) -> Order:
        """Take an order; give back the one that the same request made before. Raises RequestIdReusedError."""

        def work(connection: sa.Connection) -> Order:
            earlier = _find(connection, order, request_id)
            if earlier is not None:
                return earlier
            requests.add(connection, request_id, order.fingerprint, order.id, order.create_time)
            connection.execute(
                sa.insert(orders).values(
                    id=order.id,
                    user_id=order.user_id,
                    create_time=order.create_time,
                    update_time=order.update_time,
                )
            )
            connection.execute(
                sa.insert(items),
                [
                    {"order_id": order.id, "position": position, "sku": item.sku, "quantity": item.quantity}
                    for position, item in enumerate(order.items)
                ],
            )
            return order

        return await self._database.write(work)

    async def get(self, order_id: str) -> Order:
        """One order. Raises OrderNotFoundError."""
        return await self._database.read(lambda connection: _get(connection, order_id))

    async def list(self, size: int, after: int = 0, user_id: str = "") -> Page[Order]:
        """At most ``size`` orders, in the order of their creation, from after the sequence number ``after``.

        ``user_id``: only this user's; everybody's when empty.
        """
        query = sa.select(orders).where(orders.c.sequence > after).order_by(orders.c.sequence).limit(size + 1)
        if user_id:
            query = query.where(orders.c.user_id == user_id)

        def work(connection: sa.Connection) -> Page[Order]:
            rows = connection.execute(query).all()
            whole = _with_items(connection, rows)
            return Page.cut([(row.sequence, order) for row, order in zip(rows, whole, strict=True)], size)

        return await self._database.read(work)


def _find(connection: sa.Connection, order: Order, request_id: str) -> Order | None:
    earlier = requests.find(connection, request_id, order.fingerprint)
    return None if earlier is None else _get(connection, earlier)


def _get(connection: sa.Connection, order_id: str) -> Order:
    rows = connection.execute(sa.select(orders).where(orders.c.id == order_id)).all()
    if not rows:
        raise OrderNotFoundError(order_id)
    return _with_items(connection, rows)[0]


def _with_items(connection: sa.Connection, rows: Sequence[sa.Row[Any]]) -> list[Order]:
    lines: dict[str, list[Item]] = collections.defaultdict(list)
    found = connection.execute(
        sa.select(items.c.order_id, items.c.sku, items.c.quantity)
        .where(items.c.order_id.in_([row.id for row in rows]))
        .order_by(items.c.order_id, items.c.position)
    )
    for order_id, sku, quantity in found:
        lines[order_id].append(Item(sku, quantity))
    return [Order(row.id, row.user_id, tuple(lines[row.id]), row.create_time, row.update_time) for row in rows]
