"""The user service's database."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from services.database import SEQUENCE, Database, UtcDateTime
from services.idempotency import Requests
from services.paging import Page
from services.user.domain import EmailTakenError, User, UserNotFoundError, email_key

VERSIONS = Path(__file__).parent / "versions"
"""The migrations of this database."""

metadata = sa.MetaData()

users = sa.Table(
    "users",
    metadata,
    sa.Column("sequence", SEQUENCE, primary_key=True),  # the order of creation
    sa.Column("id", sa.String(36), nullable=False, unique=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("email", sa.Text, nullable=False),
    sa.Column("email_key", sa.Text, nullable=False, unique=True),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("update_time", UtcDateTime, nullable=False),
    sqlite_autoincrement=True,  # no number is given twice, so a page token never points into the past
)

requests = Requests(metadata)

_USER = (users.c.id, users.c.name, users.c.email, users.c.create_time, users.c.update_time)  # as User's fields are
_GET = sa.select(*_USER).where(users.c.id == sa.bindparam("id"))
_PAGE = (
    sa.select(users.c.sequence, *_USER)
    .where(users.c.sequence > sa.bindparam("after"))
    .order_by(users.c.sequence)
    .limit(sa.bindparam("rows", type_=sa.Integer))
)


class UserStore:
    """Keeps the users. Each method is one transaction, and may raise what ``Database`` does besides what it says."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, user: User, request_id: str = "") -> User:
        """Add a user; give back the one that the same request added before. ``request_id``: empty when there is none.

        Raises RequestIdReusedError and EmailTakenError.
        """

        def work(connection: sa.Connection) -> User:
            if request_id:
                earlier = requests.find(connection, request_id, user.fingerprint)
                if earlier is not None:
                    return _get(connection, earlier)
            key = email_key(user.email)
            if connection.execute(sa.select(users.c.id).where(users.c.email_key == key)).first() is not None:
                raise EmailTakenError(user.email)
            connection.execute(
                sa.insert(users).values(
                    id=user.id,
                    name=user.name,
                    email=user.email,
                    email_key=key,
                    create_time=user.create_time,
                    update_time=user.update_time,
                )
            )
            if request_id:
                requests.add(connection, request_id, user.fingerprint, user.id, user.create_time)
            return user

        return await self._database.write(work)

    async def get(self, user_id: str) -> User:
        """One user. Raises UserNotFoundError."""
        return await self._database.read(lambda connection: _get(connection, user_id))

    async def list(self, size: int, after: int = 0) -> Page[User]:
        """At most ``size`` users, in the order of their creation, from after the sequence number ``after``."""

        def work(connection: sa.Connection) -> Page[User]:
            rows = connection.execute(_PAGE, {"after": after, "rows": size + 1}).all()
            return Page.cut([(sequence, User(*fields)) for sequence, *fields in rows], size)

        return await self._database.read(work)


def _get(connection: sa.Connection, user_id: str) -> User:
    row = connection.execute(_GET, {"id": user_id}).one_or_none()
    if row is None:
        raise UserNotFoundError(user_id)
    return User(*row)
