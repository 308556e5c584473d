"""What the shop promises while its processes are killed: no order lost or duplicated, and one notification per
event."""

from __future__ import annotations

import asyncio
import random
import signal
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import pytest

import mesh.aio
from services.notification.consumer import CONSUMER
from tests.faults.shop import Shop, buy, insist
from tests.processes import Spawn, eventually
from weft.order.v1 import order_pb2, order_pb2_grpc
from weft.user.v1 import user_pb2, user_pb2_grpc

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

ORDERS, KILLS = 2_000, 30
SHOPPERS = 16
"""Orders that are created concurrently."""

OUTAGE = 30.0
"""Seconds for which the broker is down."""

SETTLED_WITHIN = 60.0
"""Seconds within which all events must arrive after the last kill: the broker waits 10 s for a killed
consumer, a relay 3 s for a killed relay, and processes take some to start."""

CREATED, CONFIRMED, CANCELLED = "ORDER_CREATED", "ORDER_CONFIRMED", "ORDER_CANCELLED"


@pytest.fixture
def shop(spawn: Spawn, tmp_path: Path) -> Shop:
    shop = Shop(spawn, tmp_path / "data")
    shop.start()
    return shop


class Shopper:
    """Creates orders, and records which were acknowledged."""

    def __init__(self, orders: order_pb2_grpc.OrderServiceAsyncStub, user_id: str) -> None:
        self.acknowledged: list[str] = []
        self.expected: Counter[tuple[str, ...]] = Counter()
        self._orders = orders
        self._user_id = user_id

    async def order(self) -> None:
        """Create an order; confirm every third one, and then cancel every sixth."""
        order_id = await buy(self._orders, self._user_id)
        self.acknowledged.append(order_id)
        number = len(self.acknowledged)
        self.expected[order_id, CREATED] += 1
        if number % 3 == 0:
            await insist(lambda: self._orders.ConfirmOrder(order_pb2.ConfirmOrderRequest(id=order_id), timeout=5))
            self.expected[order_id, CONFIRMED] += 1
        if number % 6 == 0:
            await insist(lambda: self._orders.CancelOrder(order_pb2.CancelOrderRequest(id=order_id), timeout=5))
            self.expected[order_id, CANCELLED] += 1


@asynccontextmanager
async def shopping(shop: Shop) -> AsyncIterator[Shopper]:
    async with (
        mesh.aio.insecure_channel(f"mesh://{shop.registry}/weft.user.v1.UserService") as user_channel,
        mesh.aio.insecure_channel(f"mesh://{shop.registry}/weft.order.v1.OrderService") as order_channel,
    ):
        users = user_pb2_grpc.UserServiceStub(user_channel)
        request = user_pb2.CreateUserRequest(
            name="Ada", email=f"{uuid.uuid4().hex}@example.com", request_id=str(uuid.uuid4())
        )
        user = (await insist(lambda: users.CreateUser(request, timeout=5))).user
        yield Shopper(order_pb2_grpc.OrderServiceStub(order_channel), user.id)


async def test_kills_lose_nothing_and_tell_nobody_twice(shop: Shop) -> None:
    """2,000 orders, while orders, notifications and the broker are killed at random, 30 times in total."""
    rng = random.Random(20261122)
    victims = ["order-1", "order-2", "notification-1", "notification-2", "broker"]
    begun = 0
    async with shopping(shop) as shopper:

        async def shop_on() -> None:
            nonlocal begun
            while begun < ORDERS:
                begun += 1
                await shopper.order()

        async def kill_on() -> None:
            for number in range(1, KILLS + 1):
                while len(shopper.acknowledged) < number * ORDERS / (KILLS + 1):  # noqa: ASYNC110 - orders are events
                    await asyncio.sleep(0.01)
                victim = rng.choice(victims)
                await asyncio.to_thread(shop.kill, victim)
                shop.start_one(victim)

        async with asyncio.timeout(300), asyncio.TaskGroup() as tasks:
            tasks.create_task(kill_on())
            for _ in range(SHOPPERS):
                tasks.create_task(shop_on())

    assert len(shopper.acknowledged) == len({*shopper.acknowledged}) == ORDERS
    assert sorted(shop.orders()) == sorted(shopper.acknowledged)
    shop.settled(shopper.expected, SETTLED_WITHIN)

    # Once more from the start of the stream: nothing changes.
    client = await nats.connect(shop.nats_url)
    try:
        js = client.jetstream()
        await js.delete_consumer("events", CONSUMER)
        async with asyncio.timeout(SETTLED_WITHIN):
            while True:
                try:
                    found = await js.consumer_info("events", CONSUMER)
                except nats.js.errors.NotFoundError:
                    continue
                if found.num_pending == 0 and found.num_ack_pending == 0:
                    break
                await asyncio.sleep(0.05)  # between two checks
        assert found.delivered is not None
        assert found.delivered.stream_seq >= sum(shopper.expected.values())
        assert (await js.stream_info("dead-letters")).state.messages == 0
    finally:
        await client.close()
    assert shop.notifications() == shopper.expected


async def test_orders_are_taken_while_the_broker_is_away_and_events_arrive_after(shop: Shop) -> None:
    async with shopping(shop) as shopper:
        await shopper.order()
        shop.settled(shopper.expected, SETTLED_WITHIN)
        shop.kill("broker")
        away_until = time.monotonic() + OUTAGE
        slowest = 0.0
        while time.monotonic() < away_until:
            began = time.monotonic()
            await shopper.order()
            slowest = max(slowest, time.monotonic() - began)
        assert shop.waiting() == sum(shopper.expected.values()) - 1
        assert sum(shop.notifications().values()) == 1
        said = shop.said("order-1") + shop.said("order-2")
        assert "outbox is behind" in said
        shop.start_one("broker")
        shop.settled(shopper.expected, SETTLED_WITHIN)
    assert slowest < OUTAGE / 2, "an order waited for the broker"


async def test_a_drained_replica_leaves_nothing_undone(shop: Shop) -> None:
    """SIGTERM: calls finish, the relay publishes pending events, consumers finish theirs; exit code 0."""
    async with shopping(shop) as shopper:
        for _ in range(20):
            await shopper.order()
        for name in ("order-1", "order-2"):
            assert await asyncio.to_thread(shop.drain, name) == 0
        assert shop.waiting() == 0
        for name in ("notification-1", "notification-2"):
            shop.settled(shopper.expected, SETTLED_WITHIN)
            assert await asyncio.to_thread(shop.drain, name) == 0
    assert shop.notifications() == shopper.expected


async def test_a_relay_that_hangs_is_followed_by_another(shop: Shop) -> None:
    async with shopping(shop) as shopper:
        await shopper.order()
        shop.settled(shopper.expected, SETTLED_WITHIN)
        holder = "order-1" if "relay took the lease" in shop.said("order-1") else "order-2"
        shop.send(holder, signal.SIGSTOP)
        try:
            await shopper.order()
            eventually(lambda: shop.waiting() == 0, SETTLED_WITHIN, "another relay took over")
        finally:
            shop.send(holder, signal.SIGCONT)
        shop.settled(shopper.expected, SETTLED_WITHIN)
