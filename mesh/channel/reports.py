"""Load reports of endpoints, as they come with answers (``weft-load-bin``: ORCA's report, A51).

Imported with the first one that is read: a channel whose policy doesn't go by reports never does.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from mesh.policy.cluster import Cluster
from mesh.server.load import OrcaLoadReport

KEY = "weft-load-bin"
"""Core keeps ORCA's own key, ``endpoint-load-metrics-bin``, from Python."""


def take(cluster: Cluster, address: str, now: float, trailing_metadata: Any) -> None:
    """An answer of ``address`` came with these trailers: tell the cluster what they report."""
    for key, value in trailing_metadata or ():
        if key == KEY:
            try:
                report = OrcaLoadReport.FromString(value)
            except DecodeError:
                return
            take_message(cluster, address, now, report)
            return


def take_message(cluster: Cluster, address: str, now: float, report: Any) -> None:
    """``address`` has reported."""
    # What the application says of itself goes before its CPU (A58).
    utilization = report.application_utilization if report.application_utilization > 0 else report.cpu_utilization
    cluster.report(address, now, utilization, report.rps_fractional, report.eps)
