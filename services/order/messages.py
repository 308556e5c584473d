"""Orders as protobuf messages, in responses and events."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import Message
from google.type import money_pb2  # type: ignore[import-untyped]

from services.common.rpc import timestamp
from services.order.domain import Item, Money, Order, State
from weft.order.v1 import events_pb2, order_pb2

_EVENTS: Mapping[State, type[Message]] = {
    State.PENDING: events_pb2.OrderCreated,
    State.CONFIRMED: events_pb2.OrderConfirmed,
    State.SHIPPED: events_pb2.OrderShipped,
    State.DELIVERED: events_pb2.OrderDelivered,
    State.CANCELLED: events_pb2.OrderCancelled,
}


def order_message(order: Order) -> order_pb2.Order:
    """The order as a message."""
    return order_pb2.Order(
        id=order.id,
        user_id=order.user_id,
        items=map(_item_message, order.items),
        create_time=timestamp(order.create_time),
        update_time=timestamp(order.update_time),
        state=order_pb2.Order.State.Value(f"STATE_{order.state.value}"),
        totals=map(_money_message, order.totals),
        user_stale=order.user_stale,
    )


def event_message(order: Order) -> Message:
    """The event for the change that brought ``order`` to its state."""
    return _EVENTS[order.state](order=order_message(order))


def items(request: order_pb2.CreateOrderRequest) -> tuple[Item, ...]:
    """The items of a request. Raises InvalidFieldError for an invalid price."""
    return tuple(
        Item(item.sku, item.quantity, _price(f"items[{position}].unit_price", item))
        for position, item in enumerate(request.items)
    )


def _price(field: str, item: order_pb2.OrderItem) -> Money | None:
    if not item.HasField("unit_price"):
        return None
    price = item.unit_price
    return Money.of(field, price.currency_code, price.units, price.nanos)


def _item_message(item: Item) -> order_pb2.OrderItem:
    price = None if item.price is None else _money_message(item.price)
    return order_pb2.OrderItem(sku=item.sku, quantity=item.quantity, unit_price=price)


def _money_message(money: Money) -> money_pb2.Money:
    return money_pb2.Money(currency_code=money.currency, units=money.units, nanos=money.fraction)
