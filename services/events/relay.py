"""The relay: publishes what is in a service's outbox, in order for each subject, and removes what the bus has stored.

Every replica of the service runs a relay, and the one that holds the outbox's lease is active. It publishes the events
of a subject one after another, and those of different subjects concurrently. It stops in time when it can't renew its
lease, and releases the lease when it can't reach the bus, as another replica may. When it is killed, another takes over
shortly after LEASE, and publishes again what was not yet removed; the bus drops the duplicates by their ids.

An event that can't be published because of itself delays only the events of its subject, and only for MAX_ATTEMPTS
attempts: then it is set aside and logged as an error.
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
from services.events import MAX_ATTRIBUTE, MAX_REASON, BusUnavailableError, Event, Publisher
from services.events.outbox import Lease, Outbox, Row

log = structlog.stdlib.get_logger()

LEASE = 3.0
"""Seconds that a lease lasts unless it is renewed."""

POLL_INTERVAL = 0.05
"""Seconds between two reads of an empty outbox."""

BATCH = 200
"""How many events are read at once."""

RETRY_DELAY = 0.5
"""Seconds before the next attempt when the bus or the database is unavailable."""

MAX_ATTEMPTS = 5
"""How many times an event that can't be published because of itself is tried before it is set aside."""

MAX_DELAYED_SUBJECTS = 1_000
"""Subjects that wait for the next attempt of their oldest event, at most."""

LAG_WARNING = 5.0
"""Seconds of lag from which on it is logged, every LAG_WARNING seconds."""


def _wall() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class Relay:
    """Publishes the events of ``outbox`` in ``database`` with ``publisher``, while the block is entered::

        async with Relay(database, outbox, bus, "order-1"):
            ...

    ``name``: this replica's, unique at any time. ``lease``: seconds, the same for all replicas. ``retry``: seconds
    before the second attempt for an event that failed because of itself, doubled with each. Leaving the block publishes
    what is pending, if that is possible now, and releases the lease.
    """

    def __init__(
        self,
        database: Database,
        outbox: Outbox,
        publisher: Publisher,
        name: str,
        *,
        lease: float = LEASE,
        retry: float = RETRY_DELAY,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], dt.datetime] = _wall,
    ) -> None:
        self.lag = 0.0
        """The oldest event's age in seconds, when the outbox was last read; 0 while another replica is active."""
        self.published = 0
        """Events that this relay has published."""
        self.set_aside = 0
        """Events that this relay has set aside."""
        self._database = database
        self._outbox = outbox
        self._publisher = publisher
        self._name = name
        self._lease_seconds = lease
        self._retry = retry
        self._now = now
        self._wall = wall
        self._lease: Lease | None = None
        """The lease, while this relay holds it."""
        self._lease_time = 0.0  # when our lease was last renewed, or when the other's was first seen with its revision
        self._other_lease: Lease | None = None
        self._delayed_until: dict[str, float] = {}
        """Subjects whose oldest event failed, and when it is tried again."""
        self._warned = 0.0
        self._behind = False
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def active(self) -> bool:
        """Whether this relay may publish. It stops being active shortly before another may take its lease."""
        return self._lease is not None and self._time_left() > 0

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
        return f"<Relay {self._name} {'active' if self.active else 'standby'} lag={self.lag:.1f}s>"

    async def _run(self) -> None:
        while not self._stop.is_set():
            await self._sleep(await self._step())
        # Publish what came last, rather than leave it to another replica, which may not exist.
        while self.active and await self._step() == 0:
            pass
        await self._release_lease()

    async def _step(self) -> float:
        """Do what can be done now; returns the seconds until there may be more."""
        try:
            if not await self._hold_lease():
                return self._lease_seconds / 8
            now = self._now()
            self._delayed_until = {subject: until for subject, until in self._delayed_until.items() if until > now}
            if len(self._delayed_until) > MAX_DELAYED_SUBJECTS - BATCH:
                return POLL_INTERVAL
            delayed = tuple(self._delayed_until)
            rows = await self._database.read(lambda connection: self._outbox.pending(connection, BATCH, delayed))
            self._measure_lag(rows)
            if not rows:
                return POLL_INTERVAL
            await self._publish(rows)
            return 0 if len(rows) == BATCH else POLL_INTERVAL
        except (BusUnavailableError, TimeoutError) as error:
            self._warn_of_lag(str(error))
            await self._release_lease()
            return RETRY_DELAY
        except RefusedError as error:
            log.warning("can't read the outbox; retrying", error=str(error))
            return RETRY_DELAY
        except Exception:
            log.exception("relay failed; retrying")
            return RETRY_DELAY

    def _time_left(self) -> float:
        """Seconds for which this relay may still publish: a quarter of the lease is kept in reserve."""
        return self._lease_time + 0.75 * self._lease_seconds - self._now()

    async def _hold_lease(self) -> bool:
        """Take or renew the lease if necessary; returns whether this relay holds it."""
        if self._lease is not None and self._time_left() > 0.5 * self._lease_seconds:
            return True
        began = self._now()
        current = await self._database.read(self._outbox.lease)
        if current != self._lease:
            self._lease = None
            if current != self._other_lease:
                self._other_lease, self._lease_time = current, began
            if not current.free and began < self._lease_time + self._lease_seconds:
                self.lag = 0.0
                return False
        taken = await self._database.write(
            lambda connection: self._outbox.change_lease(connection, current, self._name)
        )
        if taken is None:
            return False
        if self._lease is None:
            log.info("relay took the lease", previous=current.holder or "nobody")
        self._lease, self._lease_time = taken, began
        return self._time_left() > 0

    async def _release_lease(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            with contextlib.suppress(RefusedError):
                await self._database.write(lambda connection: self._outbox.change_lease(connection, lease))

    async def _publish(self, rows: Sequence[Row]) -> None:
        """Publish the events. Those that the bus stored are removed from the outbox, whatever happens to the rest."""
        by_subject: dict[str, list[Row]] = collections.defaultdict(list)
        for row in rows:
            by_subject[row.subject].append(row)
        published: list[int] = []
        failed: list[tuple[Row, Exception]] = []

        async def publish_in_order(rows: Sequence[Row]) -> None:
            for row in rows:
                try:
                    if isinstance(row.event, Exception):
                        raise row.event
                    await self._publisher.publish(row.event)
                except (BusUnavailableError, TimeoutError):
                    raise  # not because of the event
                except Exception as error:
                    failed.append((row, error))
                    return
                published.append(row.sequence)

        try:
            async with asyncio.timeout(self._time_left()):
                results = await asyncio.gather(*map(publish_in_order, by_subject.values()), return_exceptions=True)
        finally:
            if published:
                await self._database.write(lambda connection: self._outbox.remove(connection, published))
                self.published += len(published)
            if failed:
                await self._record_failures(failed)
        for result in results:
            if result is not None:
                raise result

    async def _record_failures(self, failed: Sequence[tuple[Row, Exception]]) -> None:
        """Delay the subjects of events that failed; set aside those that failed MAX_ATTEMPTS times."""
        reasons = {row.sequence: _reason(error) for row, error in failed}
        given_up = [row for row, _ in failed if row.attempts + 1 >= MAX_ATTEMPTS]
        to_retry = [row for row, _ in failed if row.attempts + 1 < MAX_ATTEMPTS]

        def work(connection: sa.Connection) -> None:
            self._outbox.count_attempt(connection, [row.sequence for row in to_retry])
            for row in given_up:
                self._outbox.set_aside(connection, row.sequence, reasons[row.sequence], self._wall())

        await self._database.write(work)
        for row in to_retry:
            self._delayed_until[row.subject] = self._now() + self._retry * 2.0**row.attempts
        for row in given_up:
            self.set_aside += 1
            log.error(
                "event set aside; it is not published",
                table="outbox_set_aside",
                sequence=row.sequence,
                subject=row.subject[:MAX_ATTRIBUTE],
                attempts=row.attempts + 1,
                error=reasons[row.sequence],
            )

    def _measure_lag(self, rows: Sequence[Row]) -> None:
        oldest = next((row.event.time for row in rows if isinstance(row.event, Event)), None)
        self.lag = 0.0 if oldest is None else max(0.0, (self._wall() - oldest).total_seconds())
        if self._behind and self.lag < LAG_WARNING:
            self._behind = False
            log.info("outbox caught up")

    def _warn_of_lag(self, why: str) -> None:
        """Log that events are late, every LAG_WARNING seconds."""
        if self.lag >= LAG_WARNING and (not self._behind or self._now() >= self._warned + LAG_WARNING):
            self._behind, self._warned = True, self._now()
            log.warning("outbox is behind", seconds=round(self.lag, 1), error=why)

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)


def _reason(error: Exception) -> str:
    """Why an event failed, as text that any database can store."""
    text = f"{type(error).__name__}: {error}"[:MAX_REASON]
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()
