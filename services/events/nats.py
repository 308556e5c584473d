"""The bus on NATS JetStream: CloudEvents in binary mode, kept in a stream until each durable consumer acted on them.

Streams: ``events`` keeps what is published, under subjects that are the events' types; ``dead-letters`` keeps what a
consumer could not act on, under ``dead-letter.<consumer>.event``: a subject made of the original one could be longer
than the broker takes. Headers follow CloudEvents' NATS binding: each
attribute is ``ce-`` and its name, ``ce-datacontenttype`` too, with values percent-encoded as in HTTP. The broker drops
an event that it was given within the last DUPLICATES_WITHIN seconds, by ``Nats-Msg-Id``.

Anybody who reaches the broker can publish anything below ``weft``. Whatever a message holds, a consumer acts on it or
moves it to the dead letters, and goes on with the next.

The broker may be away at any time, also at the start: what is published then is refused at once, and consumers go on
when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import re
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Any

import nats
import nats.errors
import nats.js.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, StorageType, StreamConfig
from nats.protocol import parser

from services import events
from services.events import (
    CONTENT_TYPE,
    MAX_REASON,
    Again,
    BusAwayError,
    Dead,
    DeadLetter,
    Done,
    Event,
    Handler,
    RejectedError,
    UnpublishableError,
)

log = structlog.stdlib.get_logger()

KEPT_FOR = 7 * 24 * 3600.0
"""Seconds that the broker keeps an event, for consumers that come late or go back to the start."""

DUPLICATES_WITHIN = 600.0
"""Seconds in which the broker knows an event that it is given again. Longer than a relay takes to try again."""

PUBLISH_TIMEOUT = 2.0
"""Seconds that the broker has to say that it kept an event."""

ACK_WAIT = 10.0
"""Seconds after which the broker takes a consumer for dead and hands its event to another. Longer than a handler runs:
a unit of work may wait ``services.common.database.BUSY_TIMEOUT`` for its lock."""

WORKERS = 8
"""Events that are acted on at a time, under one ``consume``."""

RECONNECT = 0.2
"""Seconds between two attempts to reach the broker."""

_FETCH = 1.0
"""Seconds that one request for an event lasts; so long may leaving ``consume`` take while nothing comes."""

_STREAMS = (
    StreamConfig(
        name="events",
        subjects=["weft.>"],
        storage=StorageType.FILE,
        max_age=KEPT_FOR,
        duplicate_window=DUPLICATES_WITHIN,
    ),
    StreamConfig(
        name="dead-letters",
        subjects=["dead-letter.>"],
        storage=StorageType.FILE,
        duplicate_window=DUPLICATES_WITHIN,
    ),
)

_AWAY = (nats.errors.Error, OSError, asyncio.TimeoutError)
"""What nats-py raises when the broker is away, goes away, or doesn't answer."""

_NO_MESSAGE = frozenset({"404", "408"})
"""The broker's answers to a request for an event when there is none."""

_MOST_HEADERS = 32 * 1024
"""Bytes of an event's headers that a dead letter keeps. JetStream takes 64 KiB of headers, some of which are ours."""

_SPARE = 1024
"""Bytes of a message that are kept free for what the client adds."""

_HEADER = re.compile("ce-[a-z0-9]{1,32}", re.IGNORECASE)

_PLAIN = "!#$&'()*+,/:;<=>?@[\\]^`{|}~"
"""What a header's value holds as it is, besides letters, digits and ``_.-``. The rest of ASCII (space, double quote,
percent, control characters) and all beyond it is percent-encoded (CloudEvents' HTTP binding, 3.1.3.2)."""


class _Client(Client):
    """nats-py's client, for a broker where anybody may publish: its own ends the connection over a message with a
    subject or headers that it can't decode, and the broker would deliver that message again and again."""

    def _build_message(self, sid: int, subject: bytes, *rest: Any) -> Any:
        return super()._build_message(sid, subject.decode(errors="replace").encode(), *rest)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            found: dict[str, str] | None = await super()._process_headers(headers)
        except Exception:
            return None  # then it is no CloudEvent
        return found

    leaving = False
    """Whether this process ends the connection."""

    async def lost(self) -> None:
        if not self.leaving:
            log.warning("broker disconnected; reconnecting")


# The broker takes every character in a subject but these four; nats-py ends a subject at others, too (a form feed).
for _name in ("MSG_RE", "HMSG_RE"):
    _pattern = getattr(parser, _name).pattern.replace(rb"[^\s]", rb"[^ \t\r\n]")
    setattr(parser, _name, re.compile(_pattern))


class NatsBus:
    """A ``Bus``. ``url``: the broker's (``nats://127.0.0.1:4222``), several with commas between. ``backoff``: seconds
    before an event comes again after its n-th attempt.

    ::

        async with NatsBus("nats://127.0.0.1:4222") as bus:  # reaches for the broker from here on
            await bus.publish(event)
    """

    def __init__(self, url: str, backoff: Callable[[int], float] = events.backoff) -> None:
        self._url = url
        self._backoff = backoff
        self._client: Client | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._up = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached right now."""
        return self._client is not None and self._client.is_connected

    async def __aenter__(self) -> NatsBus:
        self._keeper = asyncio.create_task(self._keep(), name="nats-bus")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._keeper is not None
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)

    async def publish(self, event: Event) -> None:
        events.check(event)
        await self._publish(event.type, event.data, {**to_headers(event), "Nats-Msg-Id": event.id})

    @contextlib.asynccontextmanager
    async def consume(self, consumer: str, types: str, handler: Handler) -> AsyncIterator[None]:
        stop = asyncio.Event()
        workers = [asyncio.create_task(self._work(consumer, types, handler, stop)) for _ in range(WORKERS)]
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(*workers)

    async def dead_letters(self, consumer: str) -> list[DeadLetter]:
        letters = []
        event: Event | None
        try:
            js = self._jetstream()
            found = await js.stream_info("dead-letters", subjects_filter=f"dead-letter.{consumer}.>")
            left = sum((found.state.subjects or {}).values())
            if left:
                subscription = await js.subscribe(
                    f"dead-letter.{consumer}.>", stream="dead-letters", ordered_consumer=True
                )
                for _ in range(left):
                    message = await subscription.next_msg(timeout=PUBLISH_TIMEOUT)
                    headers = message.headers or {}
                    try:
                        event = from_headers(headers, message.data)
                    except RejectedError:
                        event = None
                    reason = urllib.parse.unquote(headers.get("weft-reason", ""))
                    attempts = headers.get("weft-attempts", "")
                    letters.append(DeadLetter(event, reason, int(attempts) if attempts.isdecimal() else 0))
                await subscription.unsubscribe()
        except _AWAY as error:
            raise BusAwayError(f"the broker's dead letters can't be read: {error}") from error
        return letters

    async def _keep(self) -> None:
        """Keep a connection. nats-py mends one that broke, but gives up on one that the broker ended with an error."""
        while True:
            ended = asyncio.Event()

            async def closed(ended: asyncio.Event = ended) -> None:
                ended.set()

            client = _Client()
            try:
                await client.connect(
                    self._url.split(","),
                    connect_timeout=2,
                    reconnect_time_wait=RECONNECT,  # type: ignore[arg-type]  # it is slept for, and may be a float
                    max_reconnect_attempts=-1,
                    ping_interval=2,
                    max_outstanding_pings=2,
                    # What is sent while the broker is away is refused, and not kept for its return: who sent it will
                    # have tried again by then, in the right order.
                    pending_size=0,
                    error_cb=_quiet,
                    disconnected_cb=client.lost,
                    reconnected_cb=_reconnected,
                    closed_cb=closed,
                )
                await _declare(client.jetstream())
                self._client = client
                self._up.set()
                log.info("broker connected")
                await ended.wait()
            except _AWAY as error:
                log.warning("broker connection failed; retrying", error=str(error))
            finally:
                self._client = None
                self._up.clear()
                client.leaving = True
                with contextlib.suppress(*_AWAY):
                    await client.close()
            await asyncio.sleep(RECONNECT)

    def _connected(self) -> Client:
        if self._client is None or not self._client.is_connected:
            raise BusAwayError("the broker is away")
        return self._client

    def _jetstream(self) -> JetStreamContext:
        return self._connected().jetstream()

    async def _publish(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        client = self._connected()
        size, most = _size(headers) + len(data) + _SPARE, client.max_payload
        if size > most:
            # The broker would end the connection over it.
            raise UnpublishableError(f"has {size} bytes with its headers, and the broker takes {most}")
        js = client.jetstream()
        try:
            await js.publish(subject, data, timeout=PUBLISH_TIMEOUT, headers=headers)
        except nats.js.errors.NoStreamResponseError as error:
            # A broker that lost its store, or still reads it.
            with contextlib.suppress(*_AWAY):
                await _declare(js)
            raise BusAwayError("the broker had no stream for the event") from error
        except _AWAY as error:
            raise BusAwayError(f"the broker didn't keep the event: {str(error) or type(error).__name__}") from error

    async def _work(self, consumer: str, types: str, handler: Handler, stop: asyncio.Event) -> None:
        """Act on one event after the other."""
        complaint = ""
        while not stop.is_set():
            try:
                client = self._connected()
                await client.jetstream().add_consumer(
                    "events",
                    ConsumerConfig(
                        durable_name=consumer,
                        filter_subject=f"{types}.>",
                        ack_policy=AckPolicy.EXPLICIT,
                        ack_wait=ACK_WAIT,
                        max_deliver=-1,  # it is ours to count, so that the reason of the last failure is kept
                    ),
                )
                inbox = client.new_inbox()
                subscription = await client.subscribe(inbox)
                try:
                    while not stop.is_set():
                        request = {"batch": 1, "expires": int(_FETCH * 1e9)}
                        await client.publish(
                            f"$JS.API.CONSUMER.MSG.NEXT.events.{consumer}", json.dumps(request).encode(), inbox
                        )
                        # nats-py's own fetch takes an event with a header "Status" for an answer of the broker.
                        message = await subscription.next_msg(timeout=_FETCH + 0.5)
                        if message.reply:
                            await self._act(message, consumer, handler)
                        elif (status := (message.headers or {}).get("Status", "")) not in _NO_MESSAGE:
                            raise BusAwayError(f"the broker gives no event: {status}")
                finally:
                    with contextlib.suppress(*_AWAY):
                        await subscription.unsubscribe()
            except (BusAwayError, *_AWAY) as error:
                # While there is no connection, the connection's own log says why; after that, requests time out once.
                if self.connected and not isinstance(error, TimeoutError) and str(error) != complaint:
                    complaint = str(error)
                    log.warning("broker gives no events; retrying", consumer=consumer, error=complaint)
                await _pause(stop)
            except Exception:
                log.exception("consumer failed; retrying", consumer=consumer)
                await _pause(stop)

    async def _act(self, message: Msg, consumer: str, handler: Handler) -> None:
        attempt = message.metadata.num_delivered
        event: Event | None = None
        ending: Done | Again | Dead
        try:
            event = from_headers(message.headers or {}, message.data)
        except RejectedError as error:
            log.error("message rejected", subject=_short(message.subject), error=str(error))
            ending = Dead(str(error))
        else:
            ending = await events.handle(handler, event, attempt, self._backoff)
        if isinstance(ending, Again):
            await message.nak(ending.delay)
            return
        if isinstance(ending, Dead):
            await self._bury(message, event, consumer, ending.reason, attempt)
        await message.ack()

    async def _bury(self, message: Msg, event: Event | None, consumer: str, reason: str, attempt: int) -> None:
        """Copy a message to the dead letters, without those of its parts that would make the copy too large."""
        sequence = message.metadata.sequence.stream
        original = to_headers(event) if event is not None else _cloud_event_headers(message.headers or {})
        data, reason = message.data, reason[:MAX_REASON]
        if _size(original) > _MOST_HEADERS:
            original, reason = {}, f"{reason} (headers dropped: too large)"
        if len(data) > min(events.MAX_DATA, self._connected().max_payload // 2):
            data, reason = b"", f"{reason} (data dropped: {len(data)} bytes)"
        await self._publish(
            f"dead-letter.{consumer}.event",
            data,
            {
                **original,
                "Nats-Msg-Id": f"{consumer}.{sequence}",
                "weft-subject": _quote(message.subject),
                "weft-sequence": str(sequence),
                "weft-reason": _quote(reason),
                "weft-attempts": str(attempt),
            },
        )


async def _pause(stop: asyncio.Event) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(stop.wait(), RECONNECT)


async def _declare(js: JetStreamContext) -> None:
    """Have the broker keep the streams as they are meant to be."""
    for stream in _STREAMS:
        try:
            await js.add_stream(stream)
        except nats.js.errors.BadRequestError:  # it is there, in the shape of another release
            await js.update_stream(stream)


async def _quiet(error: Exception) -> None:
    log.debug("broker connection", error=str(error))


async def _reconnected() -> None:
    log.info("broker back")


def to_headers(event: Event) -> dict[str, str]:
    """The event without its data, as headers."""
    attributes = {
        "specversion": "1.0",
        "id": event.id,
        "source": event.source,
        "type": event.type,
        "subject": event.subject,
        "time": event.time.astimezone(dt.UTC).isoformat().replace("+00:00", "Z"),
        "datacontenttype": CONTENT_TYPE,
        **events.traced(event.trace),
    }
    return {f"ce-{name}": _quote(value) for name, value in attributes.items()}


def from_headers(headers: Mapping[str, str], data: bytes) -> Event:
    """The event that came. Raises RejectedError for what is no CloudEvent with protobuf data."""
    attributes: dict[str, Any] = {
        name.lower().removeprefix("ce-"): urllib.parse.unquote(value)
        for name, value in headers.items()
        if name.lower().startswith("ce-")
    }
    try:
        if attributes["specversion"] != "1.0" or attributes["datacontenttype"] != CONTENT_TYPE:
            raise RejectedError(f"is not a CloudEvent 1.0 with {CONTENT_TYPE}")
        event = Event(
            id=attributes["id"],
            source=attributes["source"],
            type=attributes["type"],
            subject=attributes["subject"],
            time=dt.datetime.fromisoformat(attributes["time"]),
            data=data,
            trace=events.traced(attributes),
        )
        events.check(event)
    except KeyError as error:
        raise RejectedError(f"is not a CloudEvent with protobuf data: it has no {error.args[0]}") from None
    except (ValueError, UnpublishableError) as error:
        raise RejectedError(f"is not a CloudEvent of ours: {error}") from None
    return event


def _cloud_event_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of a message's headers that have the names of a CloudEvent's attributes, whatever they hold."""
    return {
        name: urllib.parse.quote(value, safe=f"{_PLAIN}%", errors="replace")
        for name, value in headers.items()
        if _HEADER.fullmatch(name)
    }


def _size(headers: Mapping[str, str]) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers.items())


def _short(text: str) -> str:
    return text if len(text) <= events.MAX_ATTRIBUTE else f"{text[: events.MAX_ATTRIBUTE]}..."


def _quote(value: str) -> str:
    return urllib.parse.quote(value, safe=_PLAIN, errors="replace")
