"""The transactional outbox: an event is written in the transaction that causes it, and published afterwards.

So there is no change without its event and no event without its change, whatever is killed between the two. A relay
(``services.events.relay``) publishes what is written here, and then removes it. All replicas of a service share one
outbox, and one of them relays at a time: the one that holds the lease. The lease is a row whose revision its holder
raises in time; who sees a revision stand still for as long as a lease lasts, by its own clock, may take it. No two
machines need to agree on the time.

Events of one subject keep their order as long as the transactions that write them take turns, by locking the row of
what they change, say.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from google.protobuf.message import Message

from services.database import SEQUENCE, UtcDateTime
from services.events import Event

_NOBODY = ""


@dataclass(frozen=True, slots=True)
class Lease:
    """Who relays: nobody, when ``holder`` is empty. ``revision``: grows with each change of the lease."""

    holder: str
    revision: int

    @property
    def free(self) -> bool:
        return self.holder == _NOBODY


@dataclass(frozen=True, slots=True)
class Row:
    """An event that waits to be published, and its place in the outbox."""

    sequence: int
    event: Event


class Outbox:
    """The events of one service that wait to be published, in the tables ``outbox`` and ``outbox_lease`` of its own
    database. ``source``: whose events they are (``/weft/order``)."""

    def __init__(self, metadata: sa.MetaData, source: str) -> None:
        self.source = source
        self._events = sa.Table(
            "outbox",
            metadata,
            sa.Column("sequence", SEQUENCE, primary_key=True),
            sa.Column("id", sa.String(36), nullable=False),
            sa.Column("type", sa.Text, nullable=False),
            sa.Column("subject", sa.Text, nullable=False),
            sa.Column("time", UtcDateTime, nullable=False),
            sa.Column("data", sa.LargeBinary, nullable=False),
            sa.Column("trace", sa.JSON, nullable=False),
            sqlite_autoincrement=True,  # a number that came back would bring a subject's events out of order
        )
        self._lease = sa.Table(
            "outbox_lease",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("holder", sa.Text, nullable=False),
            sa.Column("revision", sa.BigInteger, nullable=False),
        )
        # Made once: SQLAlchemy takes as long to make a statement as SQLite does to run it.
        events, lease = self._events.c, self._lease.c
        self._add = sa.insert(self._events)
        self._oldest = sa.select(self._events).order_by(events.sequence).limit(sa.bindparam("size"))
        self._held = sa.select(lease.holder, lease.revision)
        self._change = (
            sa.update(self._lease)
            .where(lease.revision == sa.bindparam("seen_revision"), lease.holder == sa.bindparam("seen_holder"))
            .values(holder=sa.bindparam("to_holder"), revision=sa.bindparam("to_revision"))
        )

    def add(
        self,
        connection: sa.Connection,
        event_type: str,
        subject: str,
        data: Message,
        trace: Mapping[str, str] = {},
        *,
        time: dt.datetime | None = None,
    ) -> None:
        """Write an event in the caller's transaction. ``time``: when it happened; now, without one. The rest: as an
        ``Event`` has it."""
        connection.execute(
            self._add,
            {
                "id": str(uuid.uuid4()),
                "type": event_type,
                "subject": subject,
                "time": time if time is not None else dt.datetime.now(dt.UTC),
                "data": data.SerializeToString(),
                "trace": dict(trace),
            },
        )

    def waiting(self, connection: sa.Connection, size: int) -> list[Row]:
        """The ``size`` oldest events that wait, in their order."""
        found = connection.execute(self._oldest, {"size": size})
        return [
            Row(row.sequence, Event(row.id, self.source, row.type, row.subject, row.time, row.data, row.trace))
            for row in found
        ]

    def count(self, connection: sa.Connection) -> int:
        """How many events wait."""
        return connection.execute(sa.select(sa.func.count()).select_from(self._events)).scalar_one()

    def remove(self, connection: sa.Connection, sequences: Sequence[int]) -> None:
        """Forget events that are published."""
        connection.execute(sa.delete(self._events).where(self._events.c.sequence.in_(sequences)))

    def lease(self, connection: sa.Connection) -> Lease:
        """The lease as it is."""
        row = connection.execute(self._held).one()
        return Lease(row.holder, row.revision)

    def change(self, connection: sa.Connection, seen: Lease, holder: str = _NOBODY) -> Lease | None:
        """Take, renew or (for nobody) give back the lease; None when it is no longer as it was ``seen``."""
        changed = Lease(holder, seen.revision + 1)
        done = connection.execute(
            self._change,
            {
                "seen_revision": seen.revision,
                "seen_holder": seen.holder,
                "to_revision": changed.revision,
                "to_holder": changed.holder,
            },
        )
        return changed if done.rowcount == 1 else None


def create_tables() -> None:
    """For a migration: make the tables. What it makes never changes; a later shape gets a function of its own."""
    from alembic import op  # a third of a second, for what most starts don't do

    op.create_table(
        "outbox",
        sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.Column("trace", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
    lease = op.create_table(
        "outbox_lease",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(lease, [{"id": 1, "holder": _NOBODY, "revision": 0}])
