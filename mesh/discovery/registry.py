"""``mesh:///``: the instances that the registry knows, as it learns of them.

One stream for a service, resumed from where it broke off; what is known is kept while the registry is away
(``roster.py`` says for how long after), and an instance that is lost for a moment stays (``probation.py``). A client
that knows nothing yet takes what an earlier one left in the disk cache (``cache.py``), if there is one. gRPC lets all
channels of a process to one registry share a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator

import grpc

from mesh import core
from mesh.discovery import absent
from mesh.discovery.cache import Cache
from mesh.discovery.probation import Probation
from mesh.discovery.resolver import Resolver, Update
from mesh.discovery.roster import HOLD, Roster
from mesh.errors import in_short
from mesh.tasks import keep_running
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

MIN_BACKOFF = 0.1
MAX_BACKOFF = 5.0
"""The first and the longest pause before the registry is tried again. Seconds."""

JITTER = 0.2
"""The share that each pause is longer or shorter by."""

PATIENCE = 10.0
"""A registry that answers a watch with nothing for so long is taken for broken; it owes an answer at once. Seconds."""

PROBATION = 3.0
"""How long an instance stays that the registry no longer tells of. Seconds."""

RECALL = 1.0
"""A registry that hasn't answered for so long is away: the disk cache is used. Seconds."""

SAVE_PERIOD = 5.0
SAVE_AGAIN = 600.0
"""Changes are saved at most this often; and what doesn't change is, for its age to say that it still holds. Seconds."""

OPTIONS = [
    # Find out that the registry's host is gone: all three are needed.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Pacing is this resolver's: core's own pauses between connects stay below it. The least of them is also how long a
    # connect may take.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),
]


class RegistryResolver(Resolver):
    """Watches ``service`` at the registry that ``registry`` names: ``host:port``, or another target of gRPC's."""

    configures = True

    def __init__(
        self,
        registry: str,
        service: str,
        *,
        hold: float = HOLD,
        patience: float = PATIENCE,
        probation: float = PROBATION,
        cache: Cache | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.source = f"registry {registry}"
        self._registry = registry
        self._service = service
        self._patience = patience
        self._rng = rng or random.Random()
        self._roster = Roster(service, hold)
        self._probation = Probation(probation)
        self._cache = cache
        self._recalled = cache is None
        self._answered = False  # the registry has answered the running watch
        self._changed = asyncio.Event()

    async def updates(self) -> AsyncGenerator[Update, None]:
        last: Update | None = None
        saving = asyncio.create_task(keep_running("saving to the disk cache", self._save, where=repr(self)))
        try:
            async with core.aio_channel(self._registry, OPTIONS) as channel:
                stub: pb_grpc.RegistryAsyncStub = pb_grpc.RegistryStub(channel)
                backoff = MIN_BACKOFF
                while True:
                    begun = _now()
                    async with contextlib.aclosing(self._watch(stub)) as watch:
                        async for update in watch:
                            if update != last:
                                last = update
                                self._changed.set()
                                yield update
                    self._roster.cut()
                    # A registry that answers and dies over and over must not be asked ten times a second.
                    if _now() - begun > MAX_BACKOFF:
                        backoff = MIN_BACKOFF
                    await asyncio.sleep(backoff * self._rng.uniform(1 - JITTER, 1 + JITTER))
                    backoff = min(backoff * 2, MAX_BACKOFF)
        finally:
            saving.cancel()
            await asyncio.wait([saving])

    async def _watch(self, stub: pb_grpc.RegistryAsyncStub) -> AsyncGenerator[Update, None]:
        """One watch from its beginning until it breaks off; the last update says why it did."""
        epoch, revision = self._roster.position
        call = stub.Watch(pb.WatchRequest(service=self._service, epoch=epoch, revision=revision))
        reading = asyncio.ensure_future(call.read())
        begun = _now()
        refused = False
        try:
            while True:
                # Not wait_for: a read that is cancelled ends the call.
                await asyncio.wait({reading}, timeout=self._pause(begun))
                if reading.done():
                    self._answered = True
                    step = reading.result()
                    if not isinstance(step, pb.WatchResponse):
                        # gRPC gives None for a message that can't be read.
                        failure = "it sent what is no step of a watch" if step is None else "it ended the watch"
                        break
                    complaint = self._roster.apply(step, _now())
                    if not self._roster.in_step:
                        failure = f"it sent {complaint}"
                        break
                    if complaint:
                        yield Update(None, f"registry {self._registry}: it sent {complaint}")
                    reading = asyncio.ensure_future(call.read())
                elif not self._answered and _now() - begun >= self._patience:
                    failure = f"no answer for {self._patience:g} s"
                    break
                self._roster.settle(_now())
                if self._recall() or (self._answered and self._roster.complete):
                    yield await self._known(stub)
        except grpc.aio.AioRpcError as error:
            failure = f"{error.code().name}: {in_short(error.details() or '')}"
            refused = True
        finally:
            self._answered = False
            call.cancel()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if self._recall():
            yield await self._known(stub)
        # As in gRPC: a call without endpoints waits for an answer, and fails when asking for one does.
        yield Update(None, f"registry {self._registry}: {failure}", final=refused)

    def _pause(self, begun: float) -> float | None:
        """How long a watch may go on as it is, if the registry says nothing more. Seconds; None: for ever."""
        if self._answered:
            untils = [until for until in (self._roster.held_until, self._probation.until) if until is not None]
        else:
            untils = [begun + self._patience]
            if not self._recalled:
                untils.append(begun + RECALL)
        return max(min(untils) - _now(), 0.0) if untils else None

    async def _known(self, stub: pb_grpc.RegistryAsyncStub) -> Update:
        endpoints = self._probation.apply(self._roster.endpoints(), _now())
        error = "" if endpoints else await absent.describe(stub, self._registry, self._service)
        return Update(endpoints, error, service_config=self._roster.service_config)

    def _recall(self) -> bool:
        """Take what the disk cache has, once, if nothing is known by now; returns whether anything is since."""
        if self._recalled:
            return False
        self._recalled = True
        if self._roster.endpoints():
            return False
        snapshot = self._cache.load() if self._cache else None
        if snapshot is not None:
            self._roster.remember(snapshot)
        return bool(self._roster.endpoints())

    async def _save(self) -> None:
        """Keep the disk cache as the registry has it. (Not in a thread: a megabyte is written in milliseconds.)"""
        while self._cache is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SAVE_AGAIN):
                    await self._changed.wait()
            self._changed.clear()
            # An empty answer is nothing to begin with, and what the registry didn't confirm now must not look new.
            if self._answered and self._roster.endpoints():
                self._cache.save(self._roster.snapshot())
                await asyncio.sleep(SAVE_PERIOD)

    def __repr__(self) -> str:
        return f"<RegistryResolver {self._service} at {self._registry}>"


def _now() -> float:
    return asyncio.get_running_loop().time()
