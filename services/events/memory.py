"""An in-memory bus for unit tests; its events are gone when the process ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from services import events
from services.events import DeadLetter, Discard, Event, Handler, Redeliver

WORKERS = 8
"""How many events one ``consume`` processes concurrently."""


@dataclass(slots=True)
class _Consumer:
    """A consumer's state: its pending events, each with the number of its next attempt, and its dead letters."""

    types: str
    pending: asyncio.Queue[tuple[Event, int]] = field(default_factory=asyncio.Queue)
    dead_letters: list[DeadLetter] = field(default_factory=list)


class MemoryBus:
    """A ``Bus``. ``backoff``: seconds before an event is redelivered after its n-th attempt."""

    def __init__(self, backoff: Callable[[int], float] = events.backoff) -> None:
        self.stored: list[Event] = []
        self._ids: set[str] = set()
        self._consumers: dict[str, _Consumer] = {}
        self._backoff = backoff

    async def publish(self, event: Event) -> None:
        events.validate(event)
        if event.id in self._ids:
            return
        self._ids.add(event.id)
        self.stored.append(event)
        for consumer in self._consumers.values():
            if _matches(consumer.types, event):
                consumer.pending.put_nowait((event, 1))

    @asynccontextmanager
    async def consume(self, consumer: str, types: str, handler: Handler) -> AsyncIterator[None]:
        state = self._consumers.get(consumer)
        if state is None:
            state = self._consumers[consumer] = _Consumer(types)
            self.replay(consumer)
        stop = asyncio.Event()
        workers = [asyncio.create_task(self._work(state, handler, stop)) for _ in range(WORKERS)]
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(*workers)

    async def dead_letters(self, consumer: str) -> list[DeadLetter]:
        state = self._consumers.get(consumer)
        return list(state.dead_letters) if state is not None else []

    def replay(self, consumer: str) -> None:
        """Deliver every stored event to the consumer again."""
        state = self._consumers[consumer]
        for event in self.stored:
            if _matches(state.types, event):
                state.pending.put_nowait((event, 1))

    async def _work(self, consumer: _Consumer, handler: Handler, stop: asyncio.Event) -> None:
        stopped = asyncio.create_task(stop.wait())
        while not stop.is_set():
            getting = asyncio.create_task(consumer.pending.get())
            await asyncio.wait({getting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                break
            event, attempt = getting.result()
            result = await events.handle(handler, event, attempt, self._backoff)
            if isinstance(result, Redeliver):
                asyncio.get_running_loop().call_later(result.delay, consumer.pending.put_nowait, (event, attempt + 1))
            elif isinstance(result, Discard):
                consumer.dead_letters.append(DeadLetter(event, result.reason, attempt))
        await stopped


def _matches(types: str, event: Event) -> bool:
    return event.type.startswith(f"{types}.")
