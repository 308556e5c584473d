"""Events between services: CloudEvents 1.0, on a bus that keeps each event until every consumer has processed it.

A service publishes what happened; what others do about it is not its concern. Every event is delivered at least once,
in no guaranteed order, so consumers must recognise events that they have already processed. The shop's bus is
``services.events.nats`` (NATS JetStream); ``services.events.memory`` is for unit tests. One test suite holds both to
what is said here.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from services.common.errors import ExhaustedError, UnavailableError

log = structlog.stdlib.get_logger()

CONTENT_TYPE = "application/protobuf"
"""What ``Event.data`` is: the message that the event's type names, serialised."""

MAX_ATTEMPTS = 6
"""How many times an event is delivered to a handler that fails, before it goes to the dead letters."""

FIRST_BACKOFF, MAX_BACKOFF = 0.2, 5.0
"""Seconds before an event is redelivered, doubled with each attempt."""

MAX_ATTRIBUTE = 255
"""Characters of an event's source, type and subject, at most."""

MAX_ID = 64
"""Characters of an event's id, at most."""

MAX_DATA = 512 * 1024
"""Bytes of an event's data, at most: half of what a broker accepts, which leaves room for the headers."""

MAX_REASON = 1_000
"""Characters of a dead letter's reason, at most."""

_TYPE = re.compile(r"weft(\.[A-Za-z_][A-Za-z0-9_]*)+")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, as a CloudEvent 1.0 in binary mode.

    ``id``: a UUID; the same in every delivery. ``source``: where it happened, a URI reference (``/weft/order``).
    ``type``: the full name of the protobuf message in ``data``, and so versioned (``weft.order.v1.OrderCreated``).
    ``subject``: what it happened to, such as an order's id. ``time``: when it happened, with a time zone. ``trace``:
    the W3C trace context that it happened in (``traceparent``, ``tracestate``).
    """

    id: str
    source: str
    type: str
    subject: str
    time: dt.datetime
    data: bytes = field(repr=False)
    trace: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that a consumer could not process; ``event`` is None when the message was no event. ``reason``: why.
    ``attempts``: how many times it was tried."""

    event: Event | None
    reason: str
    attempts: int


class BusUnavailableError(Exception):
    """The bus can't be reached, or didn't confirm that it stored the event, which may be published again."""


class UnpublishableError(Exception):
    """The event itself is invalid, and publishing it will always fail; the message says what is wrong."""


class RejectedError(Exception):
    """Raised by a handler that can never process the event, however often it is delivered; the message says why."""


class Publisher(Protocol):
    """Publishes events."""

    async def publish(self, event: Event) -> None:
        """Return once the bus has stored the event. An event that it has already stored (by ``id``) is stored once.

        Raises BusUnavailableError, and UnpublishableError for an event that fails ``validate``.
        """


Handler = Callable[[Event], Awaitable[None]]
"""Processes an event. What it raises decides what happens to the event; see ``handle``."""


class Subscriber(Protocol):
    """Delivers events."""

    def consume(self, consumer: str, types: str, handler: Handler) -> AbstractAsyncContextManager[None]:
        """Deliver events to ``handler``, including earlier ones, until the block is left.

        ``consumer``: a durable name: everybody who consumes under it shares its events and continues where the others
        stopped. ``types``: the prefix of the types to consume, such as ``weft.order.v1``. Leaving the block waits for
        handlers that are running.
        """

    async def dead_letters(self, consumer: str) -> list[DeadLetter]:
        """What the consumer could not process, oldest first. Raises BusUnavailableError."""


class Bus(Publisher, Subscriber, Protocol):
    """Publishes and delivers events."""


@dataclass(frozen=True, slots=True)
class Processed:
    """The event was processed."""


@dataclass(frozen=True, slots=True)
class Redeliver:
    """The event is to be delivered again, after ``delay`` seconds."""

    delay: float


@dataclass(frozen=True, slots=True)
class Discard:
    """The event goes to the dead letters."""

    reason: str


def validate(event: Event) -> None:
    """Raise UnpublishableError unless the event is within the limits above, which every bus and consumer supports."""
    attributes = {
        "id": (event.id, MAX_ID),
        "source": (event.source, MAX_ATTRIBUTE),
        "type": (event.type, MAX_ATTRIBUTE),
        "subject": (event.subject, MAX_ATTRIBUTE),
    }
    for name, (value, limit) in attributes.items():
        if not 1 <= len(value) <= limit:
            raise UnpublishableError(f"{name} has {len(value)} characters; it must have 1 to {limit}")
        if not value.isprintable():
            raise UnpublishableError(f"{name} contains unprintable characters")
    if not _TYPE.fullmatch(event.type):
        raise UnpublishableError(f"type {event.type!r} must be the full name of a message in package weft")
    if len(event.data) > MAX_DATA:
        raise UnpublishableError(f"data has {len(event.data)} bytes; the limit is {MAX_DATA}")
    if event.time.tzinfo is None:
        raise UnpublishableError("time has no time zone")
    try:
        event.time.astimezone(dt.UTC)
    except OverflowError:
        raise UnpublishableError("time is out of range in UTC") from None


def backoff(attempt: int) -> float:
    """Seconds before an event whose ``attempt``-th delivery (from 1) failed is redelivered."""
    return float(min(FIRST_BACKOFF * 2.0 ** min(attempt - 1, 10), MAX_BACKOFF))


async def handle(
    handler: Handler, event: Event, attempt: int, backoff: Callable[[int], float] = backoff
) -> Processed | Redeliver | Discard:
    """Call ``handler`` with the event, for the ``attempt``-th time (from 1), and decide what happens to the event.

    It is discarded when the handler raises RejectedError, or anything else in attempt MAX_ATTEMPTS. UnavailableError
    and ExhaustedError mean that something the handler needs is missing, which is not the event's fault: it is
    redelivered without limit.
    """
    with structlog.contextvars.bound_contextvars(
        event_id=event.id, event_type=event.type, subject=event.subject, **event.trace
    ):
        try:
            await handler(event)
        except RejectedError as error:
            log.error("event rejected", error=str(error))
            return Discard(str(error))
        except (UnavailableError, ExhaustedError) as error:
            log.warning("event failed; it will be redelivered", attempt=attempt, error=str(error))
            return Redeliver(backoff(attempt))
        except Exception as error:
            discard = attempt >= MAX_ATTEMPTS
            log.exception("handler raised", attempt=attempt, discarded=discard)
            return Discard(f"{type(error).__name__}: {error}") if discard else Redeliver(backoff(attempt))
        return Processed()
