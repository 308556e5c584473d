"""``dns:///_service._proto.name``: polls SRV records, which have ports, weights and priorities (RFC 2782).

Needs dnspython, ``weft[dns]``: the system's resolver only returns addresses. The records' hosts are resolved like any
other.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.addresses import Address
from mesh.discovery.dns import MIN_RESOLUTION_INTERVAL, PERIOD, PROBATION, DnsResolver, Lookup, lookup
from mesh.model import Endpoint

if TYPE_CHECKING:
    from dns.asyncresolver import Resolver as AsyncDnsResolver

SRV_TIMEOUT = 5.0
"""How long to wait for the name servers. Seconds."""


@dataclass(frozen=True, slots=True)
class Record:
    """An SRV record."""

    priority: int
    weight: int
    port: int
    host: str


Query = Callable[[str], Awaitable[Iterable[Record]]]
"""From a name to its SRV records. Raises OSError."""


async def query(name: str, resolver: AsyncDnsResolver | None = None) -> list[Record]:
    """The name servers' answer; ``resolver`` None: the system's name servers, as configured now."""
    import dns.asyncresolver
    import dns.exception
    import dns.resolver

    try:
        answer = await (resolver or dns.asyncresolver.Resolver()).resolve(
            name, "SRV", lifetime=SRV_TIMEOUT, search=True
        )
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
        min_interval: float = MIN_RESOLUTION_INTERVAL,
        probation: float = PROBATION,
        rng: random.Random | None = None,
        lookup: Lookup = lookup,
        query: Query = query,
    ) -> None:
        """Raises ImportError when dnspython isn't installed."""
        import dns.asyncresolver  # noqa: F401 - here, so that making the channel fails

        super().__init__(name, 0, period=period, min_interval=min_interval, probation=probation, rng=rng, lookup=lookup)
        self._query = query

    async def _find(self) -> list[Endpoint]:
        # The host "" is the root: "the service is decidedly not available at this domain" - RFC 2782.
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
                    weight=max(record.weight, 1),  # 0: "a very small chance of being selected"; for all: no preference
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
