"""Requests that are acted on once, however often they are sent (AIP-155).

A service's store keeps a table of the requests that it has acted on, and writes to it in the transaction that acts. The
same request_id with the same content then finds what the first one made; with other content it is refused.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Sequence

import sqlalchemy as sa

from services.common.database import UtcDateTime
from services.common.errors import RequestIdReusedError

Content = str | int | Sequence["Content"]


def fingerprint(content: Content) -> str:
    """What tells what one request asks for from what another does: equal for equal content, in every release."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


class Requests:
    """The requests that a service has acted on, in the table ``requests`` of its own database."""

    def __init__(self, metadata: sa.MetaData) -> None:
        self._table = sa.Table(
            "requests",
            metadata,
            sa.Column("request_id", sa.String(36), primary_key=True),
            sa.Column("fingerprint", sa.String(64), nullable=False),
            sa.Column("resource_id", sa.String(36), nullable=False),
            sa.Column("create_time", UtcDateTime, nullable=False),
        )
        columns = self._table.c
        # Made once: making a statement costs more than SQLite takes to perform it.
        self._find = sa.select(columns.fingerprint, columns.resource_id).where(
            columns.request_id == sa.bindparam("request_id")
        )
        self._add = sa.insert(self._table)

    def find(self, connection: sa.Connection, request_id: str, fingerprint: str) -> str | None:
        """The id of what the request made when it came before; None when it is new.

        Raises RequestIdReusedError when it came with other content.
        """
        row = connection.execute(self._find, {"request_id": request_id}).one_or_none()
        if row is None:
            return None
        if row.fingerprint != fingerprint:
            raise RequestIdReusedError(request_id)
        return str(row.resource_id)

    def add(
        self, connection: sa.Connection, request_id: str, fingerprint: str, resource_id: str, now: dt.datetime
    ) -> None:
        """Remember what the request made."""
        connection.execute(
            self._add,
            {"request_id": request_id, "fingerprint": fingerprint, "resource_id": resource_id, "create_time": now},
        )
