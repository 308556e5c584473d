"""Pages of a list (AIP-158): how many, and the opaque token that says where the next one begins.

A list is in the order of an ever-growing sequence number, or of values that end with one; a page holds what comes after
the last row of the page before. So rows written between two pages neither move nor repeat the others, and a page costs
the same however far back it is.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from typing_extensions import TypeVar

from services.errors import InvalidFieldError

Position = tuple[int | str, ...]
"""Where a row stands in a list: its sequence number alone, or after values that may be shared."""

Item = TypeVar("Item")
Place = TypeVar("Place", default=int)

DEFAULT_SIZE = 50
MAX_SIZE = 1_000
_CHECKSUM = 8  # bytes


class InvalidTokenError(InvalidFieldError):
    """The token was not made for this list."""

    def __init__(self, field: str = "page_token") -> None:
        super().__init__(
            field, f"INVALID_{field.upper()}", "was not made by this method for a request that is otherwise the same"
        )


@dataclass(frozen=True, slots=True)
class Page(Generic[Item, Place]):
    """Some items of a list. ``last``: where the last one stands: its sequence number (0 without any), or a position (an
    empty one without any). ``more``: others follow."""

    items: Sequence[Item]
    last: Place
    more: bool

    @classmethod
    def cut(cls, rows: Sequence[tuple[Place, Item]], size: int, none: Place = 0) -> Page[Item, Place]:  # type: ignore[assignment]
        """The page made of the first ``size`` of ``rows``, which were asked to be one more: so it knows of ``more``."""
        kept = rows[:size]
        return cls(items=[item for _, item in kept], last=kept[-1][0] if kept else none, more=len(rows) > size)


def size(page_size: int) -> int:
    """How many rows a request with this page_size gets at the most."""
    return min(page_size, MAX_SIZE) or DEFAULT_SIZE


def token(listing: str, *position: int | str) -> str:
    """The token for the page after the row at ``position``: its sequence number, or values that end with that.

    ``listing``: which list this is, with its filters; the token is good for no other. The checksum catches mistakes, it
    keeps no secret: a forged token shows nothing that the list itself doesn't.
    """
    packed = json.dumps(position, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_checksum(listing, packed) + packed).decode()


def after(listing: str, page_token: str, field: str = "page_token") -> int:
    """The sequence number after which the page begins; 0 for the first page. Raises as ``position`` does."""
    found = position(listing, page_token, field)
    if found is None:
        return 0
    if len(found) != 1 or not isinstance(found[0], int):
        raise InvalidTokenError(field)
    return found[0]


def position(listing: str, page_token: str, field: str = "page_token") -> Position | None:
    """The position after which the page begins; None for the first page.

    Raises InvalidTokenError, for ``field``, when ``token`` didn't make it for the same ``listing``.
    """
    if not page_token:
        return None
    try:
        raw = base64.b64decode(page_token, altchars=b"-_", validate=True)
        checksum, packed = raw[:_CHECKSUM], raw[_CHECKSUM:]
        found = json.loads(packed) if checksum == _checksum(listing, packed) else None
    except ValueError:  # not base64, not ASCII, not UTF-8, not JSON
        found = None
    if not isinstance(found, list) or not all(map(_can_be_kept, found)):
        raise InvalidTokenError(field)
    return tuple(found)


def _can_be_kept(value: object) -> bool:
    return (isinstance(value, str) and "\0" not in value) or (type(value) is int and -(2**63) <= value < 2**63)


def _checksum(listing: str, packed: bytes) -> bytes:
    return hashlib.sha256(packed + listing.encode()).digest()[:_CHECKSUM]
