"""Pages of a list (AIP-158): how many, and the opaque token that says where the next one begins.

A list is in the order of an ever-growing sequence number, and a page holds what comes after the last number of the page
before. So rows written between two pages neither move nor repeat the others, and a page costs the same however far back
it is.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.errors import InvalidFieldError

Item = TypeVar("Item")

DEFAULT_SIZE = 50
MAX_SIZE = 1_000
_NUMBER = 8  # bytes, and as many of checksum


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """Some items of a list. ``last``: the sequence number of the last one, 0 without any. ``more``: others follow."""

    items: Sequence[Item]
    last: int
    more: bool

    @classmethod
    def cut(cls, rows: Sequence[tuple[int, Item]], size: int) -> Page[Item]:
        """The page made of the first ``size`` of ``rows``, which were asked to be one more: so it knows of ``more``."""
        kept = rows[:size]
        return cls(items=[item for _, item in kept], last=kept[-1][0] if kept else 0, more=len(rows) > size)


def size(page_size: int) -> int:
    """How many rows a request with this page_size gets at the most."""
    return min(page_size, MAX_SIZE) or DEFAULT_SIZE


def token(listing: str, after: int) -> str:
    """The token for the page after the row with the sequence number ``after``.

    ``listing``: which list this is, with its filters; the token is good for no other. The checksum catches mistakes, it
    keeps no secret: a forged token shows nothing that the list itself doesn't.
    """
    number = after.to_bytes(_NUMBER, "big")
    return base64.urlsafe_b64encode(number + _checksum(listing, number)).decode()


def after(listing: str, page_token: str) -> int:
    """The sequence number after which the page begins; 0 for the first page.

    Raises InvalidFieldError when ``token`` didn't make it for the same ``listing``.
    """
    if not page_token:
        return 0
    try:
        raw = base64.b64decode(page_token, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        raw = b""
    number, checksum = raw[:_NUMBER], raw[_NUMBER:]
    if len(raw) != 2 * _NUMBER or checksum != _checksum(listing, number):
        raise InvalidFieldError(
            "page_token", "INVALID_PAGE_TOKEN", "was not made by this method for a request with the same filters"
        )
    return int.from_bytes(number, "big")


def _checksum(listing: str, number: bytes) -> bytes:
    return hashlib.sha256(number + listing.encode()).digest()[:_NUMBER]
