"""Events between services: CloudEvents 1.0, and a bus that keeps them until everyone who subscribed has acted on them.

A service publishes what has happened to it; who acts on that is not its concern. Every event arrives at least once, in
no promised order, so whoever acts on one must know what it has acted on before. ``services.events.nats`` is the bus of
the shop (NATS JetStream), ``services.events.memory`` the one of unit tests; one suite holds both to what is said here.
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
"""How often an event is handed to a handler that raises, before it goes to the dead letters."""

FIRST_BACKOFF, MAX_BACKOFF = 0.2, 5.0
"""Seconds before an event is handed out again, doubled with each attempt."""


MAX_ATTRIBUTE = 255
"""Characters of an event's source, type and subject, at the most."""

MAX_ID = 64
"""Characters of an event's id, at the most."""

MAX_TRACE = 512
"""Characters of ``traceparent`` and of ``tracestate``, at the most (W3C asks for no more)."""

MAX_DATA = 512 * 1024
"""Bytes of an event's data, at the most: half of what a broker takes, which leaves room for any header."""

MAX_REASON = 1_000
"""Characters of a dead letter's reason, at the most."""

_TYPE = re.compile(r"weft(\.[A-Za-z_][A-Za-z0-9_]*)+")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, as a CloudEvent 1.0 in binary mode.

    ``id``: a UUID; an event that comes again has the same one. ``source``: where it happened, a URI reference
    (``/weft/order``). ``type``: the full name of the protobuf message in ``data``, so it is versioned
    (``weft.order.v1.OrderCreated``). ``subject``: what it happened to, an order's id say. ``time``: when, aware.
    ``trace``: the W3C trace context that it happened in (``traceparent``, ``tracestate``), for who acts on it.
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
    """An event that a consumer could not act on; None when what came was no event. ``reason`` says why, ``attempts``
    how often it was tried."""

    event: Event | None
    reason: str
    attempts: int


class BusAwayError(Exception):
    """The bus can't be reached, or didn't say that it kept the event; the same event may be published again."""


class UnpublishableError(Exception):
    """The event itself keeps it from being published, and will do so each time; the message says what is wrong."""


class RejectedError(Exception):
    """Raised by a handler that could never act on the event, however often it comes; the message says why."""


class Publisher(Protocol):
    """Takes events."""

    async def publish(self, event: Event) -> None:
        """Return once the bus has kept the event; one that it was given before (by ``id``) it keeps but once.

        Raises BusAwayError, and UnpublishableError for an event that breaks ``check``.
        """


Handler = Callable[[Event], Awaitable[None]]
"""Acts on an event. What it raises says what becomes of the event; see ``handle``."""


class Subscriber(Protocol):
    """Hands out events."""

    def consume(self, consumer: str, types: str, handler: Handler) -> AbstractAsyncContextManager[None]:
        """Have ``handler`` act on the events, also on those of before, until the block is left.

        ``consumer``: a name that is kept: those who consume under one name share the events between them, and go on
        where they ended. ``types``: the beginning of the types to consume, ``weft.order.v1`` say. Leaving the block
        waits for the handlers that run.
        """

    async def dead_letters(self, consumer: str) -> list[DeadLetter]:
        """What the consumer could not act on, the oldest first. Raises BusAwayError."""


class Bus(Publisher, Subscriber, Protocol):
    """Takes events, and hands them out."""


@dataclass(frozen=True, slots=True)
class Done:
    """The event is acted on."""


@dataclass(frozen=True, slots=True)
class Again:
    """The event is to come again, after ``delay`` seconds."""

    delay: float


@dataclass(frozen=True, slots=True)
class Dead:
    """The event goes to the dead letters."""

    reason: str


def check(event: Event) -> None:
    """Raise UnpublishableError unless the event is within the limits above, which every bus and consumer can handle."""
    attributes = {
        "id": (event.id, MAX_ID),
        "source": (event.source, MAX_ATTRIBUTE),
        "type": (event.type, MAX_ATTRIBUTE),
        "subject": (event.subject, MAX_ATTRIBUTE),
    }
    for name, (value, most) in attributes.items():
        if not 1 <= len(value) <= most:
            raise UnpublishableError(f"{name} has {len(value)} characters, and 1 to {most} are allowed")
        if not value.isprintable():
            raise UnpublishableError(f"{name} has characters that can't be printed")
    if not _TYPE.fullmatch(event.type):
        raise UnpublishableError(f"type {event.type!r} should be the full name of a message below weft")
    if len(event.data) > MAX_DATA:
        raise UnpublishableError(f"data has {len(event.data)} bytes, and {MAX_DATA} are allowed")
    if event.time.tzinfo is None:
        raise UnpublishableError("time has no zone")
    try:
        event.time.astimezone(dt.UTC)
    except OverflowError:
        raise UnpublishableError("time is none in UTC") from None


def traced(attributes: Mapping[str, str]) -> dict[str, str]:
    """The W3C trace context in ``attributes``. What is longer than MAX_TRACE or can't be printed is left out: a broken
    trace is no reason to refuse what it belongs to."""
    return {
        name: value
        for name in ("traceparent", "tracestate")
        if 0 < len(value := attributes.get(name, "")) <= MAX_TRACE and value.isprintable()
    }


def backoff(attempt: int) -> float:
    """Seconds until an event whose handler raised at its ``attempt``-th time (from 1) comes again."""
    return float(min(FIRST_BACKOFF * 2.0 ** min(attempt - 1, 10), MAX_BACKOFF))


async def handle(
    handler: Handler, event: Event, attempt: int, backoff: Callable[[int], float] = backoff
) -> Done | Again | Dead:
    """Have ``handler`` act on the event for the ``attempt``-th time (from 1), and say what becomes of it.

    It is dead when the handler raised RejectedError, or anything else at its MAX_ATTEMPTS-th time. UnavailableError and
    ExhaustedError say that the handler lacks something that is no fault of the event: it comes again without end.
    """
    with structlog.contextvars.bound_contextvars(
        event_id=event.id, event_type=event.type, subject=event.subject, **event.trace
    ):
        try:
            await handler(event)
        except RejectedError as error:
            log.error("event rejected", error=str(error))
            return Dead(str(error))
        except (UnavailableError, ExhaustedError) as error:
            log.warning("event failed; it will be redelivered", attempt=attempt, error=str(error))
            return Again(backoff(attempt))
        except Exception as error:
            dead = attempt >= MAX_ATTEMPTS
            log.exception("handler raised", attempt=attempt, dead=dead)
            return Dead(f"{type(error).__name__}: {error}") if dead else Again(backoff(attempt))
        return Done()
