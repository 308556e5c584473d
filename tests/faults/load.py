"""A constant load of calls through the mesh, in both worlds at once, that remembers how each call ended."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

import mesh
import mesh.aio
from mesh.observe import Explanation
from tests.processes import eventually

SYNC_WORKERS = 4
INTERVAL = 0.01
"""Seconds between two calls of the asyncio world; the sync world's threads together make as many."""


@dataclass(frozen=True)
class Done:
    """One call of the load, over."""

    world: str
    request: Any
    began: float
    seconds: float
    why: Explanation

    @property
    def addresses(self) -> list[str]:
        """Where its attempts went that left this process."""
        return [attempt.address for attempt in self.why.attempts if attempt.code != "NEVER_SENT"]

    def __str__(self) -> str:
        return f"{self.world} after {self.seconds:.3f} s: {self.why}"


class Load:
    """While its block lasts, calls ``method`` of a stub over ``target`` about 200 times a second.

    ``method``: from a channel to a multicallable, of a unary or (``streams``) streamed response. ``request``: makes
    each call's request. ``timeout``: each call's deadline, in seconds. A failed call is remembered, not raised.
    """

    def __init__(
        self,
        target: str,
        method: Callable[[Any], Any],
        request: Callable[[], Any],
        *,
        timeout: float = 10.0,
        streams: bool = False,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self.done: list[Done] = []
        self._method = method
        self._request = request
        self._timeout = timeout
        self._streams = streams
        self._over = threading.Event()
        self._channels: dict[str, Any] = {
            "sync": mesh.insecure_channel(target, options),
            "aio": mesh.aio.insecure_channel(target, options),
        }
        self._threads = [threading.Thread(target=self._block) for _ in range(SYNC_WORKERS)]
        self._threads.append(threading.Thread(target=lambda: asyncio.run(self._run())))

    # -- what tests ask

    @property
    def failed(self) -> list[str]:
        """The calls that didn't end well, told as their user would be."""
        return [str(done) for done in self.done if done.why.code != "OK"]

    def rotation(self, world: str) -> set[str]:
        """The addresses that the channel of a world picks among now."""
        return {node.endpoint.address for node in self._channels[world].assembly.cluster.picker.nodes}

    def known(self) -> set[str]:
        """The addresses that any of the channels knows, whether they answer or not."""
        return {address for channel in self._channels.values() for address in channel.assembly.cluster.nodes}

    def in_rotation(self, addresses: Collection[str], within: float = 20.0) -> None:
        """Return when both channels pick among exactly ``addresses``."""
        for world in self._channels:
            eventually(
                lambda world=world: self.rotation(world) == set(addresses),  # type: ignore[misc]
                within,
                f"{world} picks among {sorted(addresses)}; it knows {self._channels[world].assembly.cluster!r}",
            )

    def more(self, count: int = 50) -> list[Done]:
        """``count`` calls or more of each world that begin from now on, once they are over."""
        now = time.monotonic()

        def enough() -> list[Done]:
            new = [done for done in self.done if done.began >= now]
            worlds = Counter(done.world for done in new)
            return new if all(worlds[world] >= count for world in self._channels) else []

        return eventually(enough, 30.0, f"{count} more calls of each world")

    def go_on_for(self, seconds: float) -> None:
        """Return when the load has gone on for so long."""
        self._over.wait(seconds)

    # -- making it

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._channels["sync"].close()
        in_flight = [
            node for c in self._channels.values() for node in c.assembly.cluster.nodes.values() if node.in_flight
        ]
        assert not in_flight, f"counted as in flight when all calls are over: {in_flight}"

    def _block(self) -> None:
        method = self._method(self._channels["sync"])
        while not self._over.wait(INTERVAL * SYNC_WORKERS):
            request, began = self._request(), time.monotonic()
            try:
                if self._streams:
                    call = method(request, timeout=self._timeout)
                    for _ in call:
                        pass
                    call.code()  # the last message comes before the call's end
                else:
                    _, call = method.with_call(request, timeout=self._timeout)
            except grpc.RpcError as error:
                call = error
            self._note("sync", request, began, call)

    async def _run(self) -> None:
        over = asyncio.get_running_loop().run_in_executor(None, self._over.wait)
        async with self._channels["aio"] as channel:
            method = self._method(channel)
            async with asyncio.TaskGroup() as calls:
                begin = time.monotonic()
                for number in itertools.count(1):
                    calls.create_task(self._await(method))
                    late = time.monotonic() - begin - number * INTERVAL
                    await asyncio.wait([over], timeout=max(0.0, -late))
                    if over.done():
                        break

    async def _await(self, method: Any) -> None:
        request, began = self._request(), time.monotonic()
        call = method(request, timeout=self._timeout)
        try:
            if self._streams:
                async for _ in call:
                    pass
            else:
                await call
        except grpc.RpcError:
            pass
        self._note("aio", request, began, call)

    def _note(self, world: str, request: Any, began: float, call: Any) -> None:
        self.done.append(Done(world, request, began, time.monotonic() - began, call.explain()))
