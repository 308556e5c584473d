"""The transactional outbox: an event is written in the transaction that causes it, and published afterwards.

So there is no change without its event and no event without its change, whatever is killed in between. A relay
(``services.events.relay``) publishes what is written here, and then removes it. What can't be published is moved to
``outbox_set_aside`` after some attempts, with the reason; once that is fixed, an operator moves it back. All replicas
of a service share one outbox, and one of them relays at a time: the one that holds the lease. The lease is a row whose
revision its holder keeps incrementing. Another replica may take the lease when, by its own clock, the revision has not
changed for as long as a lease lasts. So the machines' clocks need not agree.

Events of one subject keep their order if the transactions that write them are serialised, for example by locking the
row that they change.
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
    """Who relays: nobody if ``holder`` is empty. ``revision``: grows with each change of the lease."""

    holder: str
    revision: int

    @property
    def free(self) -> bool:
        return self.holder == _NOBODY


@dataclass(frozen=True, slots=True)
class Row:
    """An event to be published, and its position in the outbox. ``attempts``: how many times publishing it failed
    because of the event itself. ``event``: an exception if the row can't be read."""

    sequence: int
    subject: str
    attempts: int
    event: Event | Exception


class Outbox:
    """The events that a service has yet to publish, in the tables ``outbox``, ``outbox_lease`` and ``outbox_set_aside``
    of its own database. ``source``: the events' source (``/weft/order``)."""

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
            sqlite_autoincrement=True,  # a reused number would break the order of a subject's events
        )
        self._set_aside_events = sa.Table(
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
        # Built once: building a statement takes SQLAlchemy as long as running it takes SQLite.
        events, lease = self._events.c, self._lease.c
        self._add = sa.insert(self._events)
        self._oldest = sa.select(self._events).order_by(events.sequence).limit(sa.bindparam("size"))
        self._get_lease = sa.select(lease.holder, lease.revision)
        self._change_lease = (
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
        """Write an event in the caller's transaction. ``time``: when it happened (default: now). The rest is as in
        ``Event``."""
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

    def pending(self, connection: sa.Connection, size: int, excluding: Collection[str] = ()) -> list[Row]:
        """The ``size`` oldest events, in order. ``excluding``: subjects whose events are left out."""
        oldest = self._oldest.where(self._events.c.subject.not_in(excluding)) if excluding else self._oldest
        try:
            return [self._row(row) for row in connection.execute(oldest, {"size": size})]
        except (ValueError, TypeError):
            # SQLAlchemy can't read a value in one of the rows: find out which.
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
        """How many events are pending."""
        return connection.execute(sa.select(sa.func.count()).select_from(self._events)).scalar_one()

    def remove(self, connection: sa.Connection, sequences: Sequence[int]) -> None:
        """Remove events that were published."""
        connection.execute(sa.delete(self._events).where(self._events.c.sequence.in_(sequences)))

    def count_attempt(self, connection: sa.Connection, sequences: Sequence[int]) -> None:
        """Count a failed attempt for events that could not be published because of themselves."""
        events = self._events.c
        connection.execute(
            sa.update(self._events).where(events.sequence.in_(sequences)).values(attempts=events.attempts + 1)
        )

    def set_aside(self, connection: sa.Connection, sequence: int, reason: str, now: dt.datetime) -> None:
        """Move an event that can't be published out of the outbox, and count the attempt."""
        # Entirely in the database: the row may be one that we can't read.
        copied = sa.select(*(column for column in self._events.c if column.name != "attempts")).add_columns(
            self._events.c.attempts + 1, sa.literal(reason), sa.literal(now, UtcDateTime)
        )
        names = [column.name for column in self._set_aside_events.c]
        # It may have been set aside before.
        connection.execute(sa.delete(self._set_aside_events).where(self._set_aside_events.c.sequence == sequence))
        connection.execute(
            sa.insert(self._set_aside_events).from_select(names, copied.where(self._events.c.sequence == sequence))
        )
        self.remove(connection, [sequence])

    def lease(self, connection: sa.Connection) -> Lease:
        """The current lease."""
        row = connection.execute(self._get_lease).one()
        return Lease(row.holder, row.revision)

    def change_lease(self, connection: sa.Connection, seen: Lease, holder: str = _NOBODY) -> Lease | None:
        """Take, renew or (with no holder) release the lease; None if it has changed since it was ``seen``."""
        changed = Lease(holder, seen.revision + 1)
        done = connection.execute(
            self._change_lease,
            {
                "seen_revision": seen.revision,
                "seen_holder": seen.holder,
                "to_revision": changed.revision,
                "to_holder": changed.holder,
            },
        )
        return changed if done.rowcount == 1 else None


def create_tables() -> None:
    """For a migration: create the tables. This never changes; a later schema gets a function of its own."""
    from alembic import op  # takes a third of a second, and most starts don't need it

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
    """For a migration: count attempts, and create the table for what can't be published. This never changes."""
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
