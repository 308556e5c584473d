"""Calls with one key to one endpoint: a ring of hashes (A42), by a header of the call (A76).

Each endpoint has entries on the ring in proportion to its weight, and at least one. A key goes to the first endpoint
on the ring from its hash on; a call without the header goes to a random one. An endpoint that can't be called is left
out, which moves its own keys and no others. With a load factor c, an endpoint that has more than c times the mean in
flight is skipped for the next on the ring (Mirrokni, Thorup and Zadimoghaddam 2016, "consistent hashing with bounded
loads").

All clients of the mesh build the same ring: hashes are BLAKE2b's first 8 bytes. Envoy and gRPC use xxHash, which isn't
in Python's standard library, so their clients send a key to another endpoint than clients of the mesh.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from hashlib import blake2b
from math import ceil, inf

from mesh.model import CallSpec, Metadatum
from mesh.policy.balancing.pickers import Picker, untried
from mesh.policy.cluster.node import Node


def hash_of(text: str | bytes) -> int:
    """A 64-bit hash that is the same in every process."""
    data = text.encode() if isinstance(text, str) else text
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


def entry_counts(nodes: Sequence[Node], total: int, min_size: int, max_size: int) -> list[int]:
    """How many entries each of ``nodes`` has on a ring for ``total`` endpoints: its weight, relative to a mean of 1,
    times an equal share of a ring of ``min_size`` to ``max_size`` entries; and at least 1.

    The share is a power of two. A42 chooses it so that the lightest endpoint has a whole number, but then every
    endpoint that is added or removed changes the others' entries, and moves their keys.
    """
    share = 1
    while share * total < min_size and 2 * share * total <= max_size:
        share *= 2
    return [max(1, round(min(node.weight * share, max_size))) for node in nodes]


class RingHash(Picker):
    """A ring over ``nodes``, those of ``total`` endpoints that may be called. ``outstanding`` returns how many calls
    are in flight in all, for the mean."""

    __slots__ = ("_factor", "_hashes", "_header", "_outstanding", "_owners")

    def __init__(
        self,
        nodes: Sequence[Node],
        total: int,
        header: str = "",
        min_size: int = 1024,
        max_size: int = 4096,
        factor: float = 0.0,
        outstanding: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(nodes)
        self._header = header
        self._factor = factor
        self._outstanding = outstanding
        hashes: list[int] = []
        owners: list[Node] = []
        for node, count in zip(self.nodes, entry_counts(self.nodes, total, min_size, max_size), strict=True):
            known = node.ring_hashes
            if len(known) < count:
                address = node.endpoint.address
                known.extend(hash_of(f"{address}_{index}") for index in range(len(known), count))
            hashes += known if len(known) == count else known[:count]
            owners += [node] * count
        by_hash = sorted(range(len(hashes)), key=hashes.__getitem__)
        self._hashes = [hashes[index] for index in by_hash]
        self._owners = [owners[index] for index in by_hash]

    def pick(self, call: CallSpec, now: float, rng: random.Random, tried: Sequence[Node] = ()) -> Node:  # noqa: ARG002
        key = _value(call.metadata, self._header) if call.metadata and self._header else None
        at = bisect_left(self._hashes, rng.getrandbits(64) if key is None else hash_of(key))
        owners, size = self._owners, len(self._owners)
        limit = inf
        if self._factor:
            limit = ceil(self._factor * (self._outstanding() + 1) / len(self.nodes))
        for step in range(size):
            node = owners[(at + step) % size]
            if node.in_flight < limit and node not in tried:
                return node
        return untried(self.nodes, rng, tried)


def _value(metadata: Sequence[Metadatum], header: str) -> str | bytes | None:
    """A header's value; several are joined by commas (A76)."""
    values = [value for key, value in metadata if key == header]
    if len(values) > 1:
        return ",".join(value if isinstance(value, str) else value.decode("latin-1") for value in values)
    return values[0] if values else None
