"""Acts on the order service's events: tells users of their orders, once each, however often an event comes."""

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

NAME = "notification"
"""The name under which all replicas consume."""

TYPES = "weft.order.v1"
"""The events that are consumed."""

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
"""What each type of event holds, and what is told because of it."""


_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class OrderEvents:
    """A ``services.events.Handler`` that keeps notifications in ``store``. ``now``: the wall clock, in UTC."""

    def __init__(self, store: NotificationStore, now: Callable[[], dt.datetime] = _now) -> None:
        self._store = store
        self._now = now

    async def __call__(self, event: Event) -> None:
        """Tell the user of what happened. Raises RejectedError for an event that can't be understood."""
        if event.type not in KINDS:
            raise RejectedError(f"is of a type that this release doesn't know: {event.type}")
        message, kind = KINDS[event.type]
        try:
            order = message.FromString(event.data).order
        except DecodeError as error:
            raise RejectedError(f"holds no {event.type}: {error}") from None
        if not _UUID.fullmatch(order.id) or not _UUID.fullmatch(order.user_id):
            raise RejectedError("names no order, or no user, by its UUID")
        notification = Notification.new(
            str(uuid.uuid4()),
            kind,
            user_id=order.user_id,
            order_id=order.id,
            event_time=event.time,
            now=self._now(),
        )
        if await self._store.act(event.id, notification):
            log.info("notified", kind=kind.value, order_id=order.id, user_id=order.user_id)
        else:
            log.debug("duplicate event ignored", order_id=order.id)
