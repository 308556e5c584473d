"""An endpoint's load reports (ORCA, A51), and the weight computed from them (A58).

Weight = QPS / (utilization + EPS / QPS × error penalty): the calls that it could serve at full utilization. Reports are
used after they have arrived for ``blackout`` seconds, and until ``expiration`` seconds after the last. A report with
values that are negative or not finite is ignored, and so is one older than the last.
"""

from __future__ import annotations

from math import inf, isfinite

from mesh.config.settings import LoadReportsConfig


class LoadReport:
    """The latest report of one endpoint: one tuple, so that any thread can replace it without a lock."""

    __slots__ = ("_latest", "_since")

    def __init__(self) -> None:
        self._latest = (-inf, 0.0, 0.0, 0.0)
        self._since = inf

    def record(self, now: float, utilization: float, qps: float, eps: float, config: LoadReportsConfig) -> None:
        """A report has arrived."""
        if not (isfinite(utilization + qps + eps) and utilization > 0 and qps > 0 and eps >= 0):
            return
        last = self._latest[0]
        if now < last:
            return
        if now - last > config.expiration:
            self._since = now  # the blackout period restarts: "non_empty_since" in A58
        self._latest = (now, utilization, qps, eps)

    def reconnected(self) -> None:
        """A new connection may be to a new process: the blackout period restarts (A58)."""
        self._latest = (-inf, 0.0, 0.0, 0.0)

    def weight(self, now: float, config: LoadReportsConfig) -> float:
        """The endpoint's weight; 0.0 while its reports can't be used."""
        at, utilization, qps, eps = self._latest
        if now - at >= config.expiration or now - self._since < config.blackout:
            return 0.0
        weight = qps / (utilization + eps / qps * config.error_penalty)
        return weight if isfinite(weight) else 0.0

    def __repr__(self) -> str:
        return f"<LoadReport utilization={self._latest[1]:g} qps={self._latest[2]:g}>"
