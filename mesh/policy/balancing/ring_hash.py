"""Calls with one key to one endpoint: a ring of hashes (A42), by a header of the call (A76).

Each endpoint stands on the ring as often as its weight has it, and at least once. A key goes to the endpoint next on
the ring from its hash; a call without the header goes anywhere. An endpoint that can't be called is left out, which
moves its own keys and no others. With a load factor c, an endpoint that has more than c times the mean in flight is
passed over for the next on the ring (Mirrokni, Thorup and Zadimoghaddam 2016, "consistent hashing with bounded loads").

Every client has the same ring, whatever process it is: hashes are BLAKE2b's first 8 bytes, not xxHash as in Envoy and
gRPC, because Python comes with it. Clients of the mesh and of Envoy so agree each among themselves.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from hashlib import blake2b
from math import ceil, inf

from mesh.model import CallSpec, Metadatum
from mesh.policy.balancing.pickers import Picker, another
from mesh.policy.cluster.node import Node


def hash_of(text: str | bytes) -> int:
    """64 bits that anyone computes alike."""
    data = text.encode() if isinstance(text, str) else text
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


def entries(nodes: Sequence[Node], of: int, least: int, most: int) -> list[int]:
    """How often each of ``nodes`` stands on a ring that is for ``of`` endpoints: as its weight, against a mean of 1,
    has it of an equal share of ``least`` to ``most`` entries; and at least once.

    The share is a power of two. A42's is such that the lightest has a whole number, but then every endpoint that comes
    or goes changes how often all others stand there, and moves their keys.
    """
    share = 1
    while share * of < least and 2 * share * of <= most:
        share *= 2
    return [max(1, round(min(node.weight * share, most))) for node in nodes]


class Ring(Picker):
    """Over those of a ring of ``of`` endpoints that may be called. ``outstanding`` is how many calls are in flight in
    all: the mean is taken from it."""

    __slots__ = ("_factor", "_hashes", "_header", "_outstanding", "_owners")

    def __init__(
        self,
        nodes: Sequence[Node],
        of: int,
        header: str = "",
        least: int = 1024,
        most: int = 4096,
        factor: float = 0.0,
        outstanding: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(nodes)
        self._header = header
        self._factor = factor
        self._outstanding = outstanding
        hashes: list[int] = []
        owners: list[Node] = []
        for node, count in zip(self.nodes, entries(self.nodes, of, least, most), strict=True):
            known = node.ring
            if len(known) < count:
                address = node.endpoint.address
                known.extend(hash_of(f"{address}_{index}") for index in range(len(known), count))
            hashes += known if len(known) == count else known[:count]
            owners += [node] * count
        order = sorted(range(len(hashes)), key=hashes.__getitem__)
        self._hashes = [hashes[place] for place in order]
        self._owners = [owners[place] for place in order]

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        key = _value(call.metadata, self._header) if call.metadata and self._header else None
        at = bisect_left(self._hashes, rng.getrandbits(64) if key is None else hash_of(key))
        owners, size = self._owners, len(self._owners)
        most = inf
        if self._factor:
            most = ceil(self._factor * (self._outstanding() + 1) / len(self.nodes))
        for step in range(size):
            node = owners[(at + step) % size]
            if node.in_flight < most and node not in tried:
                return node
        return another(self.nodes, rng, tried)


def _value(metadata: Sequence[Metadatum], header: str) -> str | bytes | None:
    """A header's value; of several, all, with commas between them (A76)."""
    values = [value for key, value in metadata if key == header]
    if len(values) > 1:
        return ",".join(value if isinstance(value, str) else value.decode("latin-1") for value in values)
    return values[0] if values else None
