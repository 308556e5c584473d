"""What an order is. Pure: no clock, no chance, no storage, no gRPC."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from services.errors import NotFoundError
from services.idempotency import fingerprint


class OrderNotFoundError(NotFoundError):
    """No order has the id."""

    def __init__(self, order_id: str) -> None:
        super().__init__("ORDER_NOT_FOUND", f"no order has the id {order_id}", order_id=order_id)


class UserNotFoundError(NotFoundError):
    """The user who would order doesn't exist."""

    def __init__(self, user_id: str) -> None:
        super().__init__("USER_NOT_FOUND", f"no user has the id {user_id}", user_id=user_id)


@dataclass(frozen=True, slots=True)
class Item:
    """One line of an order: ``quantity`` pieces of the article ``sku``."""

    sku: str
    quantity: int


@dataclass(frozen=True, slots=True)
class Order:
    """An order. Instants are aware and in UTC."""

    id: str
    user_id: str
    items: tuple[Item, ...]
    create_time: dt.datetime
    update_time: dt.datetime

    @classmethod
    def new(cls, order_id: str, *, user_id: str, items: tuple[Item, ...], now: dt.datetime) -> Order:
        """An order taken ``now``."""
        return cls(id=order_id, user_id=user_id, items=items, create_time=now, update_time=now)

    @property
    def fingerprint(self) -> str:
        """What tells the content of one CreateOrder request from another's."""
        return fingerprint([self.user_id, [[item.sku, item.quantity] for item in self.items]])
