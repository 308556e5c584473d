"""The ``filter`` (AIP-160) and ``order_by`` (AIP-132) of list requests.

Filters are the part of AIP-160 that an index can serve: comparisons joined by AND, and prefixes (``name = "Ann*"``).
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
"""Builds a condition from an operator and a value. Raises ValueError, saying what is wrong with either."""

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
    """The conditions in ``filter``. ``fields``: the fields that it may compare, by name. Raises InvalidFieldError."""
    found: list[Condition] = []
    at = 0
    while filter.strip():
        match = _COMPARISON.match(filter, at)
        if match is None:
            raise _invalid(f'expected a comparison (field = "value") at character {at + 1}')
        if match["field"] not in fields:
            raise _invalid(f"unknown field {match['field']}; expected one of {', '.join(fields)}")
        value = match["word"] if match["quoted"] is None else re.sub(r"\\(.)", r"\1", match["quoted"], flags=re.DOTALL)
        if "\0" in value:
            raise _invalid("must not contain U+0000")
        try:
            found.append(fields[match["field"]](match["operator"], value))
        except ValueError as error:
            raise _invalid(f"{match['field']}: {error}") from None
        at = match.end()
        if at == len(filter):
            break
        joined = _AND.match(filter, at)
        if joined is None:
            raise _invalid(f"expected AND at character {at + 1}")
        at = joined.end()
    return found


def text(column: sa.ColumnElement[str], key: Callable[[str], str] = str) -> Comparison:
    """Compares strings, or (with ``=``) their prefixes. ``key``: maps a value to what the column holds."""

    def compare(sign: str, value: str) -> Condition:
        if sign not in {"=", "!="}:
            raise ValueError(f"{sign} is not supported; use = or !=")
        if not value.endswith("*"):
            return _compare(column, sign, key(value))
        if sign == "!=":
            raise ValueError("a prefix must be compared with =")
        prefix = key(value[:-1])
        if not prefix:
            return sa.true()
        end = _prefix_end(prefix)
        from_prefix = column >= prefix
        return from_prefix if end is None else sa.and_(from_prefix, column < end)

    return compare


def instant(column: sa.ColumnElement[dt.datetime]) -> Comparison:
    """Compares timestamps in RFC 3339 format."""

    def compare(sign: str, value: str) -> Condition:
        try:
            parsed = dt.datetime.fromisoformat(value)
            if parsed.tzinfo is None:
                raise ValueError
            return _compare(column, sign, parsed.astimezone(dt.UTC))
        except (ValueError, OverflowError):
            raise ValueError(
                f'"{value}" must be a timestamp with a time zone, such as "2026-01-31T12:00:00Z"'
            ) from None

    return compare


def choice(column: sa.ColumnElement[str], choices: Sequence[str]) -> Comparison:
    """Compares enumerated values."""

    def compare(sign: str, value: str) -> Condition:
        if sign not in {"=", "!="}:
            raise ValueError(f"{sign} is not supported; use = or !=")
        if value not in choices:
            raise ValueError(f'"{value}" must be one of {", ".join(choices)}')
        return _compare(column, sign, value)

    return compare


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a list: by ``column``, ascending or descending, then by ``sequence``, which is unique."""

    column: sa.Column[Any] | None
    sequence: sa.Column[int]
    descending: bool = False

    @property
    def columns(self) -> tuple[sa.Column[Any], ...]:
        """The columns that make up a row's position."""
        return (self.sequence,) if self.column is None else (self.column, self.sequence)

    @property
    def clauses(self) -> list[sa.ColumnElement[Any]]:
        """The ORDER BY clauses."""
        return [column.desc() if self.descending else column.asc() for column in self.columns]

    def after(self, position: Position) -> Condition:
        """Whether a row comes after ``position``. Raises InvalidTokenError if that is not a position in this order."""
        if len(position) != len(self.columns):
            raise InvalidTokenError
        here = sa.tuple_(*self.columns)
        there = sa.tuple_(*(_bound(column, value) for column, value in zip(self.columns, position, strict=True)))
        return here < there if self.descending else here > there

    def position(self, values: Sequence[object]) -> Position:
        """The position of a row with these values of ``columns``."""
        return tuple(v.isoformat() if isinstance(v, dt.datetime) else cast("int | str", v) for v in values)


def order(order_by: str, columns: Mapping[str, sa.Column[Any]], sequence: sa.Column[int]) -> Order:
    """The order that ``order_by`` asks for, by one of ``columns``. Raises InvalidFieldError."""
    name, *direction = order_by.split() or [""]
    if direction not in ([], ["asc"], ["desc"]) or (name and name not in columns):
        raise InvalidFieldError(
            "order_by", "INVALID_ORDER_BY", f"must be one of {', '.join(columns)}, optionally followed by desc"
        )
    return Order(columns[name] if name else None, sequence, direction == ["desc"])


def _bound(column: sa.Column[Any], value: int | str) -> sa.ColumnElement[Any]:
    bound: Any = value
    if isinstance(column.type, UtcDateTime):
        try:
            bound = dt.datetime.fromisoformat(str(value)).astimezone(dt.UTC)
        except (ValueError, OverflowError):
            raise InvalidTokenError from None
    elif isinstance(value, int) != isinstance(column.type, sa.Integer | sa.BigInteger):
        raise InvalidTokenError
    return sa.bindparam(None, bound, type_=column.type)


def _compare(column: sa.ColumnElement[Any], sign: str, value: object) -> Condition:
    condition: Condition = _OPERATORS[sign](column, value)
    return condition


def _prefix_end(prefix: str) -> str | None:
    """The least string after all strings with ``prefix``, by code points; None if there is none."""
    for end in range(len(prefix), 0, -1):
        code = ord(prefix[end - 1]) + 1
        code = 0xE000 if code == 0xD800 else code  # surrogates are not characters
        if code <= 0x10FFFF:
            return prefix[: end - 1] + chr(code)
    return None


def _invalid(message: str) -> InvalidFieldError:
    return InvalidFieldError("filter", "INVALID_FILTER", message)
