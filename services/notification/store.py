"""The notification service's database."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from services.common import paging
from services.common.database import SEQUENCE, Database, UtcDateTime
from services.common.paging import Page, Tokens
from services.notification.domain import Kind, Notification

VERSIONS = Path(__file__).parent / "versions"
"""The migrations of this database."""

metadata = sa.MetaData()

notifications = sa.Table(
    "notifications",
    metadata,
    sa.Column("sequence", SEQUENCE, primary_key=True),  # the order of creation
    sa.Column("id", sa.String(36), nullable=False, unique=True),
    sa.Column("user_id", sa.String(36), nullable=False),
    sa.Column("order_id", sa.String(36), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("event_time", UtcDateTime, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Index("notifications_of_user", "user_id", "sequence"),
    sa.Index("notifications_of_order", "order_id", "sequence"),
    sqlite_autoincrement=True,  # numbers are never reused, so a token never points into the past
)

processed_events = sa.Table(
    "processed_events",
    metadata,
    sa.Column("event_id", sa.String(64), primary_key=True),
    sa.Column("process_time", UtcDateTime, nullable=False),
)

paging.add_key(metadata)

# Built once: building a statement takes SQLAlchemy as long as running it takes SQLite.
_PROCESSED = sa.select(processed_events.c.event_id).where(processed_events.c.event_id == sa.bindparam("event_id"))
_ADD_PROCESSED = sa.insert(processed_events)
_ADD_NOTIFICATION = sa.insert(notifications)
_LAST = sa.select(sa.func.max(notifications.c.sequence))

_POSTGRESQL_LOCK = 0x6E6F7469  # "noti": any number that nothing else locks in the same database


class NotificationStore:
    """Stores notifications. Each method is one transaction, and may raise what ``Database`` does."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.tokens = Tokens.of(database)

    async def add_once(self, event_id: str, notification: Notification) -> bool:
        """Add a notification, unless the event was processed before; returns whether it was added."""

        def work(connection: sa.Connection) -> bool:
            if connection.dialect.name == "postgresql":
                # One writer at a time, as with SQLite: so a row never appears after one with a higher number, which
                # watches may have passed already.
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_POSTGRESQL_LOCK)))
            if connection.execute(_PROCESSED, {"event_id": event_id}).first() is not None:
                return False
            connection.execute(_ADD_PROCESSED, {"event_id": event_id, "process_time": notification.create_time})
            connection.execute(
                _ADD_NOTIFICATION,
                {
                    "id": notification.id,
                    "user_id": notification.user_id,
                    "order_id": notification.order_id,
                    "kind": notification.kind.value,
                    "text": notification.text,
                    "event_time": notification.event_time,
                    "create_time": notification.create_time,
                },
            )
            return True

        return await self._database.write(work)

    async def read(
        self, size: int, after: int = 0, *, user_id: str = "", order_id: str = ""
    ) -> list[tuple[int, Notification]]:
        """At most ``size`` notifications with their sequence numbers, in order, after the number ``after``.

        ``user_id``, ``order_id``: only those of this user and about this order; all if empty.
        """
        query = sa.select(notifications).where(notifications.c.sequence > after)
        if user_id:
            query = query.where(notifications.c.user_id == user_id)
        if order_id:
            query = query.where(notifications.c.order_id == order_id)
        query = query.order_by(notifications.c.sequence).limit(size)

        def work(connection: sa.Connection) -> list[tuple[int, Notification]]:
            return [
                (
                    row.sequence,
                    Notification(
                        id=row.id,
                        user_id=row.user_id,
                        order_id=row.order_id,
                        kind=Kind(row.kind),
                        text=row.text,
                        event_time=row.event_time,
                        create_time=row.create_time,
                    ),
                )
                for row in connection.execute(query)
            ]

        return await self._database.read(work)

    async def list(self, size: int, after: int = 0, *, user_id: str = "", order_id: str = "") -> Page[Notification]:
        """A page of the notifications that ``read`` returns."""
        found = await self.read(size + 1, after, user_id=user_id, order_id=order_id)
        return Page.cut(found, size)

    async def last(self) -> int:
        """The sequence number of the newest notification; 0 if there is none."""
        return await self._database.read(lambda connection: connection.execute(_LAST).scalar() or 0)
