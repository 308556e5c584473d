"""A replica with a fault or a load of its own: ``python -m benchmarks.worker`` prints its ports and serves until its
stdin closes.

``/bench.Work/Do`` answers with the first port, after ``--delay`` seconds; a ``--fail`` share of its calls is
UNAVAILABLE at once. With ``--work`` each call, one at a time, does so many seconds of real CPU work, on a machine that
has ``--share`` of a core (as a container with a quota has), and answers carry ORCA load reports of how busy that is.
``/bench.Work/Count`` tells how many calls ``Do`` has seen.
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
"""The share of a new period in what is reported."""


class Worker:
    """What the calls share."""

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
            context.abort(grpc.StatusCode.UNAVAILABLE, "as asked")
        if self._arguments.delay:
            time.sleep(self._arguments.delay)
        if self._arguments.work:
            with self._core:
                if context.is_active():  # who waits for it may have given up
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
        time.sleep(seconds / self._arguments.share - seconds)  # the others' turn on the core
        self._busy += time.monotonic() - begun
        self._done += 1

    def report(self, over: threading.Event) -> None:
        """Measure the load, until it is over."""
        last = time.monotonic()
        while not over.wait(REPORT_PERIOD):
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
    over = threading.Event()
    if arguments.work:
        threading.Thread(target=worker.report, args=(over,), daemon=True).start()
    sys.stdin.read()
    over.set()
    server.stop(0)


if __name__ == "__main__":
    main()
