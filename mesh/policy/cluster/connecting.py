"""How many connections are made at the same time, and how often their states are looked at.

At most ``AT_ONCE`` endpoints begin to connect within ``PLACE`` seconds: connects are paced, and one that takes longer
(a host that accepts and says nothing) doesn't hold up those behind it. (RFC 8305, 5, starts the next connect after
250 ms, too.) The longer the newest connect takes, the less often the states are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh.model import Connectivity

AT_ONCE = 16
"""Endpoints that begin to connect within 0.25 s."""

PLACE = 0.25  # seconds
BUSY = 0.005  # the shortest time between two looks at the states, in seconds
CALM = 0.1  # and the longest
SHARE = 0.05  # of the time a connect has taken so far: noticing its end may take this much longer


class Connects:
    """The connects that are going on."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def look(self, states: Iterable[tuple[str, Connectivity]], now: float) -> tuple[list[str], float]:
        """Which of the endpoints that are IDLE may connect now, and in how many seconds to look again."""
        since, idle = {}, []
        for address, state in states:
            if state == Connectivity.IDLE:
                idle.append(address)
            elif state == Connectivity.CONNECTING:
                since[address] = self._since.get(address, now)
        places = AT_ONCE - sum(now - begun < PLACE for begun in since.values())
        begin = idle[: max(0, places)]
        since.update(dict.fromkeys(begin, now))
        self._since = since
        if not since and not idle:
            return begin, CALM
        if begin or len(idle) > len(begin):
            return begin, BUSY
        return begin, min(max(BUSY, SHARE * (now - max(since.values()))), CALM)

    def __repr__(self) -> str:
        return f"<Connects {len(self._since)} going on>"
