"""Load reports of endpoints (ORCA, A51): from the trailers of responses (``weft-load-bin``), or out of band.

Imported with the first report: channels whose policy doesn't use reports never need it.
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
from mesh.wire import WEFT_LOAD_REPORT

_LOG = logging.getLogger("mesh.channel")


def take(cluster: Cluster, address: str, trailing_metadata: Any) -> None:
    """Give the cluster the report in the trailers of a response from ``address``."""
    for key, value in trailing_metadata or ():
        if key == WEFT_LOAD_REPORT:
            try:
                report = OrcaLoadReport.FromString(value)
            except DecodeError:
                return
            _take(cluster, address, report)
            return


def _take(cluster: Cluster, address: str, report: Any) -> None:
    # The application's own utilization takes precedence over its CPU's (A58).
    utilization = report.application_utilization if report.application_utilization > 0 else report.cpu_utilization
    cluster.report(address, time.monotonic(), utilization, report.rps_fractional, report.eps)


class OutOfBand:
    """Watches the load reports of connected endpoints. Used on the pool's loop only."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._watching: dict[str, asyncio.Task[None]] = {}

    def keep(self, connected: Mapping[str, Subchannel]) -> None:
        """Watch these, and no others."""
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
        """Stop watching."""
        for task in self._watching.values():
            task.cancel()
        await asyncio.gather(*self._watching.values(), return_exceptions=True)
        self._watching.clear()

    async def _watch(self, subchannel: Subchannel) -> None:
        address, period = subchannel.address, self._cluster.balancer.reports.out_of_band
        request = OrcaLoadReportRequest()
        request.report_interval.FromMicroseconds(int(period * 1e6))
        async with subchannel.control_channel() as channel:
            ask = channel.unary_stream(
                f"/{SERVICE}/StreamCoreMetrics", OrcaLoadReportRequest.SerializeToString, OrcaLoadReport.FromString
            )
            while True:
                try:
                    async for report in ask(request):
                        _take(self._cluster, address, report)
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                        _LOG.error("%s: %s does not serve load reports out of band", self._cluster.name, address)
                        return
                await asyncio.sleep(period)
