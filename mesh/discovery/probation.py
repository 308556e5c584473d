"""Stabilization: an endpoint that is missing from a result stays for a while (Finagle's StabilizingAddr).

Name servers may return a part of the addresses at a time, and a registry may lose an instance for a moment. Without
this, each such flap would cost a connection and the endpoint's statistics. Keeping an endpoint that really is gone does
no harm: its connection fails or its health check does, so it gets no calls.

No clock and no IO here; ``now`` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh.model import Endpoint


class Probation:
    """The endpoints of the latest result, and those that have been missing for less than ``hold`` seconds."""

    def __init__(self, hold: float) -> None:
        self._hold = hold
        self._present: dict[str, Endpoint] = {}
        self._missing: dict[str, tuple[float, Endpoint]] = {}

    @property
    def until(self) -> float | None:
        """When the next missing endpoint is removed; None when none is missing."""
        return min((until for until, _ in self._missing.values()), default=None)

    def apply(self, endpoints: Iterable[Endpoint], now: float) -> tuple[Endpoint, ...]:
        """Apply a result, or the same one again because time has passed; returns the endpoints sorted by address."""
        present = {endpoint.address: endpoint for endpoint in endpoints}
        for address, endpoint in self._present.items():
            if address not in present:
                self._missing[address] = now + self._hold, endpoint
        self._present = present
        self._missing = {
            address: missing
            for address, missing in self._missing.items()
            if address not in present and missing[0] > now
        }
        found = present | {address: endpoint for address, (_, endpoint) in self._missing.items()}
        return tuple(found[address] for address in sorted(found))

    def __repr__(self) -> str:
        return f"<Probation present={len(self._present)} missing={len(self._missing)}>"
