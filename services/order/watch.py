"""Waits for orders to change, whether through this replica or another."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping

Versions = Callable[[Collection[str]], Awaitable[Mapping[str, int]]]


class Watches:
    """The waiters for each order.

    One query every ``interval`` seconds serves all waiters; changes made by this replica wake them immediately.
    ``versions``: reads the versions of orders by their ids.
    """

    def __init__(self, versions: Versions, interval: float) -> None:
        self._versions = versions
        self._interval = interval
        self._waiting: dict[str, set[asyncio.Event]] = collections.defaultdict(set)
        self._seen: dict[str, int] = {}
        self._failed: Exception | None = None
        self._polling: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Watches orders={len(self._waiting)} waiting={sum(map(len, self._waiting.values()))}>"

    def changed(self, order_id: str, version: int) -> None:
        """Wake those who wait for the order, which now has this version."""
        if order_id in self._waiting:
            self._seen[order_id] = max(version, self._seen.get(order_id, 0))
            for event in self._waiting[order_id]:
                event.set()

    async def wait(self, order_id: str, after: int) -> None:
        """Wait until the order has a version above ``after``. Raises what reading the versions raised."""
        event = asyncio.Event()
        self._waiting[order_id].add(event)
        try:
            while self._seen.get(order_id, 0) <= after:
                if self._polling is None or self._polling.done():
                    self._failed = None
                    self._polling = asyncio.create_task(self._poll(), name="watches")
                event.clear()
                await event.wait()
                if self._failed is not None:
                    raise self._failed
        finally:
            self._waiting[order_id].discard(event)
            if not self._waiting[order_id]:
                del self._waiting[order_id]
                self._seen.pop(order_id, None)
                if not self._waiting and self._polling is not None:
                    self._polling.cancel()
                    self._polling = None

    async def _poll(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while self._waiting:
                await asyncio.sleep(self._interval)
                try:
                    found = await self._versions(tuple(self._waiting))
                except Exception as error:
                    self._failed = error
                    for event in [event for events in self._waiting.values() for event in events]:
                        event.set()
                    return
                for order_id, version in found.items():
                    if version > self._seen.get(order_id, 0):
                        self.changed(order_id, version)
