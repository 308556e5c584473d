"""``static:///``: the endpoints are in the target."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable

from mesh.discovery.resolver import Resolver, Update
from mesh.model import Endpoint


class StaticResolver(Resolver):
    """Yields its addresses once, in their order, each once."""

    def __init__(self, addresses: Iterable[str]) -> None:
        self._endpoints = tuple(Endpoint(address) for address in dict.fromkeys(addresses))

    async def updates(self) -> AsyncGenerator[Update, None]:
        yield Update(self._endpoints)
        await asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<StaticResolver {','.join(endpoint.address for endpoint in self._endpoints)}>"
