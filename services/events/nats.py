"""The bus on NATS JetStream: a stream keeps events until each durable consumer has processed them.

Streams: ``events`` stores what is published, with the events' types as subjects. ``dead-letters`` stores what a
consumer could not process, with the subject ``dead-letter.<consumer>.event``: one that contains the original subject
could be longer than the broker accepts. The broker drops an event that it received in the last DUPLICATE_WINDOW
seconds, by ``Nats-Msg-Id``.

Anybody who can reach the broker can publish anything under ``weft``. Whatever a message contains, a consumer processes
it or moves it to the dead letters, and continues with the next.

The broker may be unavailable at any time, even at startup: publishing then fails immediately, and consumers continue
when it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.parse
from collections.abc import AsyncIterator, Callable
from types import TracebackType

import nats
import nats.errors
import nats.js.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, StorageType, StreamConfig

from services import events
from services.events import (
    MAX_ATTRIBUTE,
    MAX_REASON,
    BusUnavailableError,
    DeadLetter,
    Discard,
    Event,
    Handler,
    Processed,
    Redeliver,
    RejectedError,
    UnpublishableError,
)
from services.events.cloudevents import cloud_event_headers, encoded_size, from_headers, quote, to_headers
from services.events.nats_client import HardenedClient

log = structlog.stdlib.get_logger()

RETENTION = 7 * 24 * 3600.0
"""Seconds that the broker keeps an event, for consumers that start late or start over."""

DUPLICATE_WINDOW = 600.0
"""Seconds in which the broker recognises an event that is published again. Longer than a relay takes to retry."""

PUBLISH_TIMEOUT = 2.0
"""Seconds that the broker has to confirm that it stored an event."""

ACK_WAIT = 10.0
"""Seconds after which the broker gives up on a consumer and delivers its event to another. Longer than a handler runs:
a unit of work may wait ``services.common.database.BUSY_TIMEOUT`` for its lock."""

WORKERS = 8
"""How many events one ``consume`` processes concurrently."""

RECONNECT_DELAY = 0.2
"""Seconds between two attempts to reach the broker."""

_FETCH_TIMEOUT = 1.0
"""Seconds that one request for an event lasts; leaving ``consume`` may take that long while there are no events."""

_STREAMS = (
    StreamConfig(
        name="events",
        subjects=["weft.>"],
        storage=StorageType.FILE,
        max_age=RETENTION,
        duplicate_window=DUPLICATE_WINDOW,
    ),
    StreamConfig(
        name="dead-letters",
        subjects=["dead-letter.>"],
        storage=StorageType.FILE,
        duplicate_window=DUPLICATE_WINDOW,
    ),
)

_UNAVAILABLE = (nats.errors.Error, OSError, asyncio.TimeoutError)
"""What nats-py raises when the broker can't be reached, disconnects, or doesn't answer."""

_NO_MESSAGE = frozenset({"404", "408"})
"""The broker's answers to a request for an event when there is none."""

_MAX_HEADERS = 32 * 1024
"""Bytes of an event's headers that a dead letter keeps. JetStream accepts 64 KiB of headers, some of which are ours."""

_RESERVED = 1024
"""Bytes of a message that are left for what the client adds."""


class NatsBus:
    """A ``Bus``. ``url``: the broker's (``nats://127.0.0.1:4222``), or several, comma-separated. ``backoff``: seconds
    before an event is redelivered after its n-th attempt.

    ::

        async with NatsBus("nats://127.0.0.1:4222") as bus:  # connects in the background
            await bus.publish(event)
    """

    def __init__(self, url: str, backoff: Callable[[int], float] = events.backoff) -> None:
        self._url = url
        self._backoff = backoff
        self._client: Client | None = None
        self._connecting: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a connection to the broker now."""
        return self._client is not None and self._client.is_connected

    async def __aenter__(self) -> NatsBus:
        self._connecting = asyncio.create_task(self._stay_connected(), name="nats-bus")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._connecting is not None
        self._connecting.cancel()
        await asyncio.gather(self._connecting, return_exceptions=True)

    async def publish(self, event: Event) -> None:
        events.validate(event)
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
            info = await js.stream_info("dead-letters", subjects_filter=f"dead-letter.{consumer}.>")
            count = sum((info.state.subjects or {}).values())
            if count:
                subscription = await js.subscribe(
                    f"dead-letter.{consumer}.>", stream="dead-letters", ordered_consumer=True
                )
                for _ in range(count):
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
        except _UNAVAILABLE as error:
            raise BusUnavailableError(f"can't read the dead letters: {error}") from error
        return letters

    async def _stay_connected(self) -> None:
        """Keep a connection open. nats-py reconnects, but gives up when the broker closes the connection with an
        error."""
        while True:
            closed = asyncio.Event()

            async def on_closed(closed: asyncio.Event = closed) -> None:
                closed.set()

            client = HardenedClient()
            try:
                await client.connect(
                    self._url.split(","),
                    connect_timeout=2,
                    reconnect_time_wait=RECONNECT_DELAY,  # type: ignore[arg-type]  # passed to sleep, so it may be a float
                    max_reconnect_attempts=-1,
                    ping_interval=2,
                    max_outstanding_pings=2,
                    # Fail to send while disconnected, rather than send on reconnecting: by then the sender will have
                    # retried, in the right order.
                    pending_size=0,
                    error_cb=client.on_error,
                    disconnected_cb=client.on_disconnected,
                    reconnected_cb=client.on_reconnected,
                    closed_cb=on_closed,
                )
                await _declare(client.jetstream())
                self._client = client
                log.info("broker connected")
                await closed.wait()
            except _UNAVAILABLE as error:
                log.warning("broker connection failed; retrying", error=str(error))
            finally:
                self._client = None
                client.closing = True
                with contextlib.suppress(*_UNAVAILABLE):
                    await client.close()
            await asyncio.sleep(RECONNECT_DELAY)

    def _connected(self) -> Client:
        if self._client is None or not self._client.is_connected:
            raise BusUnavailableError("the broker is unavailable")
        return self._client

    def _jetstream(self) -> JetStreamContext:
        return self._connected().jetstream()

    async def _publish(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        client = self._connected()
        size, limit = encoded_size(headers) + len(data) + _RESERVED, client.max_payload
        if size > limit:
            # The broker would close the connection.
            raise UnpublishableError(f"has {size} bytes with its headers; the broker's limit is {limit}")
        js = client.jetstream()
        try:
            await js.publish(subject, data, timeout=PUBLISH_TIMEOUT, headers=headers)
        except nats.js.errors.NoStreamResponseError as error:
            # The broker lost its store, or is still loading it.
            with contextlib.suppress(*_UNAVAILABLE):
                await _declare(js)
            raise BusUnavailableError("the broker has no stream for the event") from error
        except _UNAVAILABLE as error:
            why = str(error) or type(error).__name__
            raise BusUnavailableError(f"the broker did not confirm the event: {why}") from error

    async def _work(self, consumer: str, types: str, handler: Handler, stop: asyncio.Event) -> None:
        """Process one event after another."""
        last_error = ""
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
                        max_deliver=-1,  # we count ourselves, to keep the reason of the last failure
                    ),
                )
                inbox = client.new_inbox()
                subscription = await client.subscribe(inbox)
                try:
                    while not stop.is_set():
                        request = {"batch": 1, "expires": int(_FETCH_TIMEOUT * 1e9)}
                        await client.publish(
                            f"$JS.API.CONSUMER.MSG.NEXT.events.{consumer}", json.dumps(request).encode(), inbox
                        )
                        # nats-py's own fetch mistakes an event with a header "Status" for an answer of the broker.
                        message = await subscription.next_msg(timeout=_FETCH_TIMEOUT + 0.5)
                        if message.reply:
                            await self._process(message, consumer, handler)
                        elif (status := (message.headers or {}).get("Status", "")) not in _NO_MESSAGE:
                            raise BusUnavailableError(f"the broker refused to deliver: {status}")
                finally:
                    with contextlib.suppress(*_UNAVAILABLE):
                        await subscription.unsubscribe()
            except (BusUnavailableError, *_UNAVAILABLE) as error:
                # A lost connection is logged elsewhere, and makes requests time out once when it is back.
                if self.connected and not isinstance(error, TimeoutError) and str(error) != last_error:
                    last_error = str(error)
                    log.warning("can't fetch events; retrying", consumer=consumer, error=last_error)
                await _wait_before_retry(stop)
            except Exception:
                log.exception("consumer failed; retrying", consumer=consumer)
                await _wait_before_retry(stop)

    async def _process(self, message: Msg, consumer: str, handler: Handler) -> None:
        attempt = message.metadata.num_delivered
        event: Event | None = None
        result: Processed | Redeliver | Discard
        try:
            event = from_headers(message.headers or {}, message.data)
        except RejectedError as error:
            log.error("message rejected", subject=message.subject[:MAX_ATTRIBUTE], error=str(error))
            result = Discard(str(error))
        else:
            result = await events.handle(handler, event, attempt, self._backoff)
        if isinstance(result, Redeliver):
            await message.nak(result.delay)
            return
        if isinstance(result, Discard):
            await self._add_dead_letter(message, event, consumer, result.reason, attempt)
        await message.ack()

    async def _add_dead_letter(
        self, message: Msg, event: Event | None, consumer: str, reason: str, attempt: int
    ) -> None:
        """Copy a message to the dead letters, without parts that would make the copy too large."""
        sequence = message.metadata.sequence.stream
        original = to_headers(event) if event is not None else cloud_event_headers(message.headers or {})
        data, reason = message.data, reason[:MAX_REASON]
        if encoded_size(original) > _MAX_HEADERS:
            original, reason = {}, f"{reason} (headers dropped: too large)"
        if len(data) > min(events.MAX_DATA, self._connected().max_payload // 2):
            data, reason = b"", f"{reason} (data dropped: {len(data)} bytes)"
        await self._publish(
            f"dead-letter.{consumer}.event",
            data,
            {
                **original,
                "Nats-Msg-Id": f"{consumer}.{sequence}",
                "weft-subject": quote(message.subject),
                "weft-sequence": str(sequence),
                "weft-reason": quote(reason),
                "weft-attempts": str(attempt),
            },
        )


async def _wait_before_retry(stop: asyncio.Event) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(stop.wait(), RECONNECT_DELAY)


async def _declare(js: JetStreamContext) -> None:
    """Create the streams, or update them to what this release needs."""
    for stream in _STREAMS:
        try:
            await js.add_stream(stream)
        except nats.js.errors.BadRequestError:  # it exists, as another release created it
            await js.update_stream(stream)
