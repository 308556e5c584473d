"""Serving with threads: ``serve`` for a process, ``Server`` for a program that has other things to do as well."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

import grpc
from grpc_health.v1 import health, health_pb2_grpc  # type: ignore[import-untyped]

from mesh import context as mesh_context
from mesh import forking, lines, variables
from mesh.health import NOT_SERVING, SERVING
from mesh.listening import Listener
from mesh.policy.server.admission import Reason
from mesh.server import load_report
from mesh.server.handlers.gate import ThreadGate
from mesh.server.handlers.registrar import Recorder, Servicers
from mesh.server.handlers.scope import LOG, arriving
from mesh.server.handlers.wrap import wrap_sync
from mesh.server.health import Health
from mesh.server.lifecycle import BAD_START, SIGNALS, add_channelz, add_reflection, instances
from mesh.server.listening import advertised, listen, listening
from mesh.server.readiness import Readiness
from mesh.server.registration import Registration, RegistrationThread
from mesh.server.settings import ServerSettings
from mesh.server.thread_pool import SPARE, ThreadPool
from mesh.tasks import keep_running

_AT_ONCE = 1.0
"""Seconds that a server gets to end when it is ended at once, or when its grace is over."""


class Server:
    """Servicers, served: with health, registration, deadlines, overload protection and a graceful end; and with
    reflection where the settings ask for it.

    ::

        with Server([(add_UserServiceServicer_to_server, servicer)], settings) as server:
            ...  # server.port

    Leaving the block drains. ``services``: their full names; ``port`` and ``address`` (advertised) are known once
    it is started. ``gate`` tells of its load and of what was refused.
    """

    def __init__(self, servicers: Servicers, settings: ServerSettings | None = None) -> None:
        variables.warn_once()
        self.settings = settings if settings is not None else ServerSettings.from_env()
        self.services: tuple[str, ...] = ()
        self.port = 0
        self.address = ""
        self._servicers = servicers
        self._listener = Listener()
        self._server: grpc.Server | None = None
        # Streams of ours that hold a thread each, because an interceptor stands around them.
        self._held = threading.BoundedSemaphore(SPARE // 2)
        self._health = Health(self._held)
        self._registration: RegistrationThread | None = None
        self.gate = ThreadGate(
            self.settings.admission(self.settings.max_workers), load_reports=self.settings.load_reports
        )
        self._pool = ThreadPool(self.settings.max_workers + SPARE)
        self._lock = threading.Lock()
        self._killed = threading.Event()
        self._drained = threading.Event()
        self._ending = threading.Event()
        self._draining = False

    def start(self) -> None:
        """Listen, and serve and register when it is ready: at once, or when ``settings.ready`` says so.

        Raises OSError when it can't listen there, RuntimeError in a forked child where no server can work
        (docs/forking.md).
        """
        forking.check(aio=bool(self.settings.registry))  # the registration's leases are kept over grpc.aio
        settings = self.settings
        readiness = Readiness(settings.ready)
        server = grpc.server(
            self._pool,  # type: ignore[arg-type]  # any executor does
            interceptors=list(settings.interceptors),
            options=settings.server_options(),
        )
        recorder = Recorder(
            server, lambda handler, method: wrap_sync(handler, method, self.gate), self._arrived, settings.observer
        )
        recorder.add(self._servicers)
        self.services = recorder.services
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        add_reflection((*self.services, health.SERVICE_NAME), server, settings)
        add_channelz(server, settings)
        load_report.add_to_threaded_server(self.gate.load, server, self._held)
        self._listener = listen(server, settings)
        self.port = self._listener.port
        self.address = advertised(settings, self.port)
        lines.info(LOG, "listening", "listening on %s", listening(settings.listen, self.port, self.address))
        if readiness.given:
            self.gate.admission.close(Reason.STARTING)
        self._health.set(NOT_SERVING, self.services)
        server.start()
        self._server = server
        if readiness.given:
            threading.Thread(target=self._when_ready, args=(readiness,), name="mesh-ready", daemon=True).start()
        else:
            self._serve()

    def _arrived(self, call: grpc.HandlerCallDetails) -> None:
        self.gate.arrivals += 1
        mesh_context.enter(arriving(call.invocation_metadata))

    def _when_ready(self, readiness: Readiness) -> None:
        asyncio.run(keep_running("starting to serve", functools.partial(self._serve_when_ready, readiness)))

    async def _serve_when_ready(self, readiness: Readiness) -> None:
        """On a loop of its own, where nothing else runs, so that it may block."""
        rng = random.Random()
        while not await readiness.ask():
            if self._ending.wait(readiness.pace.delay(rng)):
                return
        self._serve()

    def _serve(self) -> None:
        settings = self.settings
        with self._lock:
            if self._draining:
                return
            self.gate.admission.open()
            self._health.set(SERVING, self.services)
            if settings.registry:
                told = instances(self.services, settings, self.address)
                self._registration = RegistrationThread(Registration(settings.registry, told, settings.lease_ttl))
                self._registration.start()
        lines.info(LOG, "serving", "serving %s on %s", ", ".join(self.services) or "no services", self.address)

    def drain(self) -> None:
        """Take no new work and finish the old: NOT_SERVING, deregister, let clients notice, and stop within the grace.

        Returns when it is done; called again, it waits for the first.
        """
        with self._lock:
            first, self._draining = not self._draining, True
        self._ending.set()
        if not first:
            self._drained.wait()
            return
        try:
            if self._server is None:
                return
            self._health.set(NOT_SERVING, self.services)
            if self._registration is not None:
                self._registration.close(self.settings.deregister_timeout)
            self._killed.wait(self.settings.drain_wait)
            self.gate.admission.close(Reason.DRAINING)
            self._health.end_watches()
            self._stop(0.0 if self._killed.is_set() else self.settings.grace)
        finally:
            self._drained.set()

    def _stop(self, grace: float) -> None:
        assert self._server is not None
        end = time.monotonic() + grace
        # Done when the calls are, not the handlers: one that doesn't end is left to the process's end.
        stopped = self._server.stop(grace)
        if not stopped.wait(min(self.settings.stream_grace, grace)):
            # Streams that still send end at their next message; those that wait, when no call is left but them.
            self.gate.ending = True
            while not stopped.wait(0.05) and time.monotonic() < end:
                if not self.gate.admission.in_flight:
                    self._server.stop(0.0)
                    break
            stopped.wait(max(0.0, end - time.monotonic()) + _AT_ONCE)
        self._listener.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def kill(self) -> None:
        """End at once: calls in flight are cancelled."""
        self._killed.set()
        self._ending.set()
        if self._registration is not None:
            self._registration.close(0.0)
        if self._server is not None:
            self._stop(0.0)

    def wait(self) -> None:
        """Wait until the server has ended."""
        if self._server is not None:
            self._server.wait_for_termination()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.drain()

    def __repr__(self) -> str:
        return f"<mesh Server {', '.join(self.services) or 'not started'} on {self.address or self.settings.listen}>"


def serve(servicers: Servicers, settings: ServerSettings | None = None) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the process's exit code.

    ``servicers``: pairs of a generated ``add_XServicer_to_server`` and a servicer. ``settings``: from ``MESH_*`` in the
    environment without one.

    Returns 0 after a drain; 2, with one line on stderr, when the settings are wrong or the port is taken; 130 (SIGINT)
    or 143 (SIGTERM) when a second signal ended it at once.
    """
    # What this thread waits for: the number of a signal, or 0 when the server has ended.
    events: queue.SimpleQueue[int] = queue.SimpleQueue()

    def drain() -> None:
        server.drain()
        events.put(0)

    # Before the server starts: a signal may come as soon as somebody can see that it does.
    with _signals(events):
        try:
            server = Server(servicers, settings)
            server.start()
        except (ValueError, OSError) as error:
            print(error.strerror if isinstance(error, OSError) else error, file=sys.stderr)
            return BAD_START
        _next(events)
        threading.Thread(target=drain, name="mesh-drain", daemon=True).start()
        number = _next(events)
        if number == 0:
            return 0
        server.kill()
        return 128 + number


def _next(events: queue.SimpleQueue[int]) -> int:
    """Wait for the next event, a little at a time: Python runs a signal's handler between two steps of a program, and
    one that comes just before this waits would be heard when the wait is over."""
    while True:
        with contextlib.suppress(queue.Empty):
            return events.get(timeout=0.5)


@contextlib.contextmanager
def _signals(events: queue.SimpleQueue[int]) -> Iterator[None]:
    """Put the numbers of the ending signals that arrive into ``events``. The handlers are put back at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python tells only the main thread of signals
        return
    # A SimpleQueue may be put into by a signal handler that interrupts it.
    before = {number: signal.signal(number, lambda number, _: events.put(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
