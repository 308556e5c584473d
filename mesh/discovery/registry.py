"""``mesh:///``: watches the instances of a service in the registry.

There is one Watch stream per service, which resumes where it ended. Known instances are kept while the registry is
unavailable, and for a while after it restarted (``roster.py``); an instance that disappears for a moment stays
(``probation.py``). A client that knows no instances yet uses the disk cache (``cache.py``), if there is one. gRPC makes
all of a process's channels to one registry share a connection.
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
from mesh.discovery.roster import HOLD_TIME, Roster
from mesh.errors import short_details
from mesh.tasks import keep_running
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

MIN_BACKOFF = 0.1
MAX_BACKOFF = 5.0
"""The shortest and the longest delay before the registry is called again. Seconds."""

JITTER = 0.2
"""The relative jitter of each delay."""

FIRST_RESPONSE_TIMEOUT = 10.0
"""How long to wait for a watch's first response, which a registry sends at once. Seconds."""

PROBATION = 3.0
"""How long an instance stays after the registry has removed it. Seconds."""

CACHE_AFTER = 1.0
"""How long to wait for the registry before the disk cache is used. Seconds."""

SAVE_PERIOD = 5.0
RESAVE_PERIOD = 600.0
"""Changes are saved at most this often. Without changes the file is still rewritten, so that its age shows that it is
current. Seconds."""

OPTIONS = [
    # Keepalive, to detect that the registry's host is gone: all three are needed.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # This resolver has its own backoff, so core's must stay below it. The minimum is also the connect timeout.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),
]


class RegistryResolver(Resolver):
    """Watches ``service`` in the registry at ``registry``: ``host:port``, or another gRPC target."""

    configures = True

    def __init__(
        self,
        registry: str,
        service: str,
        *,
        hold: float = HOLD_TIME,
        first_response_timeout: float = FIRST_RESPONSE_TIMEOUT,
        probation: float = PROBATION,
        cache: Cache | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.source = f"registry {registry}"
        self._registry = registry
        self._service = service
        self._first_response_timeout = first_response_timeout
        self._rng = rng or random.Random()
        self._roster = Roster(service, hold)
        self._probation = Probation(probation)
        self._cache = cache
        self._cache_used = cache is None
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
                    started = _now()
                    async with contextlib.aclosing(self._watch(stub)) as watch:
                        async for update in watch:
                            if update != last:
                                last = update
                                self._changed.set()
                                yield update
                    self._roster.watch_ended()
                    # A registry that responds and crashes in a loop must not be called ten times a second.
                    if _now() - started > MAX_BACKOFF:
                        backoff = MIN_BACKOFF
                    await asyncio.sleep(backoff * self._rng.uniform(1 - JITTER, 1 + JITTER))
                    backoff = min(backoff * 2, MAX_BACKOFF)
        finally:
            saving.cancel()
            await asyncio.wait([saving])

    async def _watch(self, stub: pb_grpc.RegistryAsyncStub) -> AsyncGenerator[Update, None]:
        """One watch, from its start until it fails; the last update says why."""
        epoch, revision = self._roster.position
        call = stub.Watch(pb.WatchRequest(service=self._service, epoch=epoch, revision=revision))
        read_task = asyncio.ensure_future(call.read())
        started = _now()
        refused = False
        try:
            while True:
                # Not wait_for: a read that is cancelled ends the call.
                await asyncio.wait({read_task}, timeout=self._wait_time(started))
                if read_task.done():
                    self._answered = True
                    step = read_task.result()
                    if not isinstance(step, pb.WatchResponse):
                        # gRPC returns None for a message that can't be parsed.
                        failure = "it sent an invalid message" if step is None else "it ended the watch"
                        break
                    problem = self._roster.apply(step, _now())
                    if not self._roster.in_sync:
                        failure = f"it sent {problem}"
                        break
                    if problem:
                        yield Update(None, f"registry {self._registry}: it sent {problem}")
                    read_task = asyncio.ensure_future(call.read())
                elif not self._answered and _now() - started >= self._first_response_timeout:
                    failure = f"no response within {self._first_response_timeout:g} s"
                    break
                self._roster.expire(_now())
                if self._load_cache() or (self._answered and self._roster.complete):
                    yield await self._current(stub)
        except grpc.aio.AioRpcError as error:
            failure = f"{error.code().name}: {short_details(error.details() or '')}"
            refused = True
        finally:
            self._answered = False
            call.cancel()
            read_task.cancel()
            await asyncio.gather(read_task, return_exceptions=True)
        if self._load_cache():
            yield await self._current(stub)
        # As in gRPC: without endpoints calls wait for the resolver, and fail when it has failed.
        yield Update(None, f"registry {self._registry}: {failure}", final=refused)

    def _wait_time(self, started: float) -> float | None:
        """How long to wait for the registry's next message. Seconds; None: forever."""
        if self._answered:
            deadlines = [until for until in (self._roster.held_until, self._probation.until) if until is not None]
        else:
            deadlines = [started + self._first_response_timeout]
            if not self._cache_used:
                deadlines.append(started + CACHE_AFTER)
        return max(min(deadlines) - _now(), 0.0) if deadlines else None

    async def _current(self, stub: pb_grpc.RegistryAsyncStub) -> Update:
        endpoints = self._probation.apply(self._roster.endpoints(), _now())
        error = "" if endpoints else await absent.describe(stub, self._registry, self._service)
        return Update(endpoints, error, service_config=self._roster.service_config)

    def _load_cache(self) -> bool:
        """Once, and only if no endpoints are known yet, use the disk cache; returns whether it had some."""
        if self._cache_used:
            return False
        self._cache_used = True
        if self._roster.endpoints():
            return False
        snapshot = self._cache.read() if self._cache else None
        if snapshot is not None:
            self._roster.restore(snapshot)
        return bool(self._roster.endpoints())

    async def _save(self) -> None:
        """Keep the disk cache current. (Not in a thread: a megabyte is written in milliseconds.)"""
        while self._cache is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESAVE_PERIOD):
                    await self._changed.wait()
            self._changed.clear()
            # An empty result is of no use later, and instances that the registry hasn't confirmed must not look new.
            if self._answered and self._roster.endpoints():
                self._cache.write(self._roster.snapshot())
                await asyncio.sleep(SAVE_PERIOD)

    def __repr__(self) -> str:
        return f"<RegistryResolver {self._service} at {self._registry}>"


def _now() -> float:
    return asyncio.get_running_loop().time()
