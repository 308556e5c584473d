"""Every page of a long list costs the same, measured in the database's steps, not in seconds."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from services.common.database import Database
from services.common.paging import Position
from services.user import store as user_store
from services.user.store import Listing, UserStore
from tests.services.conftest import Open

USERS = 100_000
SIZE = 1_000
EVERY = 50  # virtual machine steps of SQLite between two callbacks

pytestmark = pytest.mark.slow


@pytest.fixture
def many(open_database: Open) -> Database:
    """A database with 100,000 users, whose names and emails are not sorted like their creation."""
    database = open_database("user", user_store.VERSIONS)
    columns = "(id, name, email, email_key, create_time, update_time)"
    if database.file is None:
        values = (
            "SELECT n::text, 'User ' || md5(n::text), md5(n::text) || '@example.com', md5(n::text) || '@example.com', "
            f"timestamptz '2026-01-01 00:00:00Z' + n * interval '1 second', now() FROM generate_series(1, {USERS}) n"
        )
    else:
        # Scrambled like a hash: multiplied by a number without a common factor with 2^32.
        values = (
            f"WITH RECURSIVE counted(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counted WHERE n < {USERS}), "
            "rows(n, h) AS (SELECT n, printf('%08x', (n * 2654435761) & 4294967295) FROM counted) "
            "SELECT n, 'User ' || h, h || '@example.com', h || '@example.com', "
            "strftime('%Y-%m-%d %H:%M:%f000', 1767225600 + n, 'unixepoch'), '2026-01-02 00:00:00.000000' FROM rows"
        )

    def fill(connection: sa.Connection) -> None:
        connection.execute(sa.text(f"INSERT INTO users {columns} {values.replace(':', chr(92) + ':')}"))

    database.write_blocking(fill)
    if database.file is None:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE users")
    return database


@pytest.fixture
def steps(many: Database) -> Callable[[], int]:
    """What the database has done since the last call: SQLite's virtual machine steps, or rows that PostgreSQL read."""
    done = 0
    if many.file is not None:

        def count() -> None:
            nonlocal done
            done += EVERY

        def counting(connection: sa.Connection) -> None:
            driver = connection.connection.driver_connection
            assert isinstance(driver, sqlite3.Connection)
            driver.set_progress_handler(count, EVERY)

        sa.event.listen(many.engine, "begin", counting)
    else:

        def explain(connection: sa.Connection, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
            nonlocal done
            if statement.startswith("SELECT") and "FROM users" in statement:
                plan = connection.connection.cursor()
                plan.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
                (found,) = plan.fetchall()
                done += _rows_read(found[0][0]["Plan"])

        sa.event.listen(many.engine, "before_cursor_execute", explain)

    def taken() -> int:
        nonlocal done
        before, done = done, 0
        return before

    return taken


def _rows_read(plan: dict[str, Any]) -> int:
    """Rows that the leaves of a plan read, including those that a filter dropped."""
    below = plan.get("Plans", [])
    if below:
        return sum(map(_rows_read, below))
    return int(
        plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Index Recheck", 0)
    )


async def test_every_page_of_100_000_users_costs_the_same(many: Database, steps: Callable[[], int]) -> None:
    users = UserStore(many)
    for order_by in ("", "name", "create_time desc"):
        after: Position | None = None
        seen: set[str] = set()
        costs = []
        while True:
            page = await users.list(SIZE, after, Listing(order_by=order_by))
            costs.append(steps())
            seen.update(user.id for user in page.items)
            if not page.more:
                break
            after = page.last
        assert len(seen) == USERS
        assert len(costs) == USERS // SIZE
        # The first page is cheaper by one comparison per row (8 steps instead of 12 in SQLite), and PostgreSQL may sort
        # the last two in memory. A page that read all earlier ones would cost up to 100 times the first.
        assert 0 < max(costs) <= 3 * min(costs)
