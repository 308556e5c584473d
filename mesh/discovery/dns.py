"""``dns:///``: the addresses of a name, asked for again and again.

gRPC's own resolver asks only after a disconnect, so clients never find replicas that are added (grpc/grpc#12295). This
one polls, as grpc-dotnet does, keeps the last good answer while the name server fails, and looks again soon when an
endpoint fails, though not more often than each second (gRPC's floor is 30 s). An address that an answer leaves out
stays for as long as two more answers take (``probation.py``).
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
"""Between two lookups. Seconds."""

FLOOR = 1.0
"""The shortest time between two lookups: after ``resolve_now``, and while nothing was ever found. Seconds."""

PROBATION = 12.0
"""How long an address stays that answers leave out. Seconds."""

JITTER = 0.2
"""The share that each pause is longer or shorter by, so that clients started together don't ask together."""

Lookup = Callable[[str, int], Awaitable[Iterable[str]]]
"""From host and port to IP addresses. Raises OSError."""

# Two numbers for one thing: there is no such name, or it has no addresses. glibc alone knows the second.
_NO_NAME = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})


async def lookup(host: str, port: int) -> list[str]:
    """The system's answer, through the loop's threads."""
    answers = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(answer[4][0]) for answer in answers]


class DnsResolver(Resolver):
    """Polls the addresses of ``host``, and yields them, sorted, when they have changed."""

    source = "DNS"

    def __init__(
        self,
        host: str,
        port: int,
        *,
        period: float = PERIOD,
        floor: float = FLOOR,
        probation: float = PROBATION,
        rng: random.Random | None = None,
        lookup: Lookup = lookup,
    ) -> None:
        self._host = host
        self._port = port
        self._period = period
        self._floor = floor
        self._rng = rng or random.Random()
        self._lookup = lookup
        self._probation = Probation(probation)
        self._asked = asyncio.Event()

    def resolve_now(self) -> None:
        self._asked.set()

    async def updates(self) -> AsyncGenerator[Update, None]:
        if is_ip(self._host):
            yield Update((Endpoint(str(Address(self._host, self._port))),))
            await asyncio.get_running_loop().create_future()
        found = False
        last: Update | None = None
        while True:
            self._asked.clear()
            update = await self._resolve(found)
            found = found or update.endpoints is not None
            if update != last:
                last = update
                yield update
            jitter = self._rng.uniform(1 - JITTER, 1 + JITTER)
            await asyncio.sleep(self._floor * jitter)
            if found:
                await self._wait(max(self._period - self._floor, 0.0) * jitter)

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
        # By address: the system may give another order each time, and picking is the balancer's work.
        return Update(self._probation.apply(endpoints, asyncio.get_running_loop().time()))

    async def _find(self) -> list[Endpoint]:
        """The endpoints that there are now. Raises OSError."""
        return [Endpoint(str(Address(address, self._port))) for address in await self._lookup(self._host, self._port)]

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._asked.wait()
        except TimeoutError:
            pass

    def __repr__(self) -> str:
        return f"<DnsResolver {Address(self._host, self._port)}>"
