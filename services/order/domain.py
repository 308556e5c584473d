"""What an order is. Pure: no clock, no chance, no storage, no gRPC."""

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
"""Billionths in a unit of money."""

MOST_UNITS = 2**63 - 1
"""Units of a currency that google.type.Money can carry."""


class OrderNotFoundError(NotFoundError):
    """No order has the id."""

    def __init__(self, order_id: str) -> None:
        super().__init__("ORDER_NOT_FOUND", f"no order has the id {order_id}", order_id=order_id)


class UserNotFoundError(NotFoundError):
    """The user who would order doesn't exist."""

    def __init__(self, user_id: str) -> None:
        super().__init__("USER_NOT_FOUND", f"no user has the id {user_id}", user_id=user_id)


class UserDeletedError(FailedPreconditionError):
    """The user who would order is deleted."""

    def __init__(self, user_id: str) -> None:
        super().__init__("USER_DELETED", f"the user {user_id} is deleted", user_id=user_id)


class State(enum.Enum):
    """Where an order stands."""

    PENDING = "PENDING"
    CONFIRMED = "CONFIRMED"
    SHIPPED = "SHIPPED"
    DELIVERED = "DELIVERED"
    CANCELLED = "CANCELLED"

    @property
    def last(self) -> bool:
        """No other follows."""
        return not NEXT[self]


NEXT: Mapping[State, frozenset[State]] = {
    State.PENDING: frozenset({State.CONFIRMED, State.CANCELLED}),
    State.CONFIRMED: frozenset({State.SHIPPED, State.CANCELLED}),
    State.SHIPPED: frozenset({State.DELIVERED}),
    State.DELIVERED: frozenset(),
    State.CANCELLED: frozenset(),
}
"""The state machine: what may follow each state."""


class WrongStateError(FailedPreconditionError):
    """The order can't go where the request wants it from where it stands."""

    def __init__(self, order: Order, wanted: State) -> None:
        super().__init__(
            "WRONG_STATE",
            f"the order {order.id} is {order.state.value} and can't be {wanted.value}",
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
        """What a google.type.Money says. ``field``: where it stands, for the InvalidFieldError that this raises."""
        if not re.fullmatch("[A-Z]{3}", currency):
            raise InvalidFieldError(f"{field}.currency_code", "INVALID_CURRENCY", "should be three capitals (ISO 4217)")
        if units < 0:
            raise InvalidFieldError(f"{field}.units", "NEGATIVE_AMOUNT", "must not be negative")
        if not 0 <= nanos < NANOS:
            raise InvalidFieldError(f"{field}.nanos", "INVALID_NANOS", f"should be 0 to {NANOS - 1}")
        return cls(currency, units * NANOS + nanos)

    @property
    def units(self) -> int:
        """The whole units."""
        return self.nanos // NANOS

    @property
    def rest(self) -> int:
        """The billionths beyond the whole units."""
        return self.nanos % NANOS


@dataclass(frozen=True, slots=True)
class Item:
    """One line of an order: ``quantity`` pieces of the article ``sku``, at ``price`` each (unknown, without one)."""

    sku: str
    quantity: int
    price: Money | None = None

    @property
    def content(self) -> Content:
        """What tells it from other lines; the same in every release."""
        content: list[Content] = [self.sku, self.quantity]
        return content if self.price is None else [*content, self.price.currency, self.price.nanos]


@dataclass(frozen=True, slots=True)
class Order:
    """An order. Instants are aware and in UTC. ``version``: grows with every change. ``user_stale``: the user service
    could not be asked about the user."""

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
        """An order taken ``now``. Raises InvalidFieldError when it costs more than can be said."""
        if any(total.units > MOST_UNITS for total in totals(items)):
            raise InvalidFieldError("items", "TOTAL_TOO_LARGE", "cost more than google.type.Money can carry")
        return cls(id=order_id, user_id=user_id, items=items, create_time=now, update_time=now)

    @property
    def fingerprint(self) -> str:
        """What tells the content of one CreateOrder request from another's."""
        return fingerprint([self.user_id, [item.content for item in self.items]])

    @property
    def totals(self) -> list[Money]:
        """What it costs, in each currency."""
        return totals(self.items)

    def moved(self, state: State, now: dt.datetime) -> Order:
        """The order in ``state``; the same one when that is where it stands. Raises WrongStateError."""
        if state is self.state:
            return self
        if state not in NEXT[self.state]:
            raise WrongStateError(self, state)
        # Replicas' clocks differ; an order's history shall not run backwards for that.
        return dataclasses.replace(self, state=state, version=self.version + 1, update_time=max(now, self.update_time))


def totals(items: Sequence[Item]) -> list[Money]:
    """What ``items`` cost: one exact sum for each currency, in the order of their codes."""
    sums: dict[str, int] = collections.defaultdict(int)
    for item in items:
        if item.price is not None:
            sums[item.price.currency] += item.quantity * item.price.nanos
    return [Money(currency, nanos) for currency, nanos in sorted(sums.items())]
