"""The shop as processes that a test may kill: registry, broker, one user, two orders, two notifications."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio

from tests.processes import HOST, Process, Spawn, eventually, free_ports
from tests.services.broker import NATS_SERVER
from weft.order.v1 import order_pb2

if TYPE_CHECKING:
    from weft.order.v1.order_pb2_grpc import OrderServiceAsyncStub

PASSING = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
)
"""The code for callers while something is unavailable; the same request may succeed later."""

T = TypeVar("T")


class Shop:
    """Starts, kills and restarts the processes."""

    def __init__(self, spawn: Spawn, data: Path) -> None:
        self._spawn = spawn
        self._data = data
        self._running: dict[str, Process] = {}
        names = ["registry", "broker", "user", "order-1", "order-2", "notification-1", "notification-2"]
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.registry = f"{HOST}:{self._ports['registry']}"
        self.nats_url = f"nats://{HOST}:{self._ports['broker']}"

    def start(self) -> None:
        """Start all processes; returns once all serve."""
        for name in self._ports:
            self.start_one(name)
        for name, process in self._running.items():
            process.wait_for("Server is ready" if name == "broker" else "serving", within=90)

    def start_one(self, name: str) -> Process:
        """Start a process, without waiting for it."""
        kind = name.partition("-")[0]
        listen = f"{HOST}:{self._ports[name]}"
        if kind == "broker":
            store = self._data / "nats"
            process = self._spawn(
                NATS_SERVER, "-a", HOST, "-p", str(self._ports[name]), "-js", "-sd", store, "-l", "/dev/stdout"
            )
        elif kind == "registry":
            process = self._spawn.python("-m", "mesh.registry", "--listen", listen)
        else:
            process = self._spawn.python(
                "-m",
                f"services.{kind}",
                environment={
                    "MESH_REGISTRY": self.registry,
                    "MESH_NATS_URL": self.nats_url,
                    "MESH_DATA": str(self._data),
                    "MESH_LISTEN": listen,
                    "MESH_INSTANCE_ID": name,
                },
            )
        self._running[name] = process
        return process

    def kill(self, name: str) -> None:
        """Kill a process with SIGKILL."""
        assert self._running[name].end(signal.SIGKILL) == -signal.SIGKILL

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process."""
        self._running[name].send(number)

    def drain(self, name: str) -> int:
        """Stop a process with SIGTERM; returns its exit code."""
        return self._running[name].end(signal.SIGTERM, within=40)

    def said(self, name: str) -> str:
        """The output of the current process."""
        return self._running[name].said

    def _select(self, database: str, query: str) -> list[tuple[str, ...]]:
        with closing(sqlite3.connect(f"file:{self._data / database}.db?mode=ro", uri=True, timeout=30)) as connection:
            return list(connection.execute(query))

    def orders(self) -> list[str]:
        """The ids of the stored orders."""
        return [row[0] for row in self._select("order", "SELECT id FROM orders")]

    def waiting(self) -> int:
        """How many events are pending in the outbox."""
        return int(self._select("order", "SELECT count(*) FROM outbox")[0][0])

    def notifications(self) -> Counter[tuple[str, ...]]:
        """How many notifications of each kind each order has."""
        return Counter(self._select("notification", "SELECT order_id, kind FROM notifications"))

    def settled(self, expected: Counter[tuple[str, ...]], within: float) -> None:
        """Wait until no event is pending and all notifications exist; fails after a while, or if there are too many."""
        eventually(lambda: self.waiting() == 0, within, "the outbox is empty")
        eventually(
            lambda: sum(self.notifications().values()) >= sum(expected.values()), within, "every user has been told"
        )
        assert self.notifications() == expected


async def insist(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call until it succeeds, as any caller may if the call is idempotent."""
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.code() not in PASSING:
                raise
            await asyncio.sleep(0.05)  # before the next attempt


async def buy(orders: OrderServiceAsyncStub, user_id: str) -> str:
    """Create one order; returns the id of the acknowledged order."""
    request = order_pb2.CreateOrderRequest(
        request_id=str(uuid.uuid4()), user_id=user_id, items=[order_pb2.OrderItem(sku="DRUM", quantity=1)]
    )
    answer = await insist(lambda: orders.CreateOrder(request, timeout=5))
    return answer.order.id
