"""What an endpoint says of its own load (ORCA, A51), and the weight that follows from it (A58).

Weight = queries a second / (utilization + failures a second / queries a second × penalty): what it could do at full
use. A report counts once it has come for ``blackout`` seconds, and until ``expiration`` after the last. One that is
not a number, not finite or negative is as if it hadn't come; so is one older than the last.
"""

from __future__ import annotations

from math import inf, isfinite

from mesh.config.settings import ReportsConfig


class Report:
    """The latest report of one endpoint. Written by one thread or another, whole or not at all: it is one tuple."""

    __slots__ = ("_latest", "_since")

    def __init__(self) -> None:
        self._latest = (-inf, 0.0, 0.0, 0.0)
        self._since = inf

    def take(self, now: float, utilization: float, qps: float, eps: float, config: ReportsConfig) -> None:
        """A report has come at ``now``."""
        if not (isfinite(utilization + qps + eps) and utilization > 0 and qps > 0 and eps >= 0):
            return
        last = self._latest[0]
        if now < last:
            return
        if now - last > config.expiration:
            self._since = now  # the blackout begins anew: "non_empty_since" in A58
        self._latest = (now, utilization, qps, eps)

    def reconnected(self) -> None:
        """A new connection, so perhaps a new process: the blackout begins anew (A58)."""
        self._latest = (-inf, 0.0, 0.0, 0.0)

    def weight(self, now: float, config: ReportsConfig) -> float:
        """The endpoint's weight; 0.0 while its reports don't count."""
        at, utilization, qps, eps = self._latest
        if now - at >= config.expiration or now - self._since < config.blackout:
            return 0.0
        weight = qps / (utilization + eps / qps * config.error_penalty)
        return weight if isfinite(weight) else 0.0

    def __repr__(self) -> str:
        return f"<Report utilization={self._latest[1]:g} qps={self._latest[2]:g}>"
