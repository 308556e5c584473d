"""What a server tells of its load: ORCA's report, in the trailers of each answer and as a service.

The report (``xds.data.orca.v3.OrcaLoadReport``) goes out as ``endpoint-load-metrics-bin``, which gRPC clients in other
languages read (gRFC A51), and in the same bytes as ``weft-load-bin``, because gRPC's core keeps the former from Python
clients. It is made anew every 100 ms at most, and when calls come fast only every fourth answer carries it. Clients
that read no trailers of ours ask ORCA's out-of-band service.
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
from mesh.server.thread_pool import responses
from mesh.wire import ORCA_LOAD_REPORT, WEFT_LOAD_REPORT

PERIOD = 0.1
"""Seconds that a report is good for."""

LEAST_INTERVAL = 0.1
"""Seconds between two reports of the out-of-band service, however few are asked for; ORCA's default is a minute."""

MAX_INTERVAL = 3600.0
"""Seconds between two reports of the out-of-band service, at most."""

SMOOTHING = 0.3
"""The share of a new period in what is reported."""

FAST, SPARSE = 200.0, 4
"""Beyond so many calls a second one answer in so many carries the report: enough for every client, at less cost."""


class Load:
    """The load of this process, as ORCA tells it.

    ``cpu_utilization``: its CPU, of one core, which is what Python can use. ``application_utilization``: calls in
    flight and waiting, of the limit on them. ``rps_fractional`` and ``eps``: calls that ended, and that failed, a
    second. All are averages over about half a second.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._report = OrcaLoadReport()
        self._trailers: tuple[Metadatum, ...] = ()
        self._due = 0.0
        self._fast = False
        self._answers = 0
        self._cpu = time.process_time()
        self._stamp = time.monotonic()
        self._ended = self._failed = 0

    def trailers(self, now: float) -> tuple[Metadatum, ...]:
        """The trailers for an answer that goes out at ``now``; empty for most when calls come fast."""
        if now >= self._due:
            self._measure(now)
        self._answers += 1
        return () if self._fast and self._answers % SPARSE else self._trailers

    def report(self) -> Any:
        """The report itself."""
        now = time.monotonic()
        if now >= self._due:
            self._measure(now)
        return self._report

    def _measure(self, now: float) -> None:
        self._due = now + PERIOD  # first: threads that come here together need not all measure
        span = now - self._stamp
        if span > 0:
            cpu, ended, failed = time.process_time(), self._admission.ended, self._admission.failed
            used = (cpu - self._cpu) / span
            # After a quiet time the past says nothing.
            weight = max(SMOOTHING, min(1.0, span))
            for field, value in (
                ("cpu_utilization", used),
                ("rps_fractional", (ended - self._ended) / span),
                ("eps", (failed - self._failed) / span),
                # Permits alone say little where there is no limit: then the process is as busy as its CPU.
                ("application_utilization", max(used, self._admission.utilization)),
            ):
                before = getattr(self._report, field)
                setattr(self._report, field, round(before + (value - before) * weight, 4))
            self._fast = self._report.rps_fractional > FAST
            self._cpu, self._ended, self._failed, self._stamp = cpu, ended, failed, now
        # Its bytes are never empty: a trailer that is, is none.
        report = self._report.SerializeToString() or b"\x09" + bytes(8)
        self._trailers = tuple((key, report) for key in (ORCA_LOAD_REPORT, WEFT_LOAD_REPORT))


def _interval(request: Any) -> float:
    interval = request.report_interval  # may be out of a Duration's range: it is whatever the client sent
    return min(max(LEAST_INTERVAL, (interval.seconds + interval.nanos / 1e9) or 60.0), MAX_INTERVAL)


def add_to_server(load: Load, server: Any, ended: asyncio.Event) -> None:
    """Serve ORCA's out-of-band reports on a ``grpc.aio.Server`` until ``ended``: a drain must not wait for them."""

    async def stream(request: Any, _: Any) -> AsyncIterator[Any]:
        while not ended.is_set():
            yield load.report()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_interval(request)):
                    await ended.wait()

    _add(stream, server)


def add_to_threaded_server(load: Load, server: Any, held: threading.Semaphore) -> None:
    """Serve ORCA's out-of-band reports on a ``grpc.Server``: between reports a client takes none of its threads.
    ``held``: how many may take one where an interceptor stands around them."""

    def stream(request: Any, context: Any, send: Callable[[Any], object] | None = None) -> Any:
        if send is None:
            return responses(stream, held, request, context)
        over = threading.Event()

        def report() -> None:
            send(load.report())
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
