"""The user service's database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from services.common import filters, paging
from services.common.database import SEQUENCE, TEXT, Database, UtcDateTime
from services.common.errors import EtagMismatchError
from services.common.idempotency import Requests
from services.common.paging import Page, Position, Tokens
from services.user.domain import EmailTakenError, Name, User, UserNotFoundError, email_key

VERSIONS = Path(__file__).parent / "versions"
"""The migrations of this database."""

metadata = sa.MetaData()

users = sa.Table(
    "users",
    metadata,
    sa.Column("sequence", SEQUENCE, primary_key=True),  # the order of creation
    sa.Column("id", sa.String(36), nullable=False, unique=True),
    sa.Column("name", TEXT, nullable=False),
    sa.Column("email", sa.Text, nullable=False),
    sa.Column("email_key", TEXT, nullable=False, unique=True),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("update_time", UtcDateTime, nullable=False),
    sa.Column("version", sa.Integer, nullable=False, server_default="1"),
    sa.Column("delete_time", UtcDateTime),
    # Both, or neither if the name was set as a full name.
    sa.Column("given_name", sa.Text),
    sa.Column("family_name", sa.Text),
    sa.Index("users_by_name", "name", "sequence"),
    sa.Index("users_by_create_time", "create_time", "sequence"),
    sqlite_autoincrement=True,  # numbers are never reused, so a page token never points into the past
)

requests = Requests(metadata)
paging.add_key(metadata)

_USER = (
    users.c.id,
    users.c.email,
    users.c.create_time,
    users.c.update_time,
    users.c.version,
    users.c.delete_time,
    users.c.name,
    users.c.given_name,
    users.c.family_name,
)
_GET = sa.select(*_USER).where(users.c.id == sa.bindparam("id"))
_GET_TO_CHANGE = _GET.with_for_update()

ORDERS = {"name": users.c.name, "email": users.c.email_key, "create_time": users.c.create_time}
"""The columns that users may be sorted by; each has an index that ends with the sequence number, or is unique."""

_FILTERS = {
    "name": filters.text(users.c.name),
    "email": filters.text(users.c.email_key, email_key),
    "create_time": filters.instant(users.c.create_time),
    "update_time": filters.instant(users.c.update_time),
}


@dataclass(frozen=True, slots=True)
class Listing:
    """Which users a request lists, and in which order."""

    filter: str = ""
    order_by: str = ""
    show_deleted: bool = False


class UserStore:
    """Stores users. Each method is one transaction, and may raise what ``Database`` does beside what it says."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.tokens = Tokens.of(database)

    async def create(self, user: User, request_id: str = "") -> User:
        """Add a user; returns the one that the same request created before, if any. ``request_id``: may be empty.

        Raises RequestIdReusedError and EmailTakenError.
        """

        def work(connection: sa.Connection) -> User:
            if request_id:
                earlier = requests.find(connection, request_id, user.fingerprint)
                if earlier is not None:
                    return _get(connection, earlier)
            _require_unique_email(connection, user)
            connection.execute(
                sa.insert(users).values(id=user.id, create_time=user.create_time, **_mutable_values(user))
            )
            if request_id:
                requests.add(connection, request_id, user.fingerprint, user.id, user.create_time)
            return user

        return await self._database.write(work)

    async def get(self, user_id: str) -> User:
        """One user. Raises UserNotFoundError."""
        return await self._database.read(lambda connection: _get(connection, user_id))

    async def get_all(self, user_ids: Sequence[str]) -> list[User]:
        """Several users, in the order of ``user_ids``. Raises UserNotFoundError if one of them doesn't exist."""
        query = sa.select(*_USER).where(users.c.id.in_(user_ids))
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        found = {row.id: _user(row) for row in rows}
        missing = next((user_id for user_id in user_ids if user_id not in found), None)
        if missing is not None:
            raise UserNotFoundError(missing)
        return [found[user_id] for user_id in user_ids]

    async def list(
        self, size: int, after: Position | None = None, listing: Listing = Listing()
    ) -> Page[User, Position]:
        """At most ``size`` users, after the position ``after`` (default: from the first).

        Raises InvalidFieldError if ``listing`` is invalid, or ``after`` is not a position in it.
        """
        order = filters.order(listing.order_by, ORDERS, users.c.sequence)
        query = sa.select(*order.columns, *_USER).where(*filters.conditions(listing.filter, _FILTERS))
        if not listing.show_deleted:
            query = query.where(users.c.delete_time.is_(None))
        if after is not None:
            query = query.where(order.after(after))
        query = query.order_by(*order.clauses).limit(size + 1)
        keys = len(order.columns)

        def work(connection: sa.Connection) -> Page[User, Position]:
            rows = connection.execute(query).all()
            return Page.cut([(order.position(row[:keys]), _user(row[keys:])) for row in rows], size, ())

        return await self._database.read(work)

    async def change(self, user_id: str, etag: str, change: Callable[[User], User]) -> User:
        """Replace a user with what ``change`` returns. ``etag``: of the state that may be changed; any if empty.

        Raises UserNotFoundError, EtagMismatchError, EmailTakenError, and what ``change`` does.
        """

        def work(connection: sa.Connection) -> User:
            user = _get(connection, user_id, _GET_TO_CHANGE)
            if etag and etag != user.etag:
                raise EtagMismatchError(etag)
            changed = change(user)
            if changed == user:
                return user
            if email_key(changed.email) != email_key(user.email):
                _require_unique_email(connection, changed)
            connection.execute(sa.update(users).where(users.c.id == user_id).values(**_mutable_values(changed)))
            return changed

        return await self._database.write(work)


def _get(connection: sa.Connection, user_id: str, query: sa.Select[Any] = _GET) -> User:
    row = connection.execute(query, {"id": user_id}).one_or_none()
    if row is None:
        raise UserNotFoundError(user_id)
    return _user(row)


def _user(row: Iterable[Any]) -> User:
    """The user in a row of the columns _USER."""
    user_id, email, create_time, update_time, version, delete_time, name, given, family = row
    parts = None if given is None else (given, family or "")
    return User(user_id, Name(name, parts), email, create_time, update_time, version, delete_time)


def _mutable_values(user: User) -> dict[str, Any]:
    """The values of the mutable columns."""
    given, family = user.name.parts or (None, None)
    return {
        "name": user.name.full,
        "given_name": given,
        "family_name": family,
        "email": user.email,
        "email_key": email_key(user.email),
        "update_time": user.update_time,
        "version": user.version,
        "delete_time": user.delete_time,
    }


def _require_unique_email(connection: sa.Connection, user: User) -> None:
    """Raise EmailTakenError if another user has the email, even a deleted one, which may be undeleted."""
    if connection.execute(sa.select(users.c.id).where(users.c.email_key == email_key(user.email))).first() is not None:
        raise EmailTakenError(user.email)
