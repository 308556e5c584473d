"""Requests that take effect once, however many times they are sent (AIP-155).

A service's store records each request in the transaction that performs it. When the same request_id comes again with
the same content, the response is what the first one created; with different content, the request is refused.
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
    """A hash of what a request asks for: equal for equal content, in every release."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


class Requests:
    """The requests that a service has performed, in the table ``requests`` of its own database."""

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
        # Built once: building a statement takes longer than SQLite takes to run it.
        self._find = sa.select(columns.fingerprint, columns.resource_id).where(
            columns.request_id == sa.bindparam("request_id")
        )
        self._add = sa.insert(self._table)

    def find(self, connection: sa.Connection, request_id: str, fingerprint: str) -> str | None:
        """The id of what an earlier request with this id created; None if there was none.

        Raises RequestIdReusedError if it had different content.
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
        """Record what the request created."""
        connection.execute(
            self._add,
            {"request_id": request_id, "fingerprint": fingerprint, "resource_id": resource_id, "create_time": now},
        )
