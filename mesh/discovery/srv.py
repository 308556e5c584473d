"""``dns:///_service._proto.name``: the replicas that a name's SRV records list, with their ports, weights and
priorities (RFC 2782).

Needs dnspython, ``weft[dns]``: the system's resolver knows addresses alone. The hosts that the records name are then
asked for as any other.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.addresses import Address
from mesh.discovery.dns import FLOOR, PERIOD, PROBATION, DnsResolver, Lookup, lookup
from mesh.model import Endpoint

if TYPE_CHECKING:
    from dns.asyncresolver import Resolver as Asking

PATIENCE = 5.0
"""How long the name servers may take to answer. Seconds."""


@dataclass(frozen=True, slots=True)
class Record:
    """An SRV record."""

    priority: int
    weight: int
    port: int
    host: str


Query = Callable[[str], Awaitable[Iterable[Record]]]
"""From a name to its SRV records. Raises OSError."""


async def query(name: str, asking: Asking | None = None) -> list[Record]:
    """The name servers' answer; ``asking`` None: of those that the system is configured with, now."""
    import dns.asyncresolver
    import dns.exception
    import dns.resolver

    try:
        answer = await (asking or dns.asyncresolver.Resolver()).resolve(name, "SRV", lifetime=PATIENCE, search=True)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        raise socket.gaierror(socket.EAI_NONAME, "no SRV records") from None
    except dns.exception.DNSException as error:
        raise OSError(str(error)) from None
    return [Record(each.priority, each.weight, each.port, each.target.to_text().rstrip(".")) for each in answer]


class SrvResolver(DnsResolver):
    """Polls the SRV records of ``name`` and the addresses of the hosts that they list."""

    def __init__(
        self,
        name: str,
        *,
        period: float = PERIOD,
        floor: float = FLOOR,
        probation: float = PROBATION,
        rng: random.Random | None = None,
        lookup: Lookup = lookup,
        query: Query = query,
    ) -> None:
        """Raises ImportError when dnspython isn't installed."""
        import dns.asyncresolver  # noqa: F401 - now, where the program can be told

        super().__init__(name, 0, period=period, floor=floor, probation=probation, rng=rng, lookup=lookup)
        self._query = query

    async def _find(self) -> list[Endpoint]:
        # A host of "" is the root: "the service is decidedly not available at this domain" - RFC 2782.
        records = [record for record in await self._query(self._host) if record.host]
        answers = await asyncio.gather(
            *(self._lookup(record.host, record.port) for record in records), return_exceptions=True
        )
        endpoints = []
        priorities = sorted({record.priority for record in records})
        for record, answer in zip(records, answers, strict=True):
            if isinstance(answer, BaseException):
                continue
            endpoints += [
                Endpoint(
                    str(Address(address, record.port)),
                    weight=max(record.weight, 1),  # 0 is "a very small chance", and for all alike: no preference
                    priority=priorities.index(record.priority),
                )
                for address in sorted(set(answer))
            ]
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if failures and not endpoints:
            raise failures[0]
        return endpoints

    def __repr__(self) -> str:
        return f"<SrvResolver {self._host}>"
