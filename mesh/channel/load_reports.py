"""Load reports of endpoints (ORCA's, A51): as they come with answers (``weft-load-bin``), or asked for out of band.

Imported with the first one that is read: a channel whose policy doesn't go by reports never does.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Mapping
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from mesh.channel.subchannel import Subchannel
from mesh.orca import SERVICE, OrcaLoadReport, OrcaLoadReportRequest
from mesh.policy.cluster.cluster import Cluster
from mesh.tasks import keep_running
from mesh.wire import LOAD

_LOG = logging.getLogger("mesh.channel")


def take(cluster: Cluster, address: str, trailing_metadata: Any) -> None:
    """An answer of ``address`` came with these trailers: tell the cluster what they report."""
    for key, value in trailing_metadata or ():
        if key == LOAD:
            try:
                report = OrcaLoadReport.FromString(value)
            except DecodeError:
                return
            _tell(cluster, address, report)
            return


def _tell(cluster: Cluster, address: str, report: Any) -> None:
    # What the application says of itself goes before its CPU (A58).
    utilization = report.application_utilization if report.application_utilization > 0 else report.cpu_utilization
    cluster.report(address, time.monotonic(), utilization, report.rps_fractional, report.eps)


class OutOfBand:
    """Asks the endpoints that are connected for their load, over and over. Belongs to the pool's loop."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._watching: dict[str, asyncio.Task[None]] = {}

    def keep(self, connected: Mapping[str, Subchannel]) -> None:
        """Ask these, and no others."""
        for address in self._watching.keys() - connected.keys():
            self._watching.pop(address).cancel()
        for address in connected.keys() - self._watching.keys():
            self._watching[address] = asyncio.create_task(
                keep_running(
                    f"load reports of {address}",
                    functools.partial(self._watch, connected[address]),
                    where=self._cluster.name,
                )
            )

    async def close(self) -> None:
        """Ask nobody any more."""
        for task in self._watching.values():
            task.cancel()
        await asyncio.gather(*self._watching.values(), return_exceptions=True)
        self._watching.clear()

    async def _watch(self, subchannel: Subchannel) -> None:
        address, period = subchannel.address, self._cluster.balancer.reports.out_of_band
        request = OrcaLoadReportRequest()
        request.report_interval.FromMicroseconds(int(period * 1e6))
        async with subchannel.aside() as channel:
            ask = channel.unary_stream(
                f"/{SERVICE}/StreamCoreMetrics", OrcaLoadReportRequest.SerializeToString, OrcaLoadReport.FromString
            )
            while True:
                try:
                    async for report in ask(request):
                        _tell(self._cluster, address, report)
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                        _LOG.error("%s: %s doesn't report its load out of band", self._cluster.name, address)
                        return
                await asyncio.sleep(period)
