"""The relay: publishes what a service's outbox holds, in order for each subject, and removes what the bus has kept.

Every replica of the service runs one, and the one that holds the outbox's lease works. It publishes a subject's events
one after the other, and different subjects' side by side. It stops in time when it can't renew its lease, and gives the
lease back when it can't reach the bus: another replica may. Killed, it is followed by another within LEASE and a bit,
which publishes again what was not yet removed; the bus knows those by their ids.

An event that can't be published by its own fault holds up those of its subject alone, and for some attempts at the
most: then it is set aside, and the log has it as an error.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import datetime as dt
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import sqlalchemy as sa
import structlog

from services.common.database import Database
from services.common.errors import RefusedError
from services.events import MAX_ATTRIBUTE, MAX_REASON, BusAwayError, Event, Publisher
from services.events.outbox import Lease, Outbox, Row

log = structlog.stdlib.get_logger()

LEASE = 3.0
"""Seconds that a lease lasts, unless it is renewed."""

POLL = 0.05
"""Seconds between two looks at an empty outbox."""

BATCH = 200
"""Events that are read at a time."""

RETRY = 0.5
"""Seconds before the next attempt when the bus or the database is away."""

MAX_ATTEMPTS = 5
"""How often an event that can't be published by its own fault is tried, before it is set aside."""

MOST_HELD = 1_000
"""Subjects that wait for the next attempt of their oldest event, at the most."""

LATE = 5.0
"""Seconds of lag from which on the log tells of it, every LATE seconds."""


def _wall() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class Relay:
    """Relays the events of ``outbox`` in ``database`` to ``publisher``, from entering the block until leaving it::

        async with Relay(database, outbox, bus, "order-1"):
            ...

    ``name``: this replica's; no other has it at the same time. ``lease``: seconds, the same for all replicas.
    ``retry``: seconds before the second attempt for an event that failed by its own fault, doubled with each.
    Leaving the block publishes what waits, if that can be done now, and gives the lease back.
    """

    def __init__(
        self,
        database: Database,
        outbox: Outbox,
        publisher: Publisher,
        name: str,
        *,
        lease: float = LEASE,
        retry: float = RETRY,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], dt.datetime] = _wall,
    ) -> None:
        self.lag = 0.0
        """Seconds for which the oldest event has waited, as of the last look; 0 while another replica relays."""
        self.published = 0
        """Events that the bus has kept from this relay."""
        self.set_aside = 0
        """Events that this relay has set aside."""
        self._database = database
        self._outbox = outbox
        self._publisher = publisher
        self._name = name
        self._term = lease
        self._retry = retry
        self._now = now
        self._wall = wall
        self._held: Lease | None = None
        self._since = 0.0  # when the held lease was last renewed, or the other's was first seen as it is
        self._seen: Lease | None = None
        self._held_until: dict[str, float] = {}
        """Subjects whose oldest event failed, and when it is tried again."""
        self._told = 0.0
        self._late = False
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def holds(self) -> bool:
        """Whether this relay is the one that works. It is not from a bit before its lease may be taken."""
        return self._held is not None and self._left() > 0

    async def __aenter__(self) -> Relay:
        self._task = asyncio.create_task(self._run(), name=f"relay-{self._name}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._stop.set()
        await self._task

    def __repr__(self) -> str:
        return f"<Relay {self._name} {'holds' if self.holds else 'waits'} lag={self.lag:.1f}s>"

    async def _run(self) -> None:
        while not self._stop.is_set():
            await self._pause(await self._step())
        # What came last is not left for another to find, nor for the time when there is another.
        while self.holds and await self._step() == 0:
            pass
        await self._give_back()

    async def _step(self) -> float:
        """Do what there is to do now; the seconds until there may be more."""
        try:
            if not await self._hold():
                return self._term / 8
            now = self._now()
            self._held_until = {subject: until for subject, until in self._held_until.items() if until > now}
            if len(self._held_until) > MOST_HELD - BATCH:
                return POLL
            held = tuple(self._held_until)
            rows = await self._database.read(lambda connection: self._outbox.waiting(connection, BATCH, held))
            self._measure(rows)
            if not rows:
                return POLL
            await self._publish(rows)
            return 0 if len(rows) == BATCH else POLL
        except (BusAwayError, TimeoutError) as error:
            self._tell(str(error))
            await self._give_back()
            return RETRY
        except RefusedError as error:
            log.warning("outbox can't be read", error=str(error))
            return RETRY
        except Exception:
            log.exception("relay failed")
            return RETRY

    def _left(self) -> float:
        """Seconds for which this relay may still publish: a quarter of the lease is kept in reserve."""
        return self._since + 0.75 * self._term - self._now()

    async def _hold(self) -> bool:
        """Take or renew the lease where that is due; whether this relay holds it."""
        if self._held is not None and self._left() > 0.5 * self._term:
            return True
        began = self._now()
        lease = await self._database.read(self._outbox.lease)
        if lease != self._held:
            self._held = None
            if lease != self._seen:
                self._seen, self._since = lease, began
            if not lease.free and began < self._since + self._term:
                self.lag = 0.0
                return False
        taken = await self._database.write(lambda connection: self._outbox.change(connection, lease, self._name))
        if taken is None:
            return False
        if self._held is None:
            log.info("relay works", before=lease.holder or "nobody")
        self._held, self._since = taken, began
        return self._left() > 0

    async def _give_back(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            with contextlib.suppress(RefusedError):
                await self._database.write(lambda connection: self._outbox.change(connection, held))

    async def _publish(self, rows: Sequence[Row]) -> None:
        """Publish the events, and remove from the outbox what the bus has kept, whatever happens to the rest."""
        of_subject: dict[str, list[Row]] = collections.defaultdict(list)
        for row in rows:
            of_subject[row.subject].append(row)
        kept: list[int] = []
        failed: list[tuple[Row, Exception]] = []

        async def in_order(rows: Sequence[Row]) -> None:
            for row in rows:
                try:
                    if isinstance(row.event, Exception):
                        raise row.event
                    await self._publisher.publish(row.event)
                except (BusAwayError, TimeoutError):
                    raise  # the bus is away, and the event may be as good as any
                except Exception as error:
                    failed.append((row, error))
                    return
                kept.append(row.sequence)

        try:
            async with asyncio.timeout(self._left()):
                endings = await asyncio.gather(*map(in_order, of_subject.values()), return_exceptions=True)
        finally:
            if kept:
                await self._database.write(lambda connection: self._outbox.remove(connection, kept))
                self.published += len(kept)
            if failed:
                await self._note_failed(failed)
        for ending in endings:
            if ending is not None:
                raise ending

    async def _note_failed(self, failed: Sequence[tuple[Row, Exception]]) -> None:
        """Hold the subjects of events that failed for a while, or set an event aside that failed often enough."""
        reasons = {row.sequence: _reason(error) for row, error in failed}
        hopeless = [row for row, _ in failed if row.attempts + 1 >= MAX_ATTEMPTS]
        others = [row for row, _ in failed if row.attempts + 1 < MAX_ATTEMPTS]

        def work(connection: sa.Connection) -> None:
            self._outbox.count_attempt(connection, [row.sequence for row in others])
            for row in hopeless:
                self._outbox.set_aside(connection, row.sequence, reasons[row.sequence], self._wall())

        await self._database.write(work)
        for row in others:
            self._held_until[row.subject] = self._now() + self._retry * 2.0**row.attempts
        for row in hopeless:
            self.set_aside += 1
            log.error(
                "event set aside; it is not published",
                table="outbox_set_aside",
                sequence=row.sequence,
                subject=row.subject[:MAX_ATTRIBUTE],
                attempts=row.attempts + 1,
                error=reasons[row.sequence],
            )

    def _measure(self, rows: Sequence[Row]) -> None:
        oldest = next((row.event.time for row in rows if isinstance(row.event, Event)), None)
        self.lag = 0.0 if oldest is None else max(0.0, (self._wall() - oldest).total_seconds())
        if self._late and self.lag < LATE:
            self._late = False
            log.info("outbox caught up")

    def _tell(self, why: str) -> None:
        """Say that events wait, every LATE seconds."""
        if self.lag >= LATE and (not self._late or self._now() >= self._told + LATE):
            self._late, self._told = True, self._now()
            log.warning("outbox lags", seconds=round(self.lag, 1), why=why)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)


def _reason(error: Exception) -> str:
    """Why an event failed, as a text that any database keeps."""
    text = f"{type(error).__name__}: {error}"[:MAX_REASON]
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()
