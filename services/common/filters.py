"""Which rows of a list, and in which order: the ``filter`` (AIP-160) and ``order_by`` (AIP-132) of list requests.

Of AIP-160 this is what an index can serve: comparisons joined by AND, and prefixes (``name = "Ann*"``).
"""

from __future__ import annotations

import datetime as dt
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa

from services.common.database import UtcDateTime
from services.common.errors import InvalidFieldError
from services.common.paging import InvalidTokenError, Position

Condition = sa.ColumnElement[bool]
Comparison = Callable[[str, str], Condition]
"""Makes a condition of an operator and a value. Raises ValueError, saying what is wrong with either."""

_OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_COMPARISON = re.compile(
    r"""\s*(?P<field>[a-z_]+)\s*(?P<operator><=|>=|!=|=|<|>)\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<word>\w+))\s*""",
    re.DOTALL,
)
_AND = re.compile(r"AND\b")


def conditions(filter: str, fields: Mapping[str, Comparison]) -> list[Condition]:
    """What ``filter`` asks of a row. ``fields``: what it may compare, by name. Raises InvalidFieldError."""
    found: list[Condition] = []
    at = 0
    while filter.strip():
        match = _COMPARISON.match(filter, at)
        if match is None:
            raise _invalid(f'can\'t be read from character {at + 1} on: a comparison (field = "value") should be there')
        if match["field"] not in fields:
            raise _invalid(f"{match['field']} can't be compared; these can: {', '.join(fields)}")
        value = match["word"] if match["quoted"] is None else re.sub(r"\\(.)", r"\1", match["quoted"], flags=re.DOTALL)
        if "\0" in value:
            raise _invalid("must not contain the character U+0000")
        try:
            found.append(fields[match["field"]](match["operator"], value))
        except ValueError as error:
            raise _invalid(f"{match['field']}: {error}") from None
        at = match.end()
        if at == len(filter):
            break
        joined = _AND.match(filter, at)
        if joined is None:
            raise _invalid(f"can't be read from character {at + 1} on: AND should be there")
        at = joined.end()
    return found


def text(column: sa.ColumnElement[str], key: Callable[[str], str] = str) -> Comparison:
    """Compares strings, whole or (with ``=``) from their beginning. ``key``: what the column keeps of a value."""

    def compare(sign: str, value: str) -> Condition:
        if sign not in {"=", "!="}:
            raise ValueError(f"= and != compare it, {sign} doesn't")
        if not value.endswith("*"):
            return _compare(column, sign, key(value))
        if sign == "!=":
            raise ValueError("only = compares a prefix")
        prefix = key(value[:-1])
        if not prefix:
            return sa.true()
        following = _following(prefix)
        begins = column >= prefix
        return begins if following is None else sa.and_(begins, column < following)

    return compare


def instant(column: sa.ColumnElement[dt.datetime]) -> Comparison:
    """Compares instants, written as RFC 3339 has them."""

    def compare(sign: str, value: str) -> Condition:
        try:
            parsed = dt.datetime.fromisoformat(value)
            if parsed.tzinfo is None:
                raise ValueError
            return _compare(column, sign, parsed.astimezone(dt.UTC))
        except (ValueError, OverflowError):
            raise ValueError(f'"{value}" should be an instant with its zone, "2026-01-31T12:00:00Z" say') from None

    return compare


def choice(column: sa.ColumnElement[str], choices: Sequence[str]) -> Comparison:
    """Compares one of a few words."""

    def compare(sign: str, value: str) -> Condition:
        if sign not in {"=", "!="}:
            raise ValueError(f"= and != compare it, {sign} doesn't")
        if value not in choices:
            raise ValueError(f'"{value}" should be one of {", ".join(choices)}')
        return _compare(column, sign, value)

    return compare


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a list: by ``column``, one way or the other, and then by ``sequence``, which no two rows share."""

    column: sa.Column[Any] | None
    sequence: sa.Column[int]
    descending: bool = False

    @property
    def columns(self) -> tuple[sa.Column[Any], ...]:
        """What makes up a row's position."""
        return (self.sequence,) if self.column is None else (self.column, self.sequence)

    @property
    def clauses(self) -> list[sa.ColumnElement[Any]]:
        """For ORDER BY."""
        return [column.desc() if self.descending else column.asc() for column in self.columns]

    def after(self, position: Position) -> Condition:
        """Whether a row comes after ``position``. Raises InvalidTokenError when that is none of this order's."""
        if len(position) != len(self.columns):
            raise InvalidTokenError
        here = sa.tuple_(*self.columns)
        there = sa.tuple_(*(_bound(column, value) for column, value in zip(self.columns, position, strict=True)))
        return here < there if self.descending else here > there

    def position(self, values: Sequence[object]) -> Position:
        """Where a row with these values of ``columns`` stands."""
        return tuple(v.isoformat() if isinstance(v, dt.datetime) else cast("int | str", v) for v in values)


def order(order_by: str, columns: Mapping[str, sa.Column[Any]], sequence: sa.Column[int]) -> Order:
    """The order that ``order_by`` asks for, of those that ``columns`` give by name. Raises InvalidFieldError."""
    name, *way = order_by.split() or [""]
    if way not in ([], ["asc"], ["desc"]) or (name and name not in columns):
        raise InvalidFieldError(
            "order_by", "INVALID_ORDER_BY", f"should be one of {', '.join(columns)}, each with desc or without"
        )
    return Order(columns[name] if name else None, sequence, way == ["desc"])


def _bound(column: sa.Column[Any], value: int | str) -> sa.ColumnElement[Any]:
    kept: Any = value
    if isinstance(column.type, UtcDateTime):
        try:
            kept = dt.datetime.fromisoformat(str(value)).astimezone(dt.UTC)
        except (ValueError, OverflowError):
            raise InvalidTokenError from None
    elif isinstance(value, int) != isinstance(column.type, sa.Integer | sa.BigInteger):
        raise InvalidTokenError
    return sa.bindparam(None, kept, type_=column.type)


def _compare(column: sa.ColumnElement[Any], sign: str, value: object) -> Condition:
    condition: Condition = _OPERATORS[sign](column, value)
    return condition


def _following(prefix: str) -> str | None:
    """The least string that comes after all that begin with ``prefix``, by code points; None when there is none."""
    for end in range(len(prefix), 0, -1):
        code = ord(prefix[end - 1]) + 1
        code = 0xE000 if code == 0xD800 else code  # surrogates are no characters
        if code <= 0x10FFFF:
            return prefix[: end - 1] + chr(code)
    return None


def _invalid(message: str) -> InvalidFieldError:
    return InvalidFieldError("filter", "INVALID_FILTER", message)
