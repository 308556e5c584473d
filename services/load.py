"""``make load``: a realistic mix of calls to a running shop, at a given rate, with live statistics.

The load is open-loop: calls start at random times, ``rate`` per second on average, whether or not earlier ones have
finished, and each is timed from its scheduled start. So when the shop stalls, the figures show what its users would
see.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import datetime as dt
import os
import random
import sys
import time
import uuid
from array import array
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from google.type import money_pb2  # type: ignore[import-untyped]
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

import mesh.aio
from weft.notification.v1 import notification_pb2, notification_pb2_grpc
from weft.order.v1 import order_pb2, order_pb2_grpc
from weft.user.v1 import user_pb2, user_pb2_grpc

if TYPE_CHECKING:
    from weft.notification.v1.notification_pb2_grpc import NotificationServiceAsyncStub
    from weft.order.v1.order_pb2_grpc import OrderServiceAsyncStub
    from weft.user.v1.user_pb2_grpc import UserServiceAsyncStub

TIMEOUT = 5.0
"""Seconds that a call may take."""

USERS = 20
"""Users that are created first; the load adds more."""

RECENT_ORDERS = 1_000
"""How many orders later calls refer to."""

WINDOW = 5.0
"""Seconds over which the current rate is measured."""

MIX: Mapping[str, int] = {
    "create user": 2,
    "get user": 8,
    "create order": 30,
    "get order": 25,
    "list orders": 8,
    "confirm order": 9,
    "ship order": 6,
    "deliver order": 4,
    "cancel order": 3,
    "list notifications": 5,
}
"""The calls, with their relative frequency."""

SKUS = ("PUNCH-CARD", "PAPER-TAPE", "DRUM", "CORE-PLANE", "TUBE-6SN7")


Action = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class Stats:
    """The results of one kind of call. ``latencies``: in seconds, of those that succeeded."""

    latencies: array[float] = field(default_factory=lambda: array("d"))
    failures: collections.Counter[str] = field(default_factory=collections.Counter)
    end_times: collections.deque[float] = field(default_factory=collections.deque)

    def add(self, now: float, seconds: float, failure: str = "") -> None:
        """Count a call that ended ``now``."""
        if failure:
            self.failures[failure] += 1
        else:
            self.latencies.append(seconds)
        self.end_times.append(now)

    def rate(self, now: float) -> float:
        """Calls per second that ended within the last WINDOW."""
        while self.end_times and self.end_times[0] < now - WINDOW:
            self.end_times.popleft()
        return len(self.end_times) / WINDOW

    def quantile(self, q: float) -> float:
        """The latency at quantile ``q``; 0 without calls."""
        ordered = sorted(self.latencies)
        return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else 0.0


class Load:
    """Makes ``rate`` calls per second, in the proportions of ``mix``."""

    def __init__(self, registry: str, rate: float, rng: random.Random, mix: Mapping[str, int] = MIX) -> None:
        self.stats: dict[str, Stats] = {}
        self.notifications = Stats()
        """From a change of an order to its notification."""
        self.running: set[asyncio.Task[None]] = set()
        self._registry = registry
        self._rate = rate
        self._rng = rng
        self._user_ids: list[str] = []
        self._order_ids: collections.deque[str] = collections.deque(maxlen=RECENT_ORDERS)
        self._user_stub: UserServiceAsyncStub
        self._order_stub: OrderServiceAsyncStub
        self._notification_stub: NotificationServiceAsyncStub
        actions: dict[str, Action] = {
            "create user": self._create_user,
            "get user": self._get_user,
            "create order": self._create_order,
            "get order": self._get_order,
            "list orders": self._list_orders,
            "confirm order": self._confirm_order,
            "ship order": self._ship_order,
            "deliver order": self._deliver_order,
            "cancel order": self._cancel_order,
            "list notifications": self._list_notifications,
        }
        self._actions = {name: actions[name] for name in mix}
        self._weights = [*mix.values()]

    async def run(self, seconds: float) -> None:
        """Make calls for so long, and wait for the last to end. Raises AioRpcError if there is no shop."""
        async with contextlib.AsyncExitStack() as stack:

            async def channel(service: str) -> grpc.aio.Channel:
                return await stack.enter_async_context(mesh.aio.insecure_channel(f"mesh://{self._registry}/{service}"))

            self._user_stub = user_pb2_grpc.UserServiceStub(await channel("weft.user.v1.UserService"))
            self._order_stub = order_pb2_grpc.OrderServiceStub(await channel("weft.order.v1.OrderService"))
            self._notification_stub = notification_pb2_grpc.NotificationServiceStub(
                await channel("weft.notification.v1.NotificationService")
            )
            for _ in range(USERS):
                await self._create_user()
            watching = asyncio.create_task(self._watch_notifications())
            try:
                await self._generate(seconds)
                if self.running:
                    await asyncio.wait(self.running)
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    async def _generate(self, seconds: float) -> None:
        began = scheduled = time.monotonic()
        names = [*self._actions]
        while True:
            scheduled += self._rng.expovariate(self._rate)
            if scheduled > began + seconds:
                return
            await asyncio.sleep(max(0.0, scheduled - time.monotonic()))
            (name,) = self._rng.choices(names, self._weights)
            task = asyncio.create_task(self._call(name, scheduled))
            self.running.add(task)
            task.add_done_callback(self.running.discard)

    async def _call(self, name: str, scheduled: float) -> None:
        failure = ""
        try:
            await self._actions[name]()
        except grpc.aio.AioRpcError as error:
            # An order that has changed to another state meanwhile is no failure.
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                failure = error.code().name
        except _NoOrderError:
            return
        now = time.monotonic()
        self.stats.setdefault(name, Stats()).add(now, now - scheduled, failure)

    async def _watch_notifications(self) -> None:
        """Measure how long notifications take, whichever replica serves the watch."""
        token = ""
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                request = notification_pb2.WatchNotificationsRequest(resume_token=token)
                async for response in self._notification_stub.WatchNotifications(request):
                    token = response.resume_token
                    if response.HasField("notification"):
                        event_time = response.notification.event_time.ToDatetime(dt.UTC)
                        delay = (dt.datetime.now(dt.UTC) - event_time).total_seconds()
                        self.notifications.add(time.monotonic(), delay)
            await asyncio.sleep(0.2)

    def _any_user(self) -> str:
        return self._rng.choice(self._user_ids)

    def _any_order(self) -> str:
        if not self._order_ids:
            raise _NoOrderError
        return self._rng.choice(self._order_ids)

    async def _create_user(self) -> None:
        name = uuid.uuid4().hex[:12]
        request = user_pb2.CreateUserRequest(
            name=f"Shopper {name}", email=f"{name}@example.com", request_id=str(uuid.uuid4())
        )
        self._user_ids.append((await self._user_stub.CreateUser(request, timeout=TIMEOUT)).user.id)

    async def _get_user(self) -> None:
        await self._user_stub.GetUser(user_pb2.GetUserRequest(id=self._any_user()), timeout=TIMEOUT)

    async def _create_order(self) -> None:
        rng = self._rng
        request = order_pb2.CreateOrderRequest(
            request_id=str(uuid.uuid4()),
            user_id=self._any_user(),
            items=[
                order_pb2.OrderItem(
                    sku=sku,
                    quantity=rng.randint(1, 9),
                    unit_price=money_pb2.Money(currency_code="EUR", units=rng.randint(1, 99), nanos=990_000_000),
                )
                for sku in rng.sample(SKUS, rng.randint(1, 3))
            ],
        )
        self._order_ids.append((await self._order_stub.CreateOrder(request, timeout=TIMEOUT)).order.id)

    async def _get_order(self) -> None:
        await self._order_stub.GetOrder(order_pb2.GetOrderRequest(id=self._any_order()), timeout=TIMEOUT)

    async def _list_orders(self) -> None:
        request = order_pb2.ListOrdersRequest(user_id=self._any_user(), page_size=20)
        await self._order_stub.ListOrders(request, timeout=TIMEOUT)

    async def _confirm_order(self) -> None:
        await self._order_stub.ConfirmOrder(order_pb2.ConfirmOrderRequest(id=self._any_order()), timeout=TIMEOUT)

    async def _ship_order(self) -> None:
        await self._order_stub.ShipOrder(order_pb2.ShipOrderRequest(id=self._any_order()), timeout=TIMEOUT)

    async def _deliver_order(self) -> None:
        await self._order_stub.DeliverOrder(order_pb2.DeliverOrderRequest(id=self._any_order()), timeout=TIMEOUT)

    async def _cancel_order(self) -> None:
        await self._order_stub.CancelOrder(order_pb2.CancelOrderRequest(id=self._any_order()), timeout=TIMEOUT)

    async def _list_notifications(self) -> None:
        request = notification_pb2.ListNotificationsRequest(user_id=self._any_user(), page_size=20)
        await self._notification_stub.ListNotifications(request, timeout=TIMEOUT)


class _NoOrderError(Exception):
    """No order has been created yet."""


def table(load: Load, elapsed: float) -> Table:
    """The statistics so far."""
    now = time.monotonic()
    shown = Table(box=box.SIMPLE, pad_edge=False, title=f"{elapsed:.0f} s, {len(load.running)} calls in flight")
    for column in ("", "calls", "per second", "p50 ms", "p99 ms", "max ms", "failed"):
        shown.add_column(column, justify="left" if column in {"", "failed"} else "right", no_wrap=True)
    rows = [*sorted(load.stats.items()), ("notification delay", load.notifications)]
    for name, stats in rows:
        failed = ", ".join(f"{count} {code}" for code, count in stats.failures.most_common())
        shown.add_row(
            name,
            str(len(stats.latencies) + stats.failures.total()),
            f"{stats.rate(now):.1f}",
            *(f"{1000 * stats.quantile(q):.1f}" for q in (0.5, 0.99, 1.0)),
            failed,
        )
    return shown


@contextlib.contextmanager
def _live(console: Console, load: Load, began: float) -> Iterator[Callable[[], None]]:
    """A function that shows the current statistics: as a table in a terminal, otherwise as a line every WINDOW."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            yield lambda: live.update(table(load, time.monotonic() - began), refresh=True)
        return
    printed = began

    def print_line() -> None:
        nonlocal printed
        now = time.monotonic()
        if now >= printed + WINDOW:
            printed = now
            succeeded = sum(len(stats.latencies) for stats in load.stats.values())
            failed = sum(stats.failures.total() for stats in load.stats.values())
            print(f"{now - began:.0f} s: {succeeded} calls succeeded, {failed} failed", flush=True)

    yield print_line


async def _run(load: Load, seconds: float, console: Console) -> None:
    running = asyncio.create_task(load.run(seconds))
    with _live(console, load, time.monotonic()) as show:
        while not running.done():
            show()
            await asyncio.wait({running}, timeout=0.25)
    running.result()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load; returns 0 if every call succeeded, 1 if some failed, 2 if there is no shop."""
    parser = argparse.ArgumentParser(prog="load", description="A realistic mix of calls to a running shop.")
    parser.add_argument("--rate", type=float, default=50.0, help="calls per second (default: 50)")
    parser.add_argument("--for", type=float, default=30.0, dest="seconds", help="seconds (default: 30)")
    parser.add_argument("--seed", type=int, default=None, help="the random seed (default: a different one each time)")
    parser.add_argument(
        "--registry",
        default=os.environ.get("MESH_REGISTRY") or "127.0.0.1:50050",
        help="the shop's registry (default: MESH_REGISTRY, or 127.0.0.1:50050)",
    )
    parsed = parser.parse_args(arguments)
    if not (0 < parsed.rate <= 100_000 and 0 < parsed.seconds <= 86_400):
        print("load: RATE must be up to 100000 calls per second, and FOR up to 86400 seconds", file=sys.stderr)
        return 2
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 120)
    load = Load(parsed.registry, parsed.rate, random.Random(parsed.seed))
    try:
        asyncio.run(_run(load, parsed.seconds, console))
    except grpc.aio.AioRpcError as error:
        print(f"load: no shop at {parsed.registry}: {error.details()} (start one: make run-mesh)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    console.print(table(load, parsed.seconds))
    return 1 if any(stats.failures for stats in load.stats.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
