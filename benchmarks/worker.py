"""A replica with faults or limited capacity: ``python -m benchmarks.worker`` prints its ports and serves until its
stdin closes.

``/bench.Work/Do`` returns the first port, after ``--delay`` seconds; a fraction ``--fail`` of its calls fails
immediately with UNAVAILABLE. With ``--work``, calls run one at a time and each takes that many CPU seconds, on
``--share`` of a core (like a container with a quota), and responses carry ORCA load reports. ``/bench.Work/Count``
returns how many calls ``Do`` has received.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import threading
import time
from concurrent import futures
from typing import Any

import grpc

from mesh.orca import OrcaLoadReport
from mesh.wire import ORCA_LOAD_REPORT, WEFT_LOAD_REPORT

REPORT_PERIOD = 0.1
SMOOTHING = 0.2
"""The weight of the newest period in the reported load."""


class Worker:
    """The state that calls share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._rng = random.Random()
        self._seen = itertools.count()
        self._core = threading.Lock()
        self._busy = 0.0
        self._done = 0
        self._report = OrcaLoadReport()
        self._trailers: tuple[tuple[str, bytes], ...] = ()
        self.name = b""

    def do(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        next(self._seen)
        if self._arguments.fail and self._rng.random() < self._arguments.fail:
            context.abort(grpc.StatusCode.UNAVAILABLE, "on purpose")
        if self._arguments.delay:
            time.sleep(self._arguments.delay)
        if self._arguments.work:
            with self._core:
                if context.is_active():  # the client may have given up
                    self._work(self._arguments.work)
            context.set_trailing_metadata(self._trailers)
        return self.name

    def count(self, _: bytes, __: grpc.ServicerContext) -> bytes:
        return str(next(self._seen)).encode()

    def _work(self, seconds: float) -> None:
        begun = time.monotonic()
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            sum(range(500))
        time.sleep(seconds / self._arguments.share - seconds)  # the rest of the core is for others
        self._busy += time.monotonic() - begun
        self._done += 1

    def report(self, stopped: threading.Event) -> None:
        """Measure the load until stopped."""
        last = time.monotonic()
        while not stopped.wait(REPORT_PERIOD):
            now = time.monotonic()
            busy, done = self._busy, self._done
            self._busy -= busy
            self._done -= done
            for field, value in (("application_utilization", busy), ("rps_fractional", done)):
                before = getattr(self._report, field)
                setattr(self._report, field, before + (value / (now - last) - before) * SMOOTHING)
            last = now
            self._trailers = tuple(
                (key, self._report.SerializeToString()) for key in (ORCA_LOAD_REPORT, WEFT_LOAD_REPORT)
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--fail", type=float, default=0.0)
    parser.add_argument("--work", type=float, default=0.0)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--ports", type=int, default=1)
    arguments = parser.parse_args()
    worker = Worker(arguments)
    handlers: dict[str, Any] = {
        "Do": grpc.unary_unary_rpc_method_handler(worker.do),
        "Count": grpc.unary_unary_rpc_method_handler(worker.count),
    }
    server = grpc.server(futures.ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Work", handlers),))
    ports = [server.add_insecure_port("127.0.0.1:0") for _ in range(arguments.ports)]
    worker.name = str(ports[0]).encode()
    server.start()
    print(*ports, flush=True)
    stopped = threading.Event()
    if arguments.work:
        threading.Thread(target=worker.report, args=(stopped,), daemon=True).start()
    sys.stdin.read()
    stopped.set()
    server.stop(0)


if __name__ == "__main__":
    main()
