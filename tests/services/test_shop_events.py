"""What the bus promises to publishers and consumers: the same in memory and with a real NATS server."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from services import events
from services.common.errors import UnavailableError
from services.events import Bus, BusUnavailableError, Event, RejectedError
from services.events.cloudevents import from_headers, to_headers
from services.events.memory import MemoryBus
from services.events.nats import NatsBus
from tests.processes import Spawn
from tests.services.broker import Broker

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=dt.UTC)


def event(
    subject: str = "order-1", type: str = "weft.test.v1.Happened", data: bytes = b"\x08\x01", **trace: str
) -> Event:
    return Event(str(uuid.uuid4()), "/weft/test", type, subject, NOW, data, trace)


async def until(condition: Callable[[], bool], within: float = 20.0) -> None:
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 - the condition is any
            await asyncio.sleep(0.005)


async def publish(bus: Bus, *several: Event) -> None:
    """Publish as soon as the bus is available."""
    for one in several:
        async with asyncio.timeout(20):
            while True:
                try:
                    await bus.publish(one)
                    break
                except BusUnavailableError:
                    await asyncio.sleep(0.01)


@pytest.fixture
def broker(spawn: Spawn, tmp_path: Path) -> Broker:
    broker = Broker(spawn, tmp_path / "nats")
    broker.start()
    return broker


@pytest.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.slow)])
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[Bus]:
    """A bus that redelivers events without delay."""
    if request.param == "memory":
        yield MemoryBus(backoff=lambda attempt: 0.0)
        return
    broker: Broker = request.getfixturevalue("broker")
    async with NatsBus(broker.url, backoff=lambda attempt: 0.0) as bus:
        yield bus


class Seen:
    """A handler that records its events, and raises what the test sets."""

    def __init__(self, *errors: Exception | None) -> None:
        self.events: list[Event] = []
        self._errors = list(errors)

    async def __call__(self, event: Event) -> None:
        self.events.append(event)
        error = self._errors.pop(0) if self._errors else None
        if error is not None:
            raise error


async def test_an_event_arrives_as_it_was_published(bus: Bus) -> None:
    seen = Seen()
    published = event(
        "ümläut 100%",
        data=bytes(range(256)),
        traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
        tracestate="a=b,c=d",
    )
    async with bus.consume("one", "weft.test.v1", seen):
        await publish(bus, published)
        await until(lambda: bool(seen.events))
    assert seen.events == [published]


async def test_a_new_consumer_gets_earlier_events_of_its_types(bus: Bus) -> None:
    wanted = [event(str(n)) for n in range(5)]
    await publish(bus, *wanted, event(type="weft.test.v2.Happened"), event(type="weft.testing.v1.Happened"))
    seen = Seen()
    async with bus.consume("one", "weft.test.v1", seen):
        await until(lambda: len(seen.events) >= 5)
    assert sorted(seen.events, key=lambda each: each.subject) == wanted


async def test_an_event_published_twice_is_stored_once(bus: Bus) -> None:
    twice, last = event("twice"), event("last")
    seen = Seen()
    async with bus.consume("one", "weft.test.v1", seen):
        await publish(bus, twice, twice, last)
        await until(lambda: last in seen.events)
    assert seen.events.count(twice) == 1


async def test_each_consumer_gets_all_events_and_workers_of_one_name_share_them(bus: Bus) -> None:
    first, second, other = Seen(), Seen(), Seen()
    published = [event(str(n)) for n in range(40)]
    async with (
        bus.consume("shared", "weft.test.v1", first),
        bus.consume("shared", "weft.test.v1", second),
        bus.consume("other", "weft.test.v1", other),
    ):
        await publish(bus, *published)
        await until(lambda: len(first.events) + len(second.events) >= 40 and len(other.events) >= 40)
    assert sorted(int(each.subject) for each in [*first.events, *second.events]) == list(range(40))
    assert sorted(int(each.subject) for each in other.events) == list(range(40))


async def test_a_consumer_resumes_where_it_stopped(bus: Bus) -> None:
    first, second = Seen(), Seen()
    a, b = event("a"), event("b")
    async with bus.consume("one", "weft.test.v1", first):
        await publish(bus, a)
        await until(lambda: first.events == [a])
    await publish(bus, b)
    async with bus.consume("one", "weft.test.v1", second):
        await until(lambda: bool(second.events))
    assert (first.events, second.events) == ([a], [b])


async def test_leaving_waits_for_running_handlers(bus: Bus) -> None:
    begun, go, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow(event: Event) -> None:
        begun.set()
        await go.wait()
        ended.set()

    async with bus.consume("one", "weft.test.v1", slow):
        await publish(bus, event())
        await begun.wait()
        asyncio.get_running_loop().call_later(0.05, go.set)
    assert ended.is_set()


async def test_an_event_is_redelivered_after_its_handler_raised(bus: Bus) -> None:
    seen = Seen(RuntimeError("once"), RuntimeError("twice"))
    async with bus.consume("one", "weft.test.v1", seen):
        await publish(bus, event())
        await until(lambda: len(seen.events) == 3)
    assert await bus.dead_letters("one") == []


async def test_after_six_attempts_an_event_is_a_dead_letter_with_the_reason(bus: Bus) -> None:
    seen = Seen(*[RuntimeError("no luck")] * 100)
    poison = event(traceparent="00-1-2-01")
    async with bus.consume("one", "weft.test.v1", seen):
        await publish(bus, poison)
        await until(lambda: len(seen.events) == 6)
    assert seen.events == [poison] * 6
    (letter,) = await bus.dead_letters("one")
    assert (letter.event, letter.reason, letter.attempts) == (poison, "RuntimeError: no luck", 6)
    assert await bus.dead_letters("other") == []


async def test_a_rejected_event_is_immediately_a_dead_letter_and_delays_no_other(bus: Bus) -> None:
    seen = Seen(RejectedError("not for me: 100 % wrong"))
    bad, good = event("bad"), event("good")
    async with bus.consume("one", "weft.test.v1", seen):
        await publish(bus, bad)
        await until(lambda: seen.events == [bad])
        await publish(bus, good)
        await until(lambda: good in seen.events)
    assert seen.events == [bad, good]
    (letter,) = await bus.dead_letters("one")
    assert (letter.event, letter.reason, letter.attempts) == (bad, "not for me: 100 % wrong", 1)


async def test_an_event_is_redelivered_without_limit_while_its_handler_lacks_something(bus: Bus) -> None:
    unavailable = UnavailableError("DATABASE_AWAY", "can't open the database")
    tries = 3 * 6
    seen = Seen(*[unavailable] * tries)
    async with bus.consume("one", "weft.test.v1", seen):
        await publish(bus, event())
        await until(lambda: len(seen.events) == tries + 1)
    assert await bus.dead_letters("one") == []


def test_backoff_grows_up_to_a_limit() -> None:
    assert [events.backoff(attempt) for attempt in range(1, 8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert events.backoff(10**6) == 5.0


def test_headers_are_those_of_cloudevents_in_binary_mode() -> None:
    published = event('a "b" 100% ü', traceparent="00-1-2-01")
    assert to_headers(published) == {
        "ce-specversion": "1.0",
        "ce-id": published.id,
        "ce-source": "/weft/test",
        "ce-type": "weft.test.v1.Happened",
        "ce-subject": "a%20%22b%22%20100%25%20%C3%BC",
        "ce-time": "2026-01-02T03:04:05.678901Z",
        "ce-datacontenttype": "application/protobuf",
        "ce-traceparent": "00-1-2-01",
    }
    assert from_headers(to_headers(published), published.data) == published


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"ce-id": None}, "id is missing"),
        ({"ce-time": "yesterday"}, "invalid event: Invalid isoformat"),
        ({"ce-specversion": "2.0"}, "not a CloudEvent 1.0"),
        ({"ce-datacontenttype": "application/json"}, "with application/protobuf"),
    ],
)
def test_invalid_events_are_rejected(wrong: dict[str, str | None], complaint: str) -> None:
    headers = {name: value for name, value in {**to_headers(event()), **wrong}.items() if value is not None}
    with pytest.raises(RejectedError, match=complaint):
        from_headers(headers, b"")


async def test_publishing_fails_immediately_while_the_broker_is_unavailable(free_port: Callable[[], int]) -> None:
    async with NatsBus(f"nats://127.0.0.1:{free_port()}") as bus:
        with pytest.raises(BusUnavailableError):
            await bus.publish(event())
        async with bus.consume("one", "weft.test.v1", Seen()):
            assert not bus.connected


async def test_closing_the_bus_logs_no_warning_about_the_broker(
    spawn: Spawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = Broker(spawn, tmp_path / "nats")
    broker.start()
    for lost in (False, True):
        async with NatsBus(broker.url) as bus:
            await publish(bus, event())
            if lost:
                broker.kill()
                await until(lambda: not bus.connected)
        assert ("broker disconnected" in capsys.readouterr().out) is lost


@pytest.mark.faults
async def test_a_killed_broker_loses_nothing_and_consumers_continue_when_it_is_back(
    spawn: Spawn, tmp_path: Path
) -> None:
    broker = Broker(spawn, tmp_path / "nats")
    seen = Seen()
    before, after = event("before"), event("after")
    async with NatsBus(broker.url) as bus, bus.consume("one", "weft.test.v1", seen):
        broker.start()
        await publish(bus, before)
        broker.kill()
        with pytest.raises(BusUnavailableError):
            await bus.publish(after)
        broker.start()
        await publish(bus, before, after)
        await until(lambda: before in seen.events and after in seen.events)
    assert seen.events.count(after) == 1
