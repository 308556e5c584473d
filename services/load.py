"""``make load``: drives a realistic mix of calls against a running shop, at a given rate, with live figures.

The load is open: calls begin when they are due (at random, ``rate`` a second on average), whether or not those before
have ended, and each is timed from when it was due. So a shop that stalls shows what its users would see.
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
"""Users who are there from the start; some more come with the load."""

RECENT = 1_000
"""Orders that the load remembers, to come back to."""

WINDOW = 5.0
"""Seconds over which the rate of now is taken."""

MIX: Mapping[str, int] = {
    "sign up": 2,
    "look at user": 8,
    "buy": 30,
    "look at order": 25,
    "list orders": 8,
    "confirm": 9,
    "ship": 6,
    "deliver": 4,
    "cancel": 3,
    "read": 5,
}
"""How often each thing is done, in parts of the whole."""

SKUS = ("PUNCH-CARD", "PAPER-TAPE", "DRUM", "CORE-PLANE", "TUBE-6SN7")


Action = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class Figures:
    """What came of the calls of one method. ``took``: seconds, of those that went well."""

    took: array[float] = field(default_factory=lambda: array("d"))
    failed: collections.Counter[str] = field(default_factory=collections.Counter)
    ended: collections.deque[float] = field(default_factory=collections.deque)

    def add(self, now: float, seconds: float, failure: str = "") -> None:
        """Count a call that ended ``now``."""
        if failure:
            self.failed[failure] += 1
        else:
            self.took.append(seconds)
        self.ended.append(now)

    def rate(self, now: float) -> float:
        """Calls a second that ended in the last WINDOW."""
        while self.ended and self.ended[0] < now - WINDOW:
            self.ended.popleft()
        return len(self.ended) / WINDOW

    def percentile(self, share: float) -> float:
        """The time that ``share`` of the calls took at the most; 0 without any."""
        ordered = sorted(self.took)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


class Load:
    """Shoppers: they do ``rate`` things a second, in the proportions of ``mix``."""

    def __init__(self, registry: str, rate: float, rng: random.Random, mix: Mapping[str, int] = MIX) -> None:
        self.figures: dict[str, Figures] = {}
        self.told = Figures()
        """From what happened to an order until its user is told."""
        self.running: set[asyncio.Task[None]] = set()
        self._registry = registry
        self._rate = rate
        self._rng = rng
        self._people: list[str] = []
        self._orders: collections.deque[str] = collections.deque(maxlen=RECENT)
        self._users: UserServiceAsyncStub
        self._order: OrderServiceAsyncStub
        self._notifications: NotificationServiceAsyncStub
        actions: dict[str, Action] = {
            "sign up": self._sign_up,
            "look at user": self._look_at_user,
            "buy": self._buy,
            "look at order": self._look_at_order,
            "list orders": self._list_orders,
            "confirm": self._confirm,
            "ship": self._ship,
            "deliver": self._deliver,
            "cancel": self._cancel,
            "read": self._read,
        }
        self._actions = {name: actions[name] for name in mix}
        self._weights = [*mix.values()]

    async def run(self, seconds: float) -> None:
        """Drive the load for so long, and wait until the last call has ended. Raises AioRpcError without a shop."""
        async with contextlib.AsyncExitStack() as stack:

            async def channel(service: str) -> grpc.aio.Channel:
                return await stack.enter_async_context(mesh.aio.insecure_channel(f"mesh://{self._registry}/{service}"))

            self._users = user_pb2_grpc.UserServiceStub(await channel("weft.user.v1.UserService"))
            self._order = order_pb2_grpc.OrderServiceStub(await channel("weft.order.v1.OrderService"))
            self._notifications = notification_pb2_grpc.NotificationServiceStub(
                await channel("weft.notification.v1.NotificationService")
            )
            for _ in range(USERS):
                await self._sign_up()
            watching = asyncio.create_task(self._watch())
            try:
                await self._arrive(seconds)
                if self.running:
                    await asyncio.wait(self.running)
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    async def _arrive(self, seconds: float) -> None:
        began = due = time.monotonic()
        names = [*self._actions]
        while True:
            due += self._rng.expovariate(self._rate)
            if due > began + seconds:
                return
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            (name,) = self._rng.choices(names, self._weights)
            task = asyncio.create_task(self._do(name, due))
            self.running.add(task)
            task.add_done_callback(self.running.discard)

    async def _do(self, name: str, due: float) -> None:
        failure = ""
        try:
            await self._actions[name]()
        except grpc.aio.AioRpcError as error:
            # An order that went another way meanwhile is as it should be.
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                failure = error.code().name
        except _NothingYetError:
            return
        now = time.monotonic()
        self.figures.setdefault(name, Figures()).add(now, now - due, failure)

    async def _watch(self) -> None:
        """See when users are told, from one replica or the next."""
        token = ""
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                request = notification_pb2.WatchNotificationsRequest(resume_token=token)
                async for response in self._notifications.WatchNotifications(request):
                    token = response.resume_token
                    if response.HasField("notification"):
                        happened = response.notification.event_time.ToDatetime(dt.UTC)
                        self.told.add(time.monotonic(), (dt.datetime.now(dt.UTC) - happened).total_seconds())
            await asyncio.sleep(0.2)

    def _person(self) -> str:
        return self._rng.choice(self._people)

    def _recent(self) -> str:
        if not self._orders:
            raise _NothingYetError
        return self._rng.choice(self._orders)

    async def _sign_up(self) -> None:
        name = uuid.uuid4().hex[:12]
        request = user_pb2.CreateUserRequest(
            name=f"Shopper {name}", email=f"{name}@example.com", request_id=str(uuid.uuid4())
        )
        self._people.append((await self._users.CreateUser(request, timeout=TIMEOUT)).user.id)

    async def _look_at_user(self) -> None:
        await self._users.GetUser(user_pb2.GetUserRequest(id=self._person()), timeout=TIMEOUT)

    async def _buy(self) -> None:
        rng = self._rng
        request = order_pb2.CreateOrderRequest(
            request_id=str(uuid.uuid4()),
            user_id=self._person(),
            items=[
                order_pb2.OrderItem(
                    sku=sku,
                    quantity=rng.randint(1, 9),
                    unit_price=money_pb2.Money(currency_code="EUR", units=rng.randint(1, 99), nanos=990_000_000),
                )
                for sku in rng.sample(SKUS, rng.randint(1, 3))
            ],
        )
        self._orders.append((await self._order.CreateOrder(request, timeout=TIMEOUT)).order.id)

    async def _look_at_order(self) -> None:
        await self._order.GetOrder(order_pb2.GetOrderRequest(id=self._recent()), timeout=TIMEOUT)

    async def _list_orders(self) -> None:
        request = order_pb2.ListOrdersRequest(user_id=self._person(), page_size=20)
        await self._order.ListOrders(request, timeout=TIMEOUT)

    async def _confirm(self) -> None:
        await self._order.ConfirmOrder(order_pb2.ConfirmOrderRequest(id=self._recent()), timeout=TIMEOUT)

    async def _ship(self) -> None:
        await self._order.ShipOrder(order_pb2.ShipOrderRequest(id=self._recent()), timeout=TIMEOUT)

    async def _deliver(self) -> None:
        await self._order.DeliverOrder(order_pb2.DeliverOrderRequest(id=self._recent()), timeout=TIMEOUT)

    async def _cancel(self) -> None:
        await self._order.CancelOrder(order_pb2.CancelOrderRequest(id=self._recent()), timeout=TIMEOUT)

    async def _read(self) -> None:
        request = notification_pb2.ListNotificationsRequest(user_id=self._person(), page_size=20)
        await self._notifications.ListNotifications(request, timeout=TIMEOUT)


class _NothingYetError(Exception):
    """There is no order yet to come back to."""


def table(load: Load, elapsed: float) -> Table:
    """The figures as they are."""
    now = time.monotonic()
    shown = Table(box=box.SIMPLE, pad_edge=False, title=f"{elapsed:.0f} s, {len(load.running)} under way")
    for column in ("", "calls", "a second", "p50 ms", "p99 ms", "max ms", "failed"):
        shown.add_column(column, justify="left" if column in {"", "failed"} else "right", no_wrap=True)
    rows = [*sorted(load.figures.items()), ("users told", load.told)]
    for name, figures in rows:
        failed = ", ".join(f"{count} {code}" for code, count in figures.failed.most_common())
        shown.add_row(
            name,
            str(len(figures.took) + figures.failed.total()),
            f"{figures.rate(now):.1f}",
            *(f"{1000 * figures.percentile(share):.1f}" for share in (0.5, 0.99, 1.0)),
            failed,
        )
    return shown


@contextlib.contextmanager
def _shown(console: Console, load: Load, began: float) -> Iterator[Callable[[], None]]:
    """Something that shows the figures of now: a table in a terminal, else a line every now and then."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            yield lambda: live.update(table(load, time.monotonic() - began), refresh=True)
        return
    told = began

    def tell() -> None:
        nonlocal told
        now = time.monotonic()
        if now >= told + WINDOW:
            told = now
            calls = sum(len(figures.took) for figures in load.figures.values())
            failed = sum(figures.failed.total() for figures in load.figures.values())
            print(f"{now - began:.0f} s: {calls} calls went well, {failed} failed", flush=True)

    yield tell


async def _run(load: Load, seconds: float, console: Console) -> None:
    driving = asyncio.create_task(load.run(seconds))
    with _shown(console, load, time.monotonic()) as show:
        while not driving.done():
            show()
            await asyncio.wait({driving}, timeout=0.25)
    driving.result()


def main(arguments: Sequence[str] | None = None) -> int:
    """Drive the load; returns 0 when every call went well, 1 when some failed, 2 when there is no shop."""
    parser = argparse.ArgumentParser(prog="load", description="A realistic mix of calls against a running shop.")
    parser.add_argument("--rate", type=float, default=50.0, help="calls a second (50)")
    parser.add_argument("--for", type=float, default=30.0, dest="seconds", help="seconds (30)")
    parser.add_argument("--seed", type=int, default=None, help="what chance begins with; another each time, without")
    parser.add_argument(
        "--registry",
        default=os.environ.get("MESH_REGISTRY") or "127.0.0.1:50050",
        help="the registry of the shop (MESH_REGISTRY, or 127.0.0.1:50050)",
    )
    given = parser.parse_args(arguments)
    if not (0 < given.rate <= 100_000 and 0 < given.seconds <= 86_400):
        print("load: RATE is calls a second, up to 100000, and FOR is seconds, up to 86400", file=sys.stderr)
        return 2
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 120)
    load = Load(given.registry, given.rate, random.Random(given.seed))
    try:
        asyncio.run(_run(load, given.seconds, console))
    except grpc.aio.AioRpcError as error:
        print(f"load: no shop at {given.registry}: {error.details()} (make run-mesh runs one)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    console.print(table(load, given.seconds))
    return 1 if any(figures.failed for figures in load.figures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
