"""Whatever anybody publishes to the broker: what is not an event becomes a dead letter, and the consumer continues."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import nats
import nats.js.errors
import pytest

from services.events import Event, UnpublishableError
from services.events.cloudevents import to_headers
from services.events.memory import MemoryBus
from services.events.nats import ACK_WAIT, NatsBus
from services.notification.consumer import CONSUMER
from tests.processes import HOST, Spawn
from tests.services.broker import Broker
from tests.services.test_shop_events import Seen, event, publish, until

pytestmark = pytest.mark.slow

EVENT_TYPES = "weft.test.v1"
SUBJECT = f"{EVENT_TYPES}.Happened".encode()
LONGEST = f"{EVENT_TYPES}.".encode() + b"x" * 4_000
"""A subject that the broker accepts; prefixed with the 25 characters of a dead letter's, it would not."""


@pytest.fixture
def broker(spawn: Spawn, tmp_path: Path) -> Broker:
    broker = Broker(spawn, tmp_path / "nats")
    broker.start()
    return broker


@pytest.fixture
async def bus(broker: Broker) -> AsyncIterator[NatsBus]:
    async with NatsBus(broker.url, backoff=lambda attempt: 0.0) as bus:
        yield bus


def message(subject: bytes = SUBJECT, headers: bytes = b"", data: bytes = b"x") -> bytes:
    """A message in NATS's protocol. ``headers``: including the version line; none if empty."""
    if not headers:
        return b"PUB %b %d\r\n%b\r\n" % (subject, len(data), data)
    return b"HPUB %b %d %d\r\n%b%b\r\n" % (subject, len(headers), len(headers) + len(data), headers, data)


def send(broker: Broker, messages: Sequence[bytes]) -> None:
    """Publish raw messages; returns once the broker has received them."""
    with socket.create_connection((HOST, broker.port), timeout=10) as stranger:
        stranger.sendall(b'CONNECT {"verbose":false,"headers":true}\r\n' + b"".join(messages) + b"PING\r\n")
        said = b""
        while b"PONG\r\n" not in said:
            received = stranger.recv(65_536)
            assert received, said
            said += received
        assert b"-ERR" not in said


def cloud_event(**wrong: str) -> bytes:
    """The headers of an event, some of them wrong."""
    headers = {**to_headers(event()), **{f"ce-{name}": value for name, value in wrong.items()}}
    return b"NATS/1.0\r\n" + b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items()) + b"\r\n"


HOSTILE = {
    "4,000-character subject": message(LONGEST),
    "subject that is not UTF-8": message(b"weft.test.v1.\xff\xfe"),
    "subject with a form feed": message(b"weft.test.v1.a\x0cb"),
    "subject with a form feed, with headers": message(b"weft.test.v1.a\x0cb", b"NATS/1.0\r\na: b\r\n\r\n"),
    "no headers": message(),
    "header Status 404": message(headers=b"NATS/1.0\r\nStatus: 404\r\n\r\n"),
    "header Status 999": message(headers=b"NATS/1.0\r\nStatus: 999\r\n\r\n"),
    "status line": message(headers=b"NATS/1.0 404 No Messages\r\n\r\n"),
    "status line and headers": message(headers=b"NATS/1.0 409 Gone\r\na: b\r\n\r\n"),
    "status line that is not UTF-8": message(headers=b"NATS/1.0 \xff\xff\xff\r\na: b\r\n\r\n"),
    "header that is not UTF-8": message(headers=b"NATS/1.0\r\nce-id: \xff\xfe\r\n\r\n"),
    "garbage for headers": message(headers=b"garbage\r\n\r\n"),
    "header without a name": message(headers=b"NATS/1.0\r\n: b\r\n\r\n"),
    "1 MiB of data": message(headers=b"NATS/1.0\r\na: b\r\n\r\n", data=b"x" * (1_048_576 - 18)),
    "64 KiB of headers": message(headers=b"NATS/1.0\r\nce-id: " + b"x" * 65_000 + b"\r\n\r\n"),
    "headers that are encoded": message(LONGEST, b"NATS/1.0\r\nce-id: " + b"\xc3\xbc" * 20_000 + b"\r\n\r\n"),
    "id of 4,000 characters": message(headers=cloud_event(id="1" * 4_000)),
    "empty id": message(headers=cloud_event(id="%20")),
    "id with a zero": message(headers=cloud_event(id="a%00b")),
    "time before the first year": message(headers=cloud_event(time="0001-01-01T00:00:00+23:59")),
    "time without a zone": message(headers=cloud_event(time="2026-01-01T00:00:00")),
    "type that is none": message(headers=cloud_event(type="")),
    "half a surrogate": message(headers=cloud_event(subject="%ED%A0%80")),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
async def test_a_hostile_message_delays_no_other_and_is_a_dead_letter(
    broker: Broker, bus: NatsBus, hostile: bytes
) -> None:
    seen = Seen()
    before, after = event("before"), event("after")
    async with bus.consume(CONSUMER, EVENT_TYPES, seen):
        await publish(bus, before)
        await until(lambda: before in seen.events)
        await asyncio.to_thread(send, broker, [hostile])
        await bus.publish(after)  # at the first attempt: the connection is still open
        await until(lambda: after in seen.events, within=ACK_WAIT / 2)
        await nothing_pending(bus)
    letters = await bus.dead_letters(CONSUMER)
    # "Half a surrogate" is decoded as an event with a replacement character.
    assert len(letters) + len(seen.events) == 3
    assert all(len(letter.reason) <= 1_100 for letter in letters)


async def nothing_pending(bus: NatsBus) -> None:
    """Return once the consumer has processed all events."""
    async with asyncio.timeout(ACK_WAIT / 2):
        while True:
            try:
                found = await bus._jetstream().consumer_info("events", CONSUMER)
            except nats.js.errors.NotFoundError:
                continue
            if found.num_pending == 0 and found.num_ack_pending == 0:
                assert found.num_redelivered == 0
                return
            await asyncio.sleep(0.01)  # between two checks


async def test_a_dead_letter_keeps_the_original_subject_and_stream_sequence(broker: Broker, bus: NatsBus) -> None:
    async with bus.consume(CONSUMER, EVENT_TYPES, Seen()):
        await publish(bus, event(type="weft.other.v1.Happened"))
        await asyncio.to_thread(send, broker, [message(LONGEST)])
        await nothing_pending(bus)
    js = bus._jetstream()
    letter = await js.get_msg("dead-letters", 1)
    assert letter.subject == f"dead-letter.{CONSUMER}.event"
    assert letter.headers is not None
    assert letter.headers["weft-subject"] == LONGEST.decode()
    assert letter.headers["weft-sequence"] == "2"


async def test_1300_events_with_4000_character_subjects_delay_no_notification(broker: Broker, bus: NatsBus) -> None:
    seen = Seen()
    after = event("after")
    async with bus.consume(CONSUMER, EVENT_TYPES, seen):
        await publish(bus, event("before"))
        await asyncio.to_thread(send, broker, [message(LONGEST)] * 1_300)
        await bus.publish(after)
        await until(lambda: after in seen.events, within=60)
        await nothing_pending(bus)
    assert len(await bus.dead_letters(CONSUMER)) == 1_300


UNPUBLISHABLE = {
    "type": (event(type=f"weft.test.v1.{'x' * 4_000}"), "type has 4013 characters; it must have 1 to 255"),
    "type of others": (event(type="other.v1.Happened"), "must be the full name of a message in package weft"),
    "type with a space": (event(type="weft.test.v1.A B"), "must be the full name"),
    "subject": (event("x" * 4_000), "subject has 4000 characters"),
    "no subject": (event(""), "subject has 0 characters"),
    "surrogate": (event("\ud800"), "unprintable"),
    "data": (event(data=b"x" * 524289), "data has 524289 bytes; the limit is 524288"),
}


@pytest.mark.parametrize(("wrong", "why"), UNPUBLISHABLE.values(), ids=UNPUBLISHABLE)
async def test_an_event_beyond_the_limits_can_not_be_published(bus: NatsBus, wrong: Event, why: str) -> None:
    await publish(bus, event())
    for each in (bus, MemoryBus()):
        with pytest.raises(UnpublishableError, match=why):
            await each.publish(wrong)
    assert bus.connected


async def test_the_largest_event_arrives(bus: NatsBus) -> None:
    seen = Seen()
    largest = event("\U0001f941" * 255, data=b"x" * 524288, tracestate="a=" + "x" * 510)
    async with bus.consume(CONSUMER, EVENT_TYPES, seen):
        await publish(bus, largest)
        await until(lambda: bool(seen.events))
    assert seen.events == [largest]


async def test_a_trace_that_is_too_long_is_dropped_and_the_event_arrives(bus: NatsBus) -> None:
    seen = Seen()
    async with bus.consume(CONSUMER, EVENT_TYPES, seen):
        await publish(bus, event(traceparent="00-1-2-01", tracestate="x" * 5_000))
        await until(lambda: bool(seen.events))
    assert seen.events[0].trace == {"traceparent": "00-1-2-01"}
