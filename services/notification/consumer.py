"""Processes the order service's events: notifies users once per event, however many times it is delivered."""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections.abc import Callable, Mapping

import structlog
from google.protobuf.message import DecodeError

from services.events import Event, RejectedError
from services.notification.domain import Kind, Notification
from services.notification.store import NotificationStore
from weft.order.v1 import events_pb2

log = structlog.stdlib.get_logger()

CONSUMER = "notification"
"""The durable name under which all replicas consume."""

EVENT_TYPES = "weft.order.v1"
"""The prefix of the events that are consumed."""

Message = (
    events_pb2.OrderCreated
    | events_pb2.OrderConfirmed
    | events_pb2.OrderShipped
    | events_pb2.OrderDelivered
    | events_pb2.OrderCancelled
)

KINDS: Mapping[str, tuple[type[Message], Kind]] = {
    message.DESCRIPTOR.full_name: (message, kind)
    for message, kind in (
        (events_pb2.OrderCreated, Kind.ORDER_CREATED),
        (events_pb2.OrderConfirmed, Kind.ORDER_CONFIRMED),
        (events_pb2.OrderShipped, Kind.ORDER_SHIPPED),
        (events_pb2.OrderDelivered, Kind.ORDER_DELIVERED),
        (events_pb2.OrderCancelled, Kind.ORDER_CANCELLED),
    )
}
"""Each event type's message, and the kind of notification that it leads to."""


_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class OrderEvents:
    """A ``services.events.Handler`` that adds notifications to ``store``. ``now``: the wall clock, in UTC."""

    def __init__(self, store: NotificationStore, now: Callable[[], dt.datetime] = _now) -> None:
        self._store = store
        self._now = now

    async def __call__(self, event: Event) -> None:
        """Notify the user. Raises RejectedError for an invalid event."""
        if event.type not in KINDS:
            raise RejectedError(f"unknown event type {event.type}")
        message, kind = KINDS[event.type]
        try:
            order = message.FromString(event.data).order
        except DecodeError as error:
            raise RejectedError(f"not a {event.type}: {error}") from None
        if not _UUID.fullmatch(order.id) or not _UUID.fullmatch(order.user_id):
            raise RejectedError("the order's id or the user's id is not a UUID")
        notification = Notification.new(
            str(uuid.uuid4()),
            kind,
            user_id=order.user_id,
            order_id=order.id,
            event_time=event.time,
            now=self._now(),
        )
        if await self._store.add_once(event.id, notification):
            log.info("user notified", kind=kind.value, order_id=order.id, user_id=order.user_id)
        else:
            log.debug("duplicate event ignored", order_id=order.id)
