"""The bus in one process's memory, for unit tests: what it keeps ends with the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from services import events
from services.events import Again, Dead, DeadLetter, Event, Handler

WORKERS = 8
"""Events that are acted on at a time, under one ``consume``."""


@dataclass(slots=True)
class _Consumer:
    """What is kept of a consumer: the events that it has yet to act on, with the attempts made."""

    types: str
    waiting: asyncio.Queue[tuple[Event, int]] = field(default_factory=asyncio.Queue)
    dead: list[DeadLetter] = field(default_factory=list)


class MemoryBus:
    """A ``Bus``. ``backoff``: seconds before an event comes again after its n-th attempt."""

    def __init__(self, backoff: Callable[[int], float] = events.backoff) -> None:
        self.kept: list[Event] = []
        self._ids: set[str] = set()
        self._consumers: dict[str, _Consumer] = {}
        self._backoff = backoff

    async def publish(self, event: Event) -> None:
        events.check(event)
        if event.id in self._ids:
            return
        self._ids.add(event.id)
        self.kept.append(event)
        for consumer in self._consumers.values():
            if _is_of(consumer.types, event):
                consumer.waiting.put_nowait((event, 1))

    @asynccontextmanager
    async def consume(self, consumer: str, types: str, handler: Handler) -> AsyncIterator[None]:
        known = self._consumers.get(consumer)
        if known is None:
            known = self._consumers[consumer] = _Consumer(types)
            for event in self.kept:
                if _is_of(types, event):
                    known.waiting.put_nowait((event, 1))
        stop = asyncio.Event()
        workers = [asyncio.create_task(self._work(known, handler, stop)) for _ in range(WORKERS)]
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(*workers)

    async def dead_letters(self, consumer: str) -> list[DeadLetter]:
        known = self._consumers.get(consumer)
        return list(known.dead) if known is not None else []

    def replay(self, consumer: str) -> None:
        """Have every event come again to the consumer."""
        known = self._consumers[consumer]
        for event in self.kept:
            if _is_of(known.types, event):
                known.waiting.put_nowait((event, 1))

    async def _work(self, consumer: _Consumer, handler: Handler, stop: asyncio.Event) -> None:
        stopped = asyncio.create_task(stop.wait())
        while not stop.is_set():
            getting = asyncio.create_task(consumer.waiting.get())
            await asyncio.wait({getting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                break
            event, attempt = getting.result()
            ending = await events.handle(handler, event, attempt, self._backoff)
            if isinstance(ending, Again):
                asyncio.get_running_loop().call_later(ending.delay, consumer.waiting.put_nowait, (event, attempt + 1))
            elif isinstance(ending, Dead):
                consumer.dead.append(DeadLetter(event, ending.reason, attempt))
        await stopped


def _is_of(types: str, event: Event) -> bool:
    return event.type.startswith(f"{types}.")
