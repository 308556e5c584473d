"""``make run-mesh`` while its processes are killed repeatedly: orders are still accepted."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sqlite3
import sys
import time
import uuid
from contextlib import closing
from pathlib import Path

import grpc
import grpc.aio
import pytest

import mesh.aio
from tests.e2e.test_run_mesh import Mesh, started
from tests.processes import Spawn
from weft.order.v1 import order_pb2, order_pb2_grpc
from weft.user.v1 import user_pb2, user_pb2_grpc

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="when a process began is in /proc"),
]

KILLS, SECONDS, ORDERS = 57, 90.0, 1_800
RESTARTED_WITHIN = 0.2
"""Seconds from killing a process to its restart."""


class Victims:
    """The processes of a shop: which of them are ready, and when killed ones were restarted."""

    def __init__(self, shop: Mesh) -> None:
        self.delays: list[float] = []
        self._shop = shop
        self._up = shop.pids()
        self._killed: dict[str, float] = {}
        self._read = len(shop.process.said)

    def look(self) -> None:
        """Record which are ready again."""
        said = self._shop.process.said
        whole = said.rfind("\n") + 1
        for name, pid in re.findall(r"^(\S+) is ready again \(pid (\d+)\)$", said[self._read : whole], re.MULTILINE):
            self._up[name] = int(pid)
            self.delays.append(started(int(pid)) - self._killed.pop(name))
        self._read = whole

    def kill_one(self, rng: random.Random) -> bool:
        """Kill one whose service's other replicas are all ready; returns whether there was one."""
        self.look()
        kinds = {name.partition("-")[0] for name in self._killed}
        left = [name for name in sorted(self._up) if name.partition("-")[0] not in kinds]
        if not left:
            return False
        name = rng.choice(left)
        self._killed[name] = time.clock_gettime(time.CLOCK_BOOTTIME)
        os.kill(self._up.pop(name), signal.SIGKILL)
        return True


async def test_57_kills_in_90_seconds_refuse_no_more_orders_than_were_in_flight(spawn: Spawn, tmp_path: Path) -> None:
    shop = Mesh(spawn, tmp_path / "data")
    await asyncio.to_thread(shop.ready)
    rng = random.Random(57)
    victims = Victims(shop)
    acknowledged: list[str] = []
    refused: list[str] = []
    in_flight = at_risk = 0
    async with (
        mesh.aio.insecure_channel(f"mesh://{shop.registry}/weft.user.v1.UserService") as user_channel,
        mesh.aio.insecure_channel(f"mesh://{shop.registry}/weft.order.v1.OrderService") as order_channel,
    ):
        users = user_pb2_grpc.UserServiceStub(user_channel)
        orders = order_pb2_grpc.OrderServiceStub(order_channel)
        request = user_pb2.CreateUserRequest(name="Ada", email=f"{uuid.uuid4().hex}@example.com")
        user = (await users.CreateUser(request, timeout=10)).user

        async def order() -> None:
            nonlocal in_flight
            in_flight += 1
            item = order_pb2.OrderItem(sku="DRUM", quantity=1)
            request = order_pb2.CreateOrderRequest(request_id=str(uuid.uuid4()), user_id=user.id, items=[item])
            try:
                acknowledged.append((await orders.CreateOrder(request, timeout=10)).order.id)
            except grpc.aio.AioRpcError as error:
                refused.append(str(error))
            finally:
                in_flight -= 1

        async def shop_on() -> None:
            begun = time.monotonic()
            async with asyncio.TaskGroup() as calls:
                for number in range(ORDERS):
                    await asyncio.sleep(max(0.0, begun + number * SECONDS / ORDERS - time.monotonic()))  # the rate
                    calls.create_task(order())

        async def kill_on() -> None:
            nonlocal at_risk
            begun = time.monotonic()
            for number in range(KILLS):
                await asyncio.sleep(max(0.0, begun + number * SECONDS / KILLS - time.monotonic()))  # the rate
                at_risk += max(1, in_flight)
                while not victims.kill_one(rng):  # noqa: ASYNC110 - what comes back says so in a log
                    await asyncio.sleep(0.01)  # between two checks

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(shop_on())
            tasks.create_task(kill_on())

    victims.look()
    print(f"{len(refused)} refused, {at_risk} at risk, restarts after {sorted(victims.delays)[-5:]} s at the most")
    assert len(victims.delays) >= KILLS - 5
    # One of 57 may be late, as the machine may be busy with something else.
    assert sum(delay > RESTARTED_WITHIN for delay in victims.delays) <= 1
    assert len(refused) <= at_risk, "\n".join(refused)
    assert len(acknowledged) + len(refused) == ORDERS
    with closing(sqlite3.connect(f"file:{shop.data}/order.db?mode=ro", uri=True, timeout=30)) as connection:
        kept = [row[0] for row in connection.execute("SELECT id FROM orders")]
    assert len(kept) == len(set(kept)) <= ORDERS
    assert set(acknowledged) <= set(kept)
    assert await asyncio.to_thread(shop.process.end, signal.SIGINT, 40) == 0
