"""Load reports: ORCA's, in the trailers of responses and from ORCA's out-of-band service.

The report (``xds.data.orca.v3.OrcaLoadReport``) is sent as ``endpoint-load-metrics-bin``, which gRPC clients in other
languages read (gRFC A51), and again as ``weft-load-bin``, because gRPC's core hides the former from Python clients. It
is updated every 100 ms at most, and at high rates only every fourth response carries it. Clients that don't read
trailers use the out-of-band service.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from mesh.model import Metadatum
from mesh.orca import SERVICE, OrcaLoadReport, OrcaLoadReportRequest
from mesh.policy.server.admission import Admission
from mesh.server.thread_pool import iterate_responses
from mesh.wire import ORCA_LOAD_REPORT, WEFT_LOAD_REPORT

REPORT_PERIOD = 0.1
"""Seconds for which a report is reused."""

MIN_INTERVAL = 0.1
"""The shortest interval between two reports of the out-of-band service. ORCA's default is a minute. Seconds."""

MAX_INTERVAL = 3600.0
"""The longest interval between two reports of the out-of-band service. Seconds."""

SMOOTHING = 0.3
"""The weight of a new period in the reported averages."""

HIGH_RATE, SAMPLE_EVERY = 200.0, 4
"""Above the first (calls a second), one response in the second carries the report: enough for each client, and
cheaper."""


class LoadReporter:
    """Measures the load of this process for ORCA's reports.

    ``cpu_utilization``: its CPU time as a share of one core, which is what Python can use. ``application_utilization``:
    calls in flight and waiting as a share of their limit, or the former if that is higher. ``rps_fractional`` and
    ``eps``: calls completed and failed a second. All are averages over about half a second.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._report = OrcaLoadReport()
        self._trailers: tuple[Metadatum, ...] = ()
        self._update_at = 0.0
        self._high_rate = False
        self._responses = 0
        self._cpu = time.process_time()
        self._updated_at = time.monotonic()
        self._completed = self._failures = 0

    def trailers(self, now: float) -> tuple[Metadatum, ...]:
        """The trailers for a response sent at ``now``; empty for most at high rates."""
        if now >= self._update_at:
            self._update(now)
        self._responses += 1
        return () if self._high_rate and self._responses % SAMPLE_EVERY else self._trailers

    def report(self) -> Any:
        """The report."""
        now = time.monotonic()
        if now >= self._update_at:
            self._update(now)
        return self._report

    def _update(self, now: float) -> None:
        self._update_at = now + REPORT_PERIOD  # first, so that other threads don't measure, too
        span = now - self._updated_at
        if span > 0:
            cpu = time.process_time()
            completed, failures = self._admission.completed, self._admission.failures
            used = (cpu - self._cpu) / span
            # After an idle period, older averages don't matter.
            weight = max(SMOOTHING, min(1.0, span))
            for field, value in (
                ("cpu_utilization", used),
                ("rps_fractional", (completed - self._completed) / span),
                ("eps", (failures - self._failures) / span),
                # Without a low limit, permits say little: then the process is as busy as its CPU.
                ("application_utilization", max(used, self._admission.utilization)),
            ):
                before = getattr(self._report, field)
                setattr(self._report, field, round(before + (value - before) * weight, 4))
            self._high_rate = self._report.rps_fractional > HIGH_RATE
            self._cpu, self._completed, self._failures, self._updated_at = cpu, completed, failures, now
        # Never empty: an empty trailer is not sent.
        report = self._report.SerializeToString() or b"\x09" + bytes(8)
        self._trailers = tuple((key, report) for key in (ORCA_LOAD_REPORT, WEFT_LOAD_REPORT))


def _interval(request: Any) -> float:
    interval = request.report_interval  # may be outside a Duration's range: clients may send anything
    return min(max(MIN_INTERVAL, (interval.seconds + interval.nanos / 1e9) or 60.0), MAX_INTERVAL)


def add_to_server(reporter: LoadReporter, server: Any, ended: asyncio.Event) -> None:
    """Serve ORCA's out-of-band reports on a ``grpc.aio.Server`` until ``ended``: a drain must not wait for them."""

    async def stream(request: Any, _: Any) -> AsyncIterator[Any]:
        while not ended.is_set():
            yield reporter.report()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_interval(request)):
                    await ended.wait()

    _add(stream, server)


def add_to_threaded_server(reporter: LoadReporter, server: Any, threads: threading.Semaphore) -> None:
    """Serve ORCA's out-of-band reports on a ``grpc.Server``. Between reports a stream holds no thread, unless an
    interceptor wraps it; ``threads`` limits how many do."""

    def stream(request: Any, context: Any, send: Callable[[Any], object] | None = None) -> Any:
        if send is None:
            return iterate_responses(stream, threads, request, context)
        over = threading.Event()

        def report() -> None:
            send(reporter.report())
            if not over.is_set():
                timer = threading.Timer(_interval(request), report)
                timer.name, timer.daemon = "mesh-orca", True
                timers[:] = [timer]
                timer.start()

        def end() -> None:
            over.set()
            for timer in timers:
                timer.cancel()
            send(None)

        timers: list[threading.Timer] = []
        if context.add_callback(end):
            report()
        return None

    stream.experimental_non_blocking = True  # type: ignore[attr-defined]
    _add(stream, server)


def _add(stream: Callable[..., Any], server: Any) -> None:
    handler = grpc.unary_stream_rpc_method_handler(
        stream, OrcaLoadReportRequest.FromString, OrcaLoadReport.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"StreamCoreMetrics": handler}),))
