"""Pages of a list (AIP-158): their size, and the opaque token that says where the next one begins.

A list is ordered by an ever-growing sequence number, or by values that end with one; a page holds what comes after the
last row of the previous page. So rows that are written between two pages neither shift nor repeat others, and every
page costs the same, however deep it is.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import sqlalchemy as sa
from typing_extensions import TypeVar

from services.common.database import Database
from services.common.errors import InvalidFieldError

Position = tuple[int | str, ...]
"""A row's position in a list: its sequence number, perhaps after values that other rows share."""

Item = TypeVar("Item")
Key = TypeVar("Key", default=int)

DEFAULT_SIZE = 50
MAX_SIZE = 1_000
MAX_TOKEN = 1_024
"""Characters of a token, at most. The longest position is an email address and a number."""

_KEY, _TAG = 32, 16  # bytes


class InvalidTokenError(InvalidFieldError):
    """The token was not issued for this list."""

    def __init__(self, field: str = "page_token") -> None:
        super().__init__(field, f"INVALID_{field.upper()}", "was not issued by this method for the same request")


@dataclass(frozen=True, slots=True)
class Page(Generic[Item, Key]):
    """Some items of a list. ``last``: the sequence number of the last one (0 if there is none), or its position (empty
    if there is none). ``more``: whether others follow."""

    items: Sequence[Item]
    last: Key
    more: bool

    @classmethod
    def cut(cls, rows: Sequence[tuple[Key, Item]], size: int, none: Key = 0) -> Page[Item, Key]:  # type: ignore[assignment]
        """A page of the first ``size`` of ``rows``; one further row says that there are ``more``."""
        page = rows[:size]
        return cls(items=[item for _, item in page], last=page[-1][0] if page else none, more=len(rows) > size)


def size(page_size: int) -> int:
    """The most rows that a request with this page_size gets."""
    return min(page_size, MAX_SIZE) or DEFAULT_SIZE


class Tokens:
    """Issues and reads a service's page tokens. ``key``: the service's secret, which authenticates them (HMAC).

    A token is valid for the list that it was issued for, with the same filters, at every replica of the service. Nobody
    else can forge one, so a position is always one that the service has issued.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def of(cls, database: Database) -> Tokens:
        """The tokens of the service with this ``database``. Raises what ``Database.read`` does."""
        return cls(database.read_blocking(lambda connection: connection.execute(_GET_KEY).scalar_one()))

    def __repr__(self) -> str:
        return "<Tokens>"

    def make(self, listing: str, *position: int | str) -> str:
        """The token for the page after the row at ``position``. ``listing``: identifies the list and its filters."""
        packed = json.dumps(position, ensure_ascii=False, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._tag(listing, packed) + packed).decode()

    def after(self, listing: str, token: str, field: str = "page_token") -> int:
        """The sequence number after which the page begins; 0 for the first page. Raises what ``position`` does."""
        found = self.position(listing, token, field)
        if found is None:
            return 0
        if len(found) != 1 or not isinstance(found[0], int):
            raise InvalidTokenError(field)
        return found[0]

    def position(self, listing: str, token: str, field: str = "page_token") -> Position | None:
        """The position after which the page begins; None for the first page.

        Raises InvalidTokenError, for ``field``, if ``token`` was not issued for the same ``listing``.
        """
        if not token:
            return None
        if len(token) > MAX_TOKEN:
            raise InvalidTokenError(field)
        try:
            raw = base64.b64decode(token, altchars=b"-_", validate=True)
        except ValueError:  # not base64, not ASCII
            raise InvalidTokenError(field) from None
        tag, packed = raw[:_TAG], raw[_TAG:]
        if not hmac.compare_digest(tag, self._tag(listing, packed)):
            raise InvalidTokenError(field)
        return tuple(json.loads(packed))

    def _tag(self, listing: str, packed: bytes) -> bytes:
        # A digest has a fixed length, so no part of the position can be mistaken for a part of the list's name.
        message = hashlib.sha256(listing.encode()).digest() + packed
        return hmac.digest(self._key, message, "sha256")[:_TAG]


def add_key(metadata: sa.MetaData) -> None:
    """Add the table ``token_key``, which has one row, to the metadata of a service's database."""
    sa.Table("token_key", metadata, *_key_columns())


def create_key() -> None:
    """For a migration: create the table and the service's key. This never changes."""
    from alembic import op

    table = op.create_table("token_key", *_key_columns())
    op.bulk_insert(table, [{"id": 1, "key": secrets.token_bytes(_KEY)}])


def _key_columns() -> tuple[sa.Column[int], sa.Column[bytes]]:
    return (
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("key", sa.LargeBinary, nullable=False),
    )


_GET_KEY = sa.select(sa.Table("token_key", sa.MetaData(), *_key_columns()).c.key)
