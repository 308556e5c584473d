"""Events between services: CloudEvents 1.0, and a bus that keeps them until everyone who subscribed has acted on them.

A service publishes what has happened to it; who acts on that is not its concern. Every event arrives at least once, in
no promised order, so whoever acts on one must know what it has acted on before. ``services.events.nats`` is the bus of
the shop (NATS JetStream), ``services.events.memory`` the one of unit tests; one suite holds both to what is said here.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

CONTENT_TYPE = "application/protobuf"
"""What ``Event.data`` is: the message that the event's type names, serialised."""


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


class BusAwayError(Exception):
    """The bus can't be reached, or didn't say that it kept the event; the same event may be published again."""


class RejectedError(Exception):
    """Raised by a handler that could never act on the event, however often it comes; the message says why."""


class Publisher(Protocol):
    """Takes events."""

    async def publish(self, event: Event) -> None:
        """Return once the bus has kept the event; one that it was given before (by ``id``) it keeps but once.

        Raises BusAwayError.
        """


Handler = Callable[[Event], Awaitable[None]]
"""Acts on an event. Returning says that it is done, RejectedError that it can't be, any other exception that it may
come again."""


class Subscriber(Protocol):
    """Hands out events."""

    def consume(self, consumer: str, types: str, handler: Handler) -> AbstractAsyncContextManager[None]:
        """Have ``handler`` act on the events, also those of before, until the block is left.

        ``consumer``: a name that is kept: those who consume under one name share the events between them, and go on
        where they ended. ``types``: the beginning of the types to consume, ``weft.order.v1`` say. An event whose
        handler raised comes again, later each time; after MAX_ATTEMPTS, or RejectedError, it goes to the dead letters
        with the reason. Leaving the block waits for the handlers that run.
        """


MAX_ATTEMPTS = 6
"""How often an event is handed to a handler that raises, before it goes to the dead letters."""


def backoff(attempt: int) -> float:
    """Seconds until an event whose handler raised at its ``attempt``-th time (from 1) comes again: 0.2 to 3.2."""
    return 0.2 * 2.0 ** (attempt - 1)
