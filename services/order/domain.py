"""Orders. Pure: no clock, randomness, storage or gRPC."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.common.errors import FailedPreconditionError, InvalidFieldError, NotFoundError
from services.common.idempotency import Content, fingerprint

NANOS = 10**9
"""Nanos in a unit of a currency."""

MAX_UNITS = 2**63 - 1
"""The largest ``units`` of google.type.Money."""


class OrderNotFoundError(NotFoundError):
    """There is no order with this id."""

    def __init__(self, order_id: str) -> None:
        super().__init__("ORDER_NOT_FOUND", f"order {order_id} not found", order_id=order_id)


class UserNotFoundError(NotFoundError):
    """The ordering user doesn't exist."""

    def __init__(self, user_id: str) -> None:
        super().__init__("USER_NOT_FOUND", f"user {user_id} not found", user_id=user_id)


class UserDeletedError(FailedPreconditionError):
    """The ordering user is deleted."""

    def __init__(self, user_id: str) -> None:
        super().__init__("USER_DELETED", f"user {user_id} is deleted", user_id=user_id)


class State(enum.Enum):
    """An order's state."""

    PENDING = "PENDING"
    CONFIRMED = "CONFIRMED"
    SHIPPED = "SHIPPED"
    DELIVERED = "DELIVERED"
    CANCELLED = "CANCELLED"

    @property
    def final(self) -> bool:
        """Whether no other state can follow."""
        return not TRANSITIONS[self]


TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.PENDING: frozenset({State.CONFIRMED, State.CANCELLED}),
    State.CONFIRMED: frozenset({State.SHIPPED, State.CANCELLED}),
    State.SHIPPED: frozenset({State.DELIVERED}),
    State.DELIVERED: frozenset(),
    State.CANCELLED: frozenset(),
}
"""The state machine: which states may follow each state."""


class WrongStateError(FailedPreconditionError):
    """The order can't go to the requested state from its current one."""

    def __init__(self, order: Order, wanted: State) -> None:
        super().__init__(
            "WRONG_STATE",
            f"order {order.id} is {order.state.value} and can't become {wanted.value}",
            order_id=order.id,
            state=order.state.value,
            wanted=wanted.value,
        )


@dataclass(frozen=True, slots=True)
class Money:
    """An exact, non-negative amount: ``nanos`` billionths of a unit of ``currency`` (ISO 4217)."""

    currency: str
    nanos: int

    @classmethod
    def of(cls, field: str, currency: str, units: int, nanos: int) -> Money:
        """The amount of a google.type.Money. Raises InvalidFieldError for ``field``."""
        if not re.fullmatch("[A-Z]{3}", currency):
            raise InvalidFieldError(
                f"{field}.currency_code", "INVALID_CURRENCY", "must be three capital letters (ISO 4217)"
            )
        if units < 0:
            raise InvalidFieldError(f"{field}.units", "NEGATIVE_AMOUNT", "must not be negative")
        if not 0 <= nanos < NANOS:
            raise InvalidFieldError(f"{field}.nanos", "INVALID_NANOS", f"must be 0 to {NANOS - 1}")
        return cls(currency, units * NANOS + nanos)

    @property
    def units(self) -> int:
        """The whole units."""
        return self.nanos // NANOS

    @property
    def fraction(self) -> int:
        """The nanos beyond the whole units."""
        return self.nanos % NANOS


@dataclass(frozen=True, slots=True)
class Item:
    """One line of an order: ``quantity`` pieces of the article ``sku``, at ``price`` each (None if unknown)."""

    sku: str
    quantity: int
    price: Money | None = None

    @property
    def content(self) -> Content:
        """What its fingerprint covers; the same in every release."""
        content: list[Content] = [self.sku, self.quantity]
        return content if self.price is None else [*content, self.price.currency, self.price.nanos]


@dataclass(frozen=True, slots=True)
class Order:
    """An order. Times are in UTC. ``version``: grows with every change. ``user_stale``: the user was not verified, as
    the user service was unavailable."""

    id: str
    user_id: str
    items: tuple[Item, ...]
    create_time: dt.datetime
    update_time: dt.datetime
    state: State = State.PENDING
    version: int = 1
    user_stale: bool = False

    @classmethod
    def new(cls, order_id: str, *, user_id: str, items: tuple[Item, ...], now: dt.datetime) -> Order:
        """An order created ``now``. Raises InvalidFieldError if the total is too large for google.type.Money."""
        if any(total.units > MAX_UNITS for total in totals(items)):
            raise InvalidFieldError("items", "TOTAL_TOO_LARGE", "the total is too large for google.type.Money")
        return cls(id=order_id, user_id=user_id, items=items, create_time=now, update_time=now)

    @property
    def fingerprint(self) -> str:
        """A hash of the content of a CreateOrder request."""
        return fingerprint([self.user_id, [item.content for item in self.items]])

    @property
    def totals(self) -> list[Money]:
        """The order's total in each currency."""
        return totals(self.items)

    def moved(self, state: State, now: dt.datetime) -> Order:
        """The order in ``state``; the same order if that is its state. Raises WrongStateError."""
        if state is self.state:
            return self
        if state not in TRANSITIONS[self.state]:
            raise WrongStateError(self, state)
        # Replicas' clocks differ; an order's history must not go backwards.
        return dataclasses.replace(self, state=state, version=self.version + 1, update_time=max(now, self.update_time))


def totals(items: Sequence[Item]) -> list[Money]:
    """The totals of ``items``: one exact sum per currency, sorted by currency code."""
    sums: dict[str, int] = collections.defaultdict(int)
    for item in items:
        if item.price is not None:
            sums[item.price.currency] += item.quantity * item.price.nanos
    return [Money(currency, nanos) for currency, nanos in sorted(sums.items())]
