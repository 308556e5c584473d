"""Serving with threads: ``serve`` for a whole process, ``Server`` for a program that does other things as well."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import random
import signal
import threading
import time
from collections.abc import Iterator
from types import TracebackType

import grpc

from mesh import forking
from mesh.server import load_report
from mesh.server.handlers.admission import ThreadServerAdmission
from mesh.server.handlers.registrar import Servicers
from mesh.server.handlers.wrap import wrap_sync
from mesh.server.health import Health
from mesh.server.lifecycle import KILL_TIMEOUT, SIGNALS, START_ERRORS, ServerBase, report_bad_start
from mesh.server.readiness import Readiness
from mesh.server.registration import RegistrationThread
from mesh.server.settings import ServerSettings
from mesh.server.thread_pool import SPARE_THREADS, ThreadPool
from mesh.tasks import keep_running


class Server(ServerBase[grpc.Server, ThreadServerAdmission, None]):
    """Serves servicers, with health checking, registration, deadline propagation, overload protection and graceful
    shutdown; and with reflection if the settings enable it.

    ::

        with Server([(add_UserServiceServicer_to_server, servicer)], settings) as server:
            ...  # server.port

    Leaving the block drains the server. ``services``: their full names; ``port`` and ``address`` (the
    advertised one) are known once it has started. ``admission``: its load, and what it refused.
    """

    def __init__(self, servicers: Servicers, settings: ServerSettings | None = None) -> None:
        super().__init__(servicers, settings)
        workers = self.settings.max_workers
        self.admission = ThreadServerAdmission(
            self.settings.admission(workers), load_reports=self.settings.load_reports
        )
        self._pool = ThreadPool(workers + SPARE_THREADS)
        # For streams of the mesh's own services, which hold a thread each if an interceptor wraps them.
        self._stream_threads = threading.BoundedSemaphore(SPARE_THREADS // 2)
        self._health = Health(self._stream_threads)
        self._lock = threading.Lock()
        self._killed = threading.Event()
        self._drained = threading.Event()
        self._ending = threading.Event()
        self._draining = False

    def start(self) -> None:
        """Listen; serve and register once the server is ready: at once, or when ``settings.ready`` says so.

        Raises OSError if it can't listen, RuntimeError in a forked child where no server can work (docs/forking.md).
        """
        forking.check(aio=bool(self.settings.registry))  # leases are kept alive over grpc.aio
        server = grpc.server(
            self._pool,  # type: ignore[arg-type]  # any executor does
            interceptors=list(self.settings.interceptors),
            options=self.settings.server_options(),
        )
        load_report.add_to_threaded_server(self.admission.load_reporter, server, self._stream_threads)
        readiness = self._assemble(server, lambda handler, method: wrap_sync(handler, method, self.admission))
        server.start()
        self._server = server
        if readiness.given:
            threading.Thread(target=self._when_ready, args=(readiness,), name="mesh-ready", daemon=True).start()
        else:
            self._serve()

    def _when_ready(self, readiness: Readiness) -> None:
        asyncio.run(keep_running("starting to serve", functools.partial(self._serve_when_ready, readiness)))

    async def _serve_when_ready(self, readiness: Readiness) -> None:
        """Runs on a loop of its own, with nothing else on it, so it may block."""
        rng = random.Random()
        while not await readiness.ask():
            if self._ending.wait(readiness.backoff.delay(rng)):
                return
        self._serve()

    def _serve(self) -> None:
        with self._lock:
            if self._draining:
                return
            registration = self._begin_serving()
            if registration is not None:
                self._registration = RegistrationThread(registration)
                self._registration.start()

    def drain(self) -> None:
        """Stop accepting calls and finish those in flight: become NOT_SERVING, deregister, give clients time to notice,
        and stop within the grace period.

        Returns when that is done; a second call waits for the first.
        """
        with self._lock:
            first, self._draining = not self._draining, True
        self._ending.set()
        if not first:
            self._drained.wait()
            return
        try:
            if self._server is not None:
                for step, seconds in self._drain_steps():
                    step(seconds)
        finally:
            self._drained.set()

    def _wait_for_clients(self, seconds: float) -> None:
        self._killed.wait(seconds)

    def _stop(self, grace: float) -> None:
        assert self._server is not None
        if self._killed.is_set():
            grace = 0.0
        end = time.monotonic() + grace
        # Set when the calls have ended, not the handlers: one that doesn't end is left until the process exits.
        stopped = self._server.stop(grace)
        if not stopped.wait(min(self.settings.stream_grace, grace)):
            # Streams that still send end at their next message; those that wait, once no other call is left.
            self.admission.ending_streams = True
            while not stopped.wait(0.05) and time.monotonic() < end:
                if not self.admission.policy.in_flight:
                    self._server.stop(0.0)
                    break
            stopped.wait(max(0.0, end - time.monotonic()) + KILL_TIMEOUT)
        self._listener.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def kill(self) -> None:
        """Stop at once: calls in flight are cancelled."""
        self._killed.set()
        self._ending.set()
        if self._registration is not None:
            self._registration.close(0.0)
        if self._server is not None:
            self._stop(0.0)

    def wait(self) -> None:
        """Wait until the server has stopped."""
        if self._server is not None:
            self._server.wait_for_termination()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.drain()


def serve(servicers: Servicers, settings: ServerSettings | None = None) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the process's exit code.

    ``servicers``: pairs of a generated ``add_XServicer_to_server`` and a servicer. ``settings``: by default from the
    ``MESH_*`` variables in the environment.

    Returns 0 after a drain; 2, with one line on stderr, if the settings are invalid or the port is in use; 130 (SIGINT)
    or 143 (SIGTERM) if a second signal killed the server.
    """
    # What this thread waits for: a signal's number, or 0 once the server has drained.
    events: queue.SimpleQueue[int] = queue.SimpleQueue()

    def drain() -> None:
        server.drain()
        events.put(0)

    # Before the server starts: a signal may come as soon as anybody can see it start.
    with _signals(events):
        try:
            server = Server(servicers, settings)
            server.start()
        except START_ERRORS as error:
            return report_bad_start(error)
        _next(events)
        threading.Thread(target=drain, name="mesh-drain", daemon=True).start()
        number = _next(events)
        if number == 0:
            return 0
        server.kill()
        return 128 + number


def _next(events: queue.SimpleQueue[int]) -> int:
    """Wait for the next event, half a second at a time: Python runs a signal's handler between two bytecodes, so a
    signal that comes just before a wait would be handled only after it."""
    while True:
        with contextlib.suppress(queue.Empty):
            return events.get(timeout=0.5)


@contextlib.contextmanager
def _signals(events: queue.SimpleQueue[int]) -> Iterator[None]:
    """Put the numbers of the signals that arrive into ``events``. The previous handlers are restored at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    # A SimpleQueue's put may be interrupted by a signal handler that puts.
    before = {number: signal.signal(number, lambda number, _: events.put(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
