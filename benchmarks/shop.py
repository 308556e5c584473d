"""CreateOrder through the mesh, compared with the raw rate of the same transaction in the same database.

The order service is one process on one core; its client and the user service are on another. The raw rate is that of
the statements that CreateOrder sends, with the database's own driver, one transaction after another on one core: the
most that the database and the disk can do for a single writer. Each figure is the best of ROUNDS, as other load on the
machine can only make it worse.

``python -m benchmarks.shop [seconds per figure]``
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import grpc
import psycopg
from google.type import money_pb2  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

import mesh.aio
from services.common.database import Database
from services.common.migrations import migrate
from services.order.domain import Item, Money, Order
from services.order.messages import event_message
from services.order.store import VERSIONS, OrderStore
from tests.services.postgresql import PostgreSQL
from weft.order.v1 import order_pb2, order_pb2_grpc
from weft.user.v1 import user_pb2, user_pb2_grpc

ROUNDS = 3
IN_FLIGHT = 8
"""Calls in flight: enough to keep the service busy."""
TARGET = 0.25
"""The fraction of SQLite's raw rate that CreateOrder through the mesh should reach."""

CORES = sorted(os.sched_getaffinity(0))
SERVICE_CORE, CLIENT_CORE = CORES[0], CORES[-1]

ITEMS = (Item("tea", 2, Money("EUR", 3_500_000_000)), Item("milk", 1, Money("EUR", 990_000_000)))

# The statements that CreateOrder sends for ITEMS.
STATEMENTS = (
    "SELECT fingerprint, resource_id FROM requests WHERE request_id = :request",
    "INSERT INTO requests (request_id, fingerprint, resource_id, create_time) VALUES (:request, :print, :id, :time)",
    """INSERT INTO orders (id, user_id, create_time, update_time, state, version, user_stale)
    VALUES (:id, :user, :time, :time, 'PENDING', 1, false)""",
    """INSERT INTO items (order_id, position, sku, quantity, currency, units, nanos)
    VALUES (:id, 0, 'tea', 2, 'EUR', 3, 500000000), (:id, 1, 'milk', 1, 'EUR', 0, 990000000)""",
    """INSERT INTO outbox (id, type, subject, time, data, trace)
    VALUES (:request, 'weft.order.v1.OrderCreated', :id, :time, :data, '{}')""",
)


def new_order() -> Order:
    """A new order."""
    return Order.new(str(uuid.uuid4()), user_id=str(uuid.UUID(int=1)), items=ITEMS, now=dt.datetime.now(dt.UTC))


def values(order: Order) -> Mapping[str, object]:
    """The parameters of STATEMENTS."""
    return {
        "request": str(uuid.uuid4()),
        "print": order.fingerprint,
        "id": order.id,
        "user": order.user_id,
        "time": order.create_time.isoformat(" "),
        "data": event_message(order).SerializeToString(),
    }


@contextlib.contextmanager
def core(number: int) -> Iterator[None]:
    """Run this process, and those it starts, on one core."""
    os.sched_setaffinity(0, {number})
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)


def rate(work: Callable[[], object], seconds: float) -> float:
    """How many times per second ``work`` runs, one after another."""
    began = time.perf_counter()
    for done in itertools.count(1):
        work()
        taken = time.perf_counter() - began
        if taken >= seconds:
            return done / taken
    raise AssertionError("unreachable")


def raw_sqlite(file: Path, seconds: float) -> float:
    """Transactions per second with the sqlite3 module."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:

        def transaction() -> None:
            sent = values(new_order())
            connection.execute("BEGIN IMMEDIATE")
            for statement in STATEMENTS:
                connection.execute(statement, sent).fetchall()
            connection.execute("COMMIT")

        return max(rate(transaction, seconds) for _ in range(ROUNDS))


def raw_postgresql(url: str, seconds: float) -> float:
    """Transactions per second with psycopg."""
    statements = [_psycopg(statement) for statement in STATEMENTS]
    with psycopg.connect(url, autocommit=True) as connection:

        def transaction() -> None:
            sent = values(new_order())
            with connection.transaction(), connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement, sent)

        return max(rate(transaction, seconds) for _ in range(ROUNDS))


def _psycopg(statement: str) -> bytes:
    for name in values(new_order()):
        statement = statement.replace(f":{name}", f"%({name})s")
    return statement.encode()


def store_rate(database: Database, seconds: float) -> float:
    """Orders per second with the order service's store, called one after another in this process."""
    store = OrderStore(database)

    async def run() -> float:
        done, began = 0, time.perf_counter()
        while (taken := time.perf_counter() - began) < seconds:
            await store.create(new_order(), str(uuid.uuid4()))
            done += 1
        return done / taken

    return max(asyncio.run(run()) for _ in range(ROUNDS))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def service(name: str, number: int, **environment: str) -> Iterator[str]:
    """Run a replica of a service on one core; yields its address."""
    address = f"127.0.0.1:{free_port()}"
    quiet = {"MESH_LISTEN": address, "MESH_REGISTRY": "", "MESH_LOG_LEVEL": "error"}
    with core(number):
        process = subprocess.Popen(
            [sys.executable, "-m", f"services.{name}"], env={**os.environ, **quiet, **environment}
        )
    try:
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def call_rate(address: str, user_id: str, seconds: float) -> float:
    """CreateOrder calls per second through the mesh to the order service at ``address``."""
    items = [
        order_pb2.OrderItem(
            sku=item.sku,
            quantity=item.quantity,
            unit_price=money_pb2.Money(currency_code="EUR", units=item.price.units, nanos=item.price.fraction),
        )
        for item in ITEMS
        if item.price is not None
    ]
    async with mesh.aio.insecure_channel(f"static:///{address}") as channel:
        orders = order_pb2_grpc.OrderServiceStub(channel)

        async def one() -> bool:
            request = order_pb2.CreateOrderRequest(request_id=str(uuid.uuid4()), user_id=user_id, items=items)
            try:
                await orders.CreateOrder(request, timeout=30, wait_for_ready=True)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # refused under load: not counted
                    return False
                raise
            return True

        async def caller(end: float) -> int:
            done = 0
            while time.perf_counter() < end:
                done += await one()
            return done

        await one()
        best = 0.0
        for _ in range(ROUNDS):
            began = time.perf_counter()
            done = await asyncio.gather(*(caller(began + seconds) for _ in range(IN_FLIGHT)))
            best = max(best, sum(done) / (time.perf_counter() - began))
        return best


async def create_user(address: str) -> str:
    """Create a user in the user service at ``address``; returns its id."""
    async with mesh.aio.insecure_channel(f"static:///{address}") as channel:
        users = user_pb2_grpc.UserServiceStub(channel)
        request = user_pb2.CreateUserRequest(name="Ann", email=f"{uuid.uuid4()}@example.com")
        return (await users.CreateUser(request, timeout=30, wait_for_ready=True)).user.id


def measure(url: str, raw: Callable[[], float], folder: Path, seconds: float) -> tuple[float, float, float]:
    """The three rates of one database: raw, with the store, through the mesh."""
    database = Database(url)
    migrate(database, VERSIONS)
    with core(SERVICE_CORE):
        raw_rate = raw()
        by_store = store_rate(database, seconds)
    database.close()
    with (
        service("user", CLIENT_CORE, MESH_DATA=str(folder)) as users,
        service("order", SERVICE_CORE, MESH_DATABASE_URL=url, MESH_USER_SERVICE=f"static:///{users}") as orders,
        core(CLIENT_CORE),
    ):
        user_id = asyncio.run(create_user(users))
        return raw_rate, by_store, asyncio.run(call_rate(orders, user_id, seconds))


def main() -> int:
    # Processes are forked while channels exist, but only to exec.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
    found: dict[str, tuple[float, float, float]] = {}
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as name:
        folder = Path(name)
        file = folder / "order.db"
        found["SQLite"] = measure(f"sqlite:///{file}", lambda: raw_sqlite(file, seconds), folder, seconds)
        server = PostgreSQL(durable=True)
        try:
            url = server.empty()
            found["PostgreSQL"] = measure(url, lambda: raw_postgresql(url, seconds), folder, seconds)
        finally:
            server.close()
    table = Table(title=f"CreateOrder: best of {ROUNDS} × {seconds:g} s, {IN_FLIGHT} calls in flight, one core")
    for column in ("database", "raw, tx/s", "store, orders/s", "mesh, calls/s", "mesh / raw"):
        table.add_column(column, justify="left" if column == "database" else "right")
    for database, (raw, store, calls) in found.items():
        table.add_row(database, f"{raw:,.0f}", f"{store:,.0f}", f"{calls:,.0f}", f"{calls / raw:.2f}")
    Console().print(table)
    raw, _, calls = found["SQLite"]
    print(f"SQLite: {calls / raw:.2f} of the raw rate (target: {TARGET})")
    return 0 if calls / raw >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
