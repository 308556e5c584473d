"""The statements that replicas of the first release send to the shop's databases. Never changes."""

from __future__ import annotations

import datetime as dt
import uuid

import sqlalchemy as sa

from services.common.database import Database

TIME = dt.datetime(2025, 12, 31, 12, tzinfo=dt.UTC)

_USERS = (
    """INSERT INTO users (id, name, email, email_key, create_time, update_time)
    VALUES (:id, :name, :email, :key, :t, :t)""",
)
_ORDERS = (
    "INSERT INTO requests (request_id, fingerprint, resource_id, create_time) VALUES (:request, :print, :id, :t)",
    "INSERT INTO orders (id, user_id, create_time, update_time) VALUES (:id, :user, :t, :t)",
    "INSERT INTO items (order_id, position, sku, quantity) VALUES (:id, 0, 'tea', 1)",
)
_LOOK = {
    "user": "SELECT id, name, email, create_time, update_time FROM users WHERE id = :id",
    "order": "SELECT sequence, id, user_id, create_time, update_time FROM orders WHERE id = :id",
}


async def write(database: Database, service: str) -> str:
    """Add a user or an order like the first release, and read it back; returns its id."""
    new = str(uuid.uuid4())
    values = {
        "id": new,
        "name": f"Old {new}",
        "email": f"{new}@Example.com",
        "key": f"{new}@example.com",
        "request": str(uuid.uuid4()),
        "print": "0" * 64,
        "user": "00000000-0000-4000-8000-000000000000",
        "t": TIME,
    }

    def work(connection: sa.Connection) -> None:
        for statement in _USERS if service == "user" else _ORDERS:
            text = sa.text(statement)
            wanted = {name: value for name, value in values.items() if f":{name}" in statement}
            connection.execute(text.bindparams(*(sa.bindparam(name, type_=_type(name)) for name in wanted)), wanted)

    await database.write(work)
    look = sa.text(_LOOK[service])
    found = await database.read(lambda connection: connection.execute(look, {"id": new}).all())
    assert len(found) == 1
    return new


def _type(name: str) -> sa.DateTime | sa.Text:
    return sa.DateTime(timezone=True) if name == "t" else sa.Text()
