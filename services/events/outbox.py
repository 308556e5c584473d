"""The transactional outbox: an event is written in the transaction that causes it, and published afterwards.

So there is no change without its event and no event without its change, whatever is killed between the two. A relay
(``services.events.relay``) publishes what is written here, and then removes it. What can't be published is moved to
``outbox_set_aside`` after some attempts, with the reason; whoever mends that moves it back. All replicas of a service
share one outbox, and one of them relays at a time: the one that holds the lease. The lease is a row whose revision its
holder raises in time; who sees a revision stand still for as long as a lease lasts, by its own clock, may take it. No
two machines need to agree on the time.

Events of one subject keep their order as long as the transactions that write them take turns, by locking the row of
what they change, say.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from google.protobuf.message import Message

from services.common.database import SEQUENCE, UtcDateTime
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
    """An event that waits to be published, and its place in the outbox. ``attempts``: how often it failed by its own
    fault. ``event``: an exception when the row can't be read."""

    sequence: int
    subject: str
    attempts: int
    event: Event | Exception


class Outbox:
    """The events of one service that wait to be published, in the tables ``outbox``, ``outbox_lease`` and
    ``outbox_set_aside`` of its own database. ``source``: whose events they are (``/weft/order``)."""

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
            sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
            sqlite_autoincrement=True,  # a number that came back would bring a subject's events out of order
        )
        self._aside = sa.Table(
            "outbox_set_aside",
            metadata,
            sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
            sa.Column("id", sa.String(36), nullable=False),
            sa.Column("type", sa.Text, nullable=False),
            sa.Column("subject", sa.Text, nullable=False),
            sa.Column("time", UtcDateTime, nullable=False),
            sa.Column("data", sa.LargeBinary, nullable=False),
            sa.Column("trace", sa.JSON, nullable=False),
            sa.Column("attempts", sa.Integer, nullable=False),
            sa.Column("reason", sa.Text, nullable=False),
            sa.Column("set_aside_time", UtcDateTime, nullable=False),
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

    def waiting(self, connection: sa.Connection, size: int, but: Collection[str] = ()) -> list[Row]:
        """The ``size`` oldest events that wait, in their order. ``but``: without those of these subjects."""
        oldest = self._oldest.where(self._events.c.subject.not_in(but)) if but else self._oldest
        try:
            return [self._row(row) for row in connection.execute(oldest, {"size": size})]
        except (ValueError, TypeError):
            # A value that the database holds and SQLAlchemy can't read. Which row has it?
            events = self._events.c
            keys = oldest.with_only_columns(events.sequence, events.subject, events.attempts)
            found = connection.execute(keys, {"size": size}).all()
            return [self._read_alone(connection, *row) for row in found]

    def _read_alone(self, connection: sa.Connection, sequence: int, subject: str, attempts: int) -> Row:
        try:
            return self._row(
                connection.execute(sa.select(self._events).where(self._events.c.sequence == sequence)).one()
            )
        except (ValueError, TypeError) as error:
            return Row(sequence, subject, attempts, error)

    def _row(self, row: sa.Row[Any]) -> Row:
        event = Event(row.id, self.source, row.type, row.subject, row.time, bytes(row.data), dict(row.trace))
        return Row(row.sequence, row.subject, row.attempts, event)

    def count(self, connection: sa.Connection) -> int:
        """How many events wait."""
        return connection.execute(sa.select(sa.func.count()).select_from(self._events)).scalar_one()

    def remove(self, connection: sa.Connection, sequences: Sequence[int]) -> None:
        """Forget events that are published."""
        connection.execute(sa.delete(self._events).where(self._events.c.sequence.in_(sequences)))

    def count_attempt(self, connection: sa.Connection, sequences: Sequence[int]) -> None:
        """Note that events could not be published, by their own fault."""
        events = self._events.c
        connection.execute(
            sa.update(self._events).where(events.sequence.in_(sequences)).values(attempts=events.attempts + 1)
        )

    def set_aside(self, connection: sa.Connection, sequence: int, reason: str, now: dt.datetime) -> None:
        """Move an event that can't be published out of the way, and count the attempt."""
        # In the database alone: the row may be one that can't be read.
        copied = sa.select(*(column for column in self._events.c if column.name != "attempts")).add_columns(
            self._events.c.attempts + 1, sa.literal(reason), sa.literal(now, UtcDateTime)
        )
        names = [column.name for column in self._aside.c]
        # It may have been here before.
        connection.execute(sa.delete(self._aside).where(self._aside.c.sequence == sequence))
        connection.execute(sa.insert(self._aside).from_select(names, copied.where(self._events.c.sequence == sequence)))
        self.remove(connection, [sequence])

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


def add_set_aside() -> None:
    """For a migration: count attempts, and make the table for what can't be published. What it makes never changes."""
    from alembic import op

    op.add_column("outbox", sa.Column("attempts", sa.Integer, nullable=False, server_default="0"))
    op.create_table(
        "outbox_set_aside",
        sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.Column("trace", sa.JSON, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("set_aside_time", sa.DateTime(timezone=True), nullable=False),
    )
