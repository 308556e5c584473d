"""What the outbox and its relay promise: no event without its change, none lost or out of order, whatever is killed."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
import uuid
from pathlib import Path

import pytest
import sqlalchemy as sa
import structlog
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from google.protobuf.wrappers_pb2 import Int64Value

from services.common.database import Database
from services.events import BusUnavailableError, Event
from services.events.memory import MemoryBus
from services.events.outbox import Outbox
from services.events.relay import Relay
from tests.services.conftest import Open
from tests.services.test_shop_events import until

LEASE = 0.4
"""Seconds: short, so that another relay takes over soon."""

metadata = sa.MetaData()
outbox = Outbox(metadata, "/weft/test")


@pytest.fixture
def versions(tmp_path: Path) -> Path:
    folder = tmp_path / "versions"
    folder.mkdir()
    (folder / "v0001.py").write_text(
        "from services.events import outbox\nrevision, down_revision = '1', None\n"
        "def upgrade():\n    outbox.create_tables()\n    outbox.add_set_aside()\n"
    )
    return folder


@pytest.fixture
def database(open_database: Open, versions: Path) -> Database:
    return open_database("test", versions)


class Bus(MemoryBus):
    """A bus that can be unavailable, or store an event without confirming it."""

    def __init__(self) -> None:
        super().__init__()
        self.unavailable = False
        self.loses_confirmations = False
        self.published: list[Event] = []
        self.hangs = False
        self.out_of_order = 0
        """How many events were published while another one of their subject was in flight."""
        self._in_flight: set[str] = set()
        self._rng = random.Random(6)

    async def publish(self, event: Event) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.unavailable:
            raise BusUnavailableError("unavailable")
        self.out_of_order += event.subject in self._in_flight
        self._in_flight.add(event.subject)
        try:
            # Events in flight may overtake each other.
            await asyncio.sleep(0.001 * self._rng.randrange(4))
        finally:
            self._in_flight.discard(event.subject)
        self.published.append(event)
        await super().publish(event)
        if self.loses_confirmations:
            raise BusUnavailableError("not confirmed")

    async def wait_stored(self, count: int) -> None:
        """Return once so many events are stored."""
        await until(lambda: len(self.stored) >= count)

    def numbers(self, subject: str) -> list[int]:
        """The numbers of a subject's events, in the order in which the bus stored them."""
        return [Int64Value.FromString(event.data).value for event in self.stored if event.subject == subject]


@pytest.fixture
def bus() -> Bus:
    return Bus()


async def write(database: Database, subject: str, *numbers: int) -> None:
    def work(connection: sa.Connection) -> None:
        for number in numbers:
            outbox.add(connection, "weft.test.v1.Happened", subject, Int64Value(value=number))

    await database.write(work)


async def pending(database: Database) -> int:
    return await database.read(outbox.count)


def relay(database: Database, bus: Bus, name: str = "relay") -> Relay:
    return Relay(database, outbox, bus, name, lease=LEASE, retry=0.02)


async def kill(relay: Relay) -> None:
    """Stop a relay as SIGKILL would: nothing is finished, and the lease is not released."""
    assert relay._task is not None
    relay._task.cancel()
    await asyncio.wait([relay._task])


async def test_the_migration_creates_what_the_code_expects(database: Database) -> None:
    assert await database.read(lambda c: compare_metadata(MigrationContext.configure(c), metadata)) == []


async def test_an_event_is_committed_with_its_transaction_or_not_at_all(database: Database) -> None:
    def work(connection: sa.Connection) -> None:
        outbox.add(connection, "weft.test.v1.Happened", "a", Int64Value(value=1))
        raise RuntimeError("rolled back")

    with pytest.raises(RuntimeError):
        await database.write(work)
    assert await pending(database) == 0


async def test_a_published_event_has_all_its_attributes(database: Database, bus: Bus) -> None:
    time = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    trace = {"traceparent": "00-1-2-01"}
    await database.write(lambda c: outbox.add(c, "weft.test.v1.Happened", "a", Int64Value(value=7), trace, time=time))
    async with relay(database, bus):
        await until(lambda: bool(bus.stored))
    (event,) = bus.stored
    assert (event.source, event.type, event.subject) == ("/weft/test", "weft.test.v1.Happened", "a")
    assert (event.time, event.trace, Int64Value.FromString(event.data).value) == (time, trace, 7)


@pytest.mark.slow
async def test_events_of_a_subject_keep_their_order(database: Database, bus: Bus) -> None:
    async with relay(database, bus) as working:
        for number in range(50):
            await write(database, "a", number)
            await write(database, "b", number)
        await until(lambda: working.published == 100)
    assert bus.numbers("a") == bus.numbers("b") == list(range(50))
    assert await pending(database) == 0


@pytest.mark.slow
async def test_events_wait_while_the_bus_is_unavailable_and_the_lag_is_logged(database: Database, bus: Bus) -> None:
    bus.unavailable = True
    long_ago = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=10)
    with structlog.testing.capture_logs() as logs:
        await database.write(lambda c: outbox.add(c, "weft.test.v1.Happened", "a", Int64Value(value=0), time=long_ago))
        async with relay(database, bus) as working:
            await until(lambda: working.lag > 5.0)
            await until(lambda: any(line["event"] == "outbox is behind" for line in logs))
            await write(database, "a", 1, 2)
            bus.unavailable = False
            await until(lambda: len(bus.stored) == 3 and working.lag == 0)
    assert bus.numbers("a") == [0, 1, 2]
    assert logs[-1]["event"] == "outbox caught up"


@pytest.mark.slow
async def test_an_unconfirmed_event_is_published_again_and_stored_once(database: Database, bus: Bus) -> None:
    bus.loses_confirmations = True
    await write(database, "a", 1, 2)
    async with relay(database, bus):
        await until(lambda: len(bus.published) >= 2)
        bus.loses_confirmations = False
        await until(lambda: len(bus.stored) == 2)
    assert bus.numbers("a") == [1, 2]
    assert await pending(database) == 0


@pytest.mark.slow
async def test_one_relay_is_active_and_another_takes_over_when_it_is_killed(
    open_database: Open, versions: Path, bus: Bus
) -> None:
    databases = [open_database("test", versions) for _ in range(3)]
    relays = [relay(database, bus, f"relay-{n}") for n, database in enumerate(databases)]
    for each in relays:
        await each.__aenter__()
    await until(lambda: any(each.active for each in relays))
    number = 0
    while relays:
        assert sum(each.active for each in relays) <= 1
        for _ in range(5):
            await write(databases[0], "a", *range(number, number + 20))
            number += 20
            await bus.wait_stored(number - 10)  # while it is working
        await until(lambda: any(each.active for each in relays))
        holder = next(each for each in relays if each.active)
        relays.remove(holder)
        if relays:
            await kill(holder)
        else:
            await holder.__aexit__(None, None, None)
    assert bus.out_of_order == 0
    assert bus.numbers("a") == list(range(number))
    assert await pending(databases[0]) == 0


@pytest.mark.slow
async def test_a_relay_stops_publishing_before_its_lease_expires(open_database: Open, versions: Path, bus: Bus) -> None:
    stuck, lively = (open_database("test", versions) for _ in range(2))
    await write(stuck, "a", 1)
    bus.hangs = True
    async with relay(stuck, bus, "stuck") as first:
        await until(lambda: first.active)
        await until(lambda: not first.active)  # it waits for a bus that doesn't respond
        bus.hangs = False
        async with relay(lively, bus, "lively"):
            await until(lambda: bus.numbers("a") == [1])


async def test_leaving_publishes_pending_events_and_releases_the_lease(database: Database, bus: Bus) -> None:
    async with relay(database, bus) as working:
        await until(lambda: working.active)
        await write(database, "a", 1, 2, 3)
    assert bus.numbers("a") == [1, 2, 3]
    assert (await database.read(outbox.lease)).free


async def insert(database: Database, subject: str, **wrong: object) -> None:
    """Write an event with values that ``Outbox.add`` would not write."""
    values = {
        "id": str(uuid.uuid4()),
        "type": "weft.test.v1.Happened",
        "subject": subject,
        "time": "2026-01-02 03:04:05.000000+00:00" if database.file is None else "2026-01-02 03:04:05.000000",
        "data": b"",
        "trace": "{}",
        **wrong,
    }
    statement = "INSERT INTO outbox (id, type, subject, time, data, trace) VALUES (:id, :type, :subject, :time, :data, "
    cast = "CAST(:trace AS json))" if database.file is None else ":trace)"
    if database.file is None:
        statement = statement.replace(":time", "CAST(:time AS timestamptz)")
    await database.write(lambda c: c.execute(sa.text(statement + cast), values))


async def set_aside(database: Database) -> list[tuple[str, int, str]]:
    """What is set aside: subject, attempts and reason."""
    statement = sa.text("SELECT subject, attempts, reason FROM outbox_set_aside ORDER BY sequence")
    return await database.read(lambda connection: [(*row,) for row in connection.execute(statement)])


@pytest.mark.slow
async def test_200_unpublishable_events_are_set_aside_without_delaying_others(database: Database, bus: Bus) -> None:
    for n in range(200):
        await insert(database, f"bad-{n}", type="not a type")
    await write(database, "good", 1, 2)
    with structlog.testing.capture_logs() as logs:
        async with relay(database, bus) as working:
            await until(lambda: bus.numbers("good") == [1, 2])
            await until(lambda: working.set_aside == 200)
    assert await pending(database) == 0
    found = await set_aside(database)
    assert {subject for subject, _, _ in found} == {f"bad-{n}" for n in range(200)}
    assert {attempts for _, attempts, _ in found} == {5}
    assert all("type 'not a type' must be the full name of a message" in reason for *_, reason in found)
    alerts = [line for line in logs if line["log_level"] == "error"]
    assert len(alerts) == 200
    assert alerts[0]["event"] == "event set aside; it is not published"
    assert {"sequence", "subject", "error", "attempts", "table"} <= alerts[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"type": "weft.test.v1." + "x" * 4000}, "type has 4013 characters"),
        ({"type": "other.test.v1.Happened"}, "must be the full name of a message in package weft"),
        ({"data": b"x" * 524289}, "data has 524289 bytes"),
        ({"id": ""}, "id has 0 characters"),
        ({"trace": "null"}, "TypeError"),
    ],
    ids=["long type", "type of others", "large", "no id", "no trace"],
)
async def test_an_invalid_event_is_set_aside_and_its_subject_continues(
    database: Database, bus: Bus, wrong: dict[str, object], reason: str
) -> None:
    await insert(database, "a", **wrong)
    await write(database, "a", 1)
    async with relay(database, bus) as working:
        await until(lambda: bus.numbers("a") == [1])
        assert working.set_aside == 1
    ((subject, attempts, found),) = await set_aside(database)
    assert (subject, attempts) == ("a", 5)
    assert reason in found


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong", [{"trace": "{"}, {"time": "yesterday"}, {"data": "text"}], ids=lambda each: next(iter(each))
)
async def test_an_unreadable_row_is_set_aside(
    open_sqlite: Open, versions: Path, bus: Bus, wrong: dict[str, object]
) -> None:
    database = open_sqlite("test", versions)
    await write(database, "b", 1)
    await insert(database, "a", **wrong)
    await write(database, "c", 1)
    async with relay(database, bus) as working:
        await until(lambda: working.set_aside == 1 and len(bus.stored) == 2)
    assert [subject for subject, *_ in await set_aside(database)] == ["a"]


@pytest.mark.slow
async def test_nothing_is_set_aside_because_the_bus_is_unavailable(database: Database, bus: Bus) -> None:
    bus.unavailable = True
    await write(database, "a", 1)
    for number in range(5 + 1):
        async with relay(database, bus, f"relay-{number}") as working:
            await until(lambda: working.lag > 0)  # it has read the outbox and tried to publish
    assert await set_aside(database) == []
    assert await pending(database) == 1


@pytest.mark.slow
async def test_any_sequence_of_kills_and_outages_ends_with_every_event_once_and_in_order(
    open_database: Open, versions: Path, bus: Bus
) -> None:
    """The relay's invariant, over 25 random sequences."""
    rng = random.Random(6)
    databases = [open_database("test", versions) for _ in range(2)]
    relays: dict[int, Relay] = {}
    written = {"a": 0, "b": 0}
    for _ in range(25):
        for n, database in enumerate(databases):
            if n not in relays:
                relays[n] = await relay(database, bus, f"relay-{n}").__aenter__()
        for subject in written:
            count = rng.randrange(4)
            await write(databases[0], subject, *range(written[subject], written[subject] + count))
            written[subject] += count
        bus.unavailable = rng.random() < 0.3
        bus.loses_confirmations = rng.random() < 0.3
        if rng.random() < 0.3:
            await kill(relays.pop(rng.randrange(2)))
    bus.unavailable = bus.loses_confirmations = False
    await until(lambda: bus.numbers("a") == list(range(written["a"])) and len(bus.stored) == sum(written.values()))
    for each in relays.values():
        await each.__aexit__(None, None, None)
    assert bus.numbers("b") == list(range(written["b"]))
    assert await pending(databases[0]) == 0
