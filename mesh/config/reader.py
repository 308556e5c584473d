"""Reads JSON and keeps each value's path, so that errors name the invalid field.

JSON that parsers read differently is rejected: duplicate keys, and text that isn't UTF-8.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from mesh.codes import Code

T = TypeVar("T")

MAX_ATTEMPTS = 5
"""Attempts of a call. "Clients MUST treat values greater than 5 as 5" - A6."""

MAX_SIZE = 256 * 1024
"""A service config's JSON, in UTF-8. Each channel parses it on the thread that its calls need."""

MAX_DEPTH = 64
"""Nested objects and lists in a service config."""

MIN_TIMEOUT = 0.001
"""Timeouts and backoffs in a service config. Shorter ones are mistakes in the unit: every call would fail, or be
retried without a delay."""

MIN_PERIOD = 0.01
"""Periods in a service config: of load reports, of outlier detection."""

MAX_NUMBER = 40
"""Characters of a number that is a string in a service config."""

MAX_RING = 4096
"""Entries of a hash ring. "A cap on the ring size", gRPC's own - A42."""


class _DuplicateKey(dict[str, object]):
    """A JSON object with a duplicate key: ``key``."""

    key = ""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    items = dict(pairs)
    if len(items) == len(pairs):
        return items
    found = _DuplicateKey(items)
    seen: set[str] = set()
    found.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return found


def _whole(text: str) -> float:
    return int(text) if len(text) <= MAX_NUMBER else float(text)


def read_json(text: str) -> object:
    """Parse JSON, without what parsers read differently: duplicate keys, and text that isn't UTF-8.

    Raises:
        ValueError: with the path and the reason: "methodConfig[0].timeout: duplicate key".
    """
    try:
        root: object = json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} nested objects and lists") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    _check(root, None)
    level: list[tuple[object, _Link]] = [(root, None)]
    for _ in range(MAX_DEPTH):
        below: list[tuple[object, _Link]] = []
        for value, link in level:
            if isinstance(value, _DuplicateKey):
                raise ValueError(f"{_path((link, value.key))}: duplicate key")
            if isinstance(value, dict):
                for key in value:
                    _check(key, link)
            for key, item in value.items() if isinstance(value, dict) else enumerate(_list(value)):
                if isinstance(item, str):
                    _check(item, (link, key))
                elif isinstance(item, dict | list):
                    below.append((item, (link, key)))
        if not below:
            return root
        level = below
    raise ValueError(f"{_path(level[0][1])[:200]}: more than {MAX_DEPTH} nested objects and lists")


_Link = tuple[Any, str | int] | None
"""A value's position: its parent's link, and its key there. Paths are built from it only when needed."""


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _check(value: object, link: _Link) -> None:
    """Raise ValueError when ``value`` is text that UTF-8 can't express."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{_path(link)}: not valid UTF-8 text, got {abbreviated(value)}") from None


def _path(link: _Link) -> str:
    keys: list[str] = []
    while link is not None:
        link, key = link
        keys.append(f"[{key}]" if isinstance(key, int) else f".{abbreviated_key(key)}")
    return "".join(reversed(keys)).lstrip(".") or "the config"


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """ "; did you mean 'x'?" for a name that is likely a typo of x in ``known``; else empty. ``cutoff``: the similarity
    needed, as ``difflib`` computes it."""
    by_lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name[:100].lower(), by_lower, n=1, cutoff=cutoff)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""


# -- values with their paths

_DURATION = re.compile(r"-?[0-9]{1,12}(\.[0-9]{1,9})?s")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")


MAX_WARNINGS = 20
"""Warnings about unknown keys and names in one service config."""


class ParseState:
    """The objects of a config and the keys that the parser has read: any others are unknown."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}  # by path
        self.policies: list[str] = []

    def warnings(self) -> tuple[str, ...]:
        unknown = [(each, key) for each in self.objects.values() for key in each.items if key not in each.known]
        more = len(unknown) + len(self.policies) - MAX_WARNINGS
        found = [
            f"{each.path}.{abbreviated_key(key)}".lstrip(".") + f": unknown key, ignored{_hint(key, each.known)}"
            for each, key in unknown[:MAX_WARNINGS]  # searching for similar names is slow
        ]
        found = [*found, *self.policies][:MAX_WARNINGS]
        return (*found, f"{more} more") if more > 0 else tuple(found)


def _hint(key: str, known: Iterable[str]) -> str:
    return did_you_mean(key, known) or f"; known: {', '.join(sorted(known)) or 'none'}"


def abbreviated_key(key: str) -> str:
    return key if key.isidentifier() and len(key) <= 60 else abbreviated(key)


class Field:
    """A JSON value and its path. Each method returns the value as a type, or raises ValueError with the path."""

    __slots__ = ("path", "state", "value")

    def __init__(self, path: str, value: object, state: ParseState) -> None:
        self.path = path
        self.value = value
        self.state = state

    def fail(self, why: str) -> ValueError:
        return ValueError(f"service config: {self.path or 'the config'}: {why}, got {abbreviated(self.value)}")

    def object(self) -> Object:
        if not isinstance(self.value, dict):
            raise self.fail("expected an object")
        return self.state.objects.setdefault(self.path, Object(self.path, self.value, self.state))

    def list(self) -> list[Field]:
        if not isinstance(self.value, list):
            raise self.fail("expected a list")
        return [Field(f"{self.path}[{index}]", item, self.state) for index, item in enumerate(self.value)]

    def string(self) -> str:
        if not isinstance(self.value, str):
            raise self.fail("expected a string")
        return self.value

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.fail("expected true or false")
        return self.value

    def number(self) -> float:
        # Python's JSON parser also accepts NaN and Infinity; in proto3 JSON numbers may be strings.
        value = self.value
        if isinstance(value, str) and len(value) <= MAX_NUMBER and _NUMBER.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(_as_float(value)):
            raise self.fail("expected a number")
        return float(value)

    def positive(self) -> float:
        number = self.number()
        if number <= 0:
            raise self.fail("expected a number above 0")
        return number

    def not_negative(self) -> float:
        number = self.number()
        if number < 0:
            raise self.fail("expected a number of 0 or more")
        return number

    def attempts(self) -> int:
        number = self.number()
        if number < 2 or not number.is_integer():
            raise self.fail("expected a whole number of 2 or more")
        return int(min(number, MAX_ATTEMPTS))

    def tokens(self) -> float:
        number = self.number()
        if not 1 <= number <= 1000 or not number.is_integer():
            raise self.fail("expected a whole number from 1 to 1000")
        return number

    def token_ratio(self) -> float:
        # "if token_ratio is specified with more than three decimals, the rest is ignored" - A6. Rounded first, or
        # 1.001 × 1000 would be a little less than 1001.
        ratio = math.floor(round(min(self.number(), 1000.0) * 1000, 6)) / 1000
        if ratio <= 0:
            raise self.fail("expected a number of 0.001 or more")
        return ratio

    def duration(self) -> float:
        if not isinstance(self.value, str) or not _DURATION.fullmatch(self.value):
            raise self.fail('expected a duration such as "1.5s"')
        seconds = float(self.value[:-1])
        if seconds < 0:
            raise self.fail("expected a duration of 0 or more")
        return seconds

    def timeout(self) -> float:
        return self._at_least(MIN_TIMEOUT)

    def timeout_or_none(self) -> float:
        """A timeout; 0 means none, as in core."""
        return self.timeout() if self.duration() else math.inf

    def period(self) -> float:
        return self._at_least(MIN_PERIOD)

    def _at_least(self, least: float) -> float:
        seconds = self.duration()
        if seconds < least:
            raise self.fail(f"expected a duration of {least:g}s or more")
        return seconds

    def whole(self) -> int:
        number = self.not_negative()
        if not number.is_integer() or number > 2**32:
            raise self.fail("expected a whole number of 0 or more")
        return int(number)

    def positive_whole(self) -> int:
        number = self.whole()
        if number < 1:
            raise self.fail("expected a whole number of 1 or more")
        return number

    def percentage(self) -> float:
        number = self.number()
        if not 0 <= number <= 100:
            raise self.fail("expected a number from 0 to 100")
        return number

    def percentile(self) -> float:
        number = self.number()
        if not 0 < number < 100:
            raise self.fail("expected a number between 0 and 100, both exclusive")
        return number

    def codes(self) -> frozenset[int]:
        return frozenset(item.code() for item in self.list())

    def code(self) -> int:
        """A status code by name, in any case, or by number."""
        value = self.value
        if isinstance(value, str) and value.upper() in Code.__members__:
            return Code[value.upper()]
        if isinstance(value, int | float) and not isinstance(value, bool) and value in Code.__members__.values():
            return Code(int(value))
        raise self.fail("expected a status code's name or number")


class Object:
    """A JSON object and its path. ``known``: the keys that were read."""

    __slots__ = ("items", "known", "path", "state")

    def __init__(self, path: str, items: dict[str, object], state: ParseState) -> None:
        self.path = path
        self.items = items
        self.state = state
        self.known: set[str] = set()

    def field(self, key: str) -> Field:
        self.known.add(key)
        return Field(f"{self.path}.{key}" if self.path else key, self.items.get(key), self.state)

    def get(self, key: str, read: Callable[[Field], T]) -> T | None:
        field = self.field(key)
        return None if field.value is None else read(field)

    def get_or(self, key: str, read: Callable[[Field], T], default: T) -> T:
        field = self.field(key)
        return default if field.value is None else read(field)

    def list(self, key: str) -> list[Field]:
        return self.get(key, Field.list) or []

    def required(self, key: str, read: Callable[[Field], T]) -> T:
        field = self.field(key)
        if field.value is None:
            raise field.fail("required")
        return read(field)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond a float's range
        return math.inf


def abbreviated(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
