"""Notifications. Pure: no clock, randomness, storage or gRPC."""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Mapping
from dataclasses import dataclass


class Kind(enum.StrEnum):
    """What a notification is about."""

    ORDER_CREATED = "ORDER_CREATED"
    ORDER_CONFIRMED = "ORDER_CONFIRMED"
    ORDER_SHIPPED = "ORDER_SHIPPED"
    ORDER_DELIVERED = "ORDER_DELIVERED"
    ORDER_CANCELLED = "ORDER_CANCELLED"


TEXTS: Mapping[Kind, str] = {
    Kind.ORDER_CREATED: "Thank you. We have your order {order}.",
    Kind.ORDER_CONFIRMED: "Your order {order} is confirmed.",
    Kind.ORDER_SHIPPED: "Your order {order} is on its way.",
    Kind.ORDER_DELIVERED: "Your order {order} has arrived.",
    Kind.ORDER_CANCELLED: "Your order {order} is cancelled.",
}
"""The text that the user reads."""


@dataclass(frozen=True, slots=True)
class Notification:
    """A message to a user. ``event_time``: when what it is about happened. Times are in UTC."""

    id: str
    user_id: str
    order_id: str
    kind: Kind
    text: str
    event_time: dt.datetime
    create_time: dt.datetime

    @classmethod
    def new(
        cls,
        notification_id: str,
        kind: Kind,
        *,
        user_id: str,
        order_id: str,
        event_time: dt.datetime,
        now: dt.datetime,
    ) -> Notification:
        """A notification about an order, made ``now``."""
        return cls(
            id=notification_id,
            user_id=user_id,
            order_id=order_id,
            kind=kind,
            # People refer to an order by the beginning of its id.
            text=TEXTS[kind].format(order=order_id.partition("-")[0]),
            event_time=event_time,
            create_time=now,
        )
