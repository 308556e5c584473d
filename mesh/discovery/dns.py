"""``dns:///``: polls the addresses of a name.

gRPC's own resolver re-resolves only after a disconnect, so clients never find replicas that were added
(grpc/grpc#12295). This one polls, as grpc-dotnet's does, and keeps the last good result while the name server fails. It
re-resolves soon after an endpoint has failed, but at most once per second (gRPC: 30 s). An address that is missing from
a result stays until it has been missing from two more (``probation.py``).
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

from mesh.addresses import Address, is_ip
from mesh.discovery.probation import Probation
from mesh.discovery.resolver import Resolver, Update
from mesh.model import Endpoint

PERIOD = 5.0
"""The time between two lookups. Seconds."""

MIN_RESOLUTION_INTERVAL = 1.0
"""The minimum time between two lookups, after ``resolve_now`` and until the first result. Seconds."""

PROBATION = 12.0
"""How long an address stays after it is missing from results. Seconds."""

JITTER = 0.2
"""The relative jitter of each delay, so that clients that started together don't poll together."""

Lookup = Callable[[str, int], Awaitable[Iterable[str]]]
"""From host and port to IP addresses. Raises OSError."""

# No such name, or a name without addresses; the latter exists only in glibc.
_NO_NAME = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})


async def lookup(host: str, port: int) -> list[str]:
    """The system resolver's result; it runs in the loop's thread pool."""
    answers = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(answer[4][0]) for answer in answers]


class DnsResolver(Resolver):
    """Polls the addresses of ``host``, and yields them sorted when they have changed."""

    source = "DNS"

    def __init__(
        self,
        host: str,
        port: int,
        *,
        period: float = PERIOD,
        min_interval: float = MIN_RESOLUTION_INTERVAL,
        probation: float = PROBATION,
        rng: random.Random | None = None,
        lookup: Lookup = lookup,
    ) -> None:
        self._host = host
        self._port = port
        self._period = period
        self._min_interval = min_interval
        self._rng = rng or random.Random()
        self._lookup = lookup
        self._probation = Probation(probation)
        self._resolve_requested = asyncio.Event()

    def resolve_now(self) -> None:
        self._resolve_requested.set()

    async def updates(self) -> AsyncGenerator[Update, None]:
        if is_ip(self._host):
            yield Update((Endpoint(str(Address(self._host, self._port))),))
            await asyncio.get_running_loop().create_future()
        found = False
        last: Update | None = None
        while True:
            self._resolve_requested.clear()
            update = await self._resolve(found)
            found = found or update.endpoints is not None
            if update != last:
                last = update
                yield update
            jitter = self._rng.uniform(1 - JITTER, 1 + JITTER)
            await asyncio.sleep(self._min_interval * jitter)
            if found:
                await self._wait(max(self._period - self._min_interval, 0.0) * jitter)

    async def _resolve(self, found: bool) -> Update:
        try:
            endpoints = await self._find()
        except socket.gaierror as error:
            missing = error.errno in _NO_NAME
            return Update(None, f"dns: {self._host}: {error.strerror}", final=missing and not found)
        except UnicodeError as error:
            return Update(None, f"dns: {self._host!r} is not a name: {error}", final=not found)
        except OSError as error:
            return Update(None, f"dns: {self._host}: {error}")
        # Sorted by address: the system may return another order each time, and the order doesn't matter.
        return Update(self._probation.apply(endpoints, asyncio.get_running_loop().time()))

    async def _find(self) -> list[Endpoint]:
        """The current endpoints. Raises OSError."""
        return [Endpoint(str(Address(address, self._port))) for address in await self._lookup(self._host, self._port)]

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._resolve_requested.wait()
        except TimeoutError:
            pass

    def __repr__(self) -> str:
        return f"<DnsResolver {Address(self._host, self._port)}>"
