"""How many connection attempts start at a time, and how often connectivity states are polled.

At most ``CONNECTS_PER_PERIOD`` endpoints start to connect within ``CONNECT_PERIOD`` seconds. A connection attempt that
takes longer (a host that accepts and sends nothing) doesn't delay the ones behind it. (RFC 8305, 5, starts the next
attempt after 250 ms, too.) The longer the newest attempt takes, the less often the states are polled.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh.model import Connectivity

CONNECTS_PER_PERIOD = 16
"""Endpoints that start to connect within 0.25 s."""

CONNECT_PERIOD = 0.25  # seconds
SHORTEST_POLL = 0.005  # seconds between two polls, at least
LONGEST_POLL = 0.1  # and at most
POLL_SHARE = 0.05  # of the time that a connection attempt has taken so far: its end may be noticed this much later


class ConnectPacer:
    """The connection attempts in progress."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def poll(self, states: Iterable[tuple[str, Connectivity]], now: float) -> tuple[list[str], float]:
        """Which IDLE endpoints may connect now, and in how many seconds to poll again."""
        since, idle = {}, []
        for address, state in states:
            if state == Connectivity.IDLE:
                idle.append(address)
            elif state == Connectivity.CONNECTING:
                since[address] = self._since.get(address, now)
        allowed = CONNECTS_PER_PERIOD - sum(now - begun < CONNECT_PERIOD for begun in since.values())
        begin = idle[: max(0, allowed)]
        since.update(dict.fromkeys(begin, now))
        self._since = since
        if not since and not idle:
            return begin, LONGEST_POLL
        if begin or len(idle) > len(begin):
            return begin, SHORTEST_POLL
        return begin, min(max(SHORTEST_POLL, POLL_SHARE * (now - max(since.values()))), LONGEST_POLL)

    def __repr__(self) -> str:
        return f"<ConnectPacer {len(self._since)} connecting>"
