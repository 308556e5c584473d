"""Serving with asyncio: ``serve`` for a process, ``Server`` for a program that has other things to do as well."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import signal
import sys
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc  # type: ignore[import-untyped]

from mesh import context as mesh_context
from mesh import forking, lines, variables
from mesh.health import NOT_SERVING, SERVING, AioHealth
from mesh.listening import Listener
from mesh.policy.server.admission import Reason
from mesh.server import load_report
from mesh.server.handlers.gate import AioGate
from mesh.server.handlers.registrar import Recorder, Servicers
from mesh.server.handlers.scope import LOG, arriving
from mesh.server.handlers.wrap import wrap_aio
from mesh.server.lifecycle import BAD_START, SIGNALS, add_channelz, add_reflection, instances
from mesh.server.listening import advertised, listen, listening
from mesh.server.readiness import Readiness
from mesh.server.registration import Registration
from mesh.server.settings import ServerSettings
from mesh.server.thread_pool import ThreadPool
from mesh.tasks import keep_running

_AT_ONCE = 1.0
"""Seconds that a server gets to end when it is ended at once, or when its grace is over."""


class Server:
    """Servicers, served: with health, registration, deadlines, overload protection and a graceful end; and with
    reflection where the settings ask for it.

    ::

        async with Server([(add_UserServiceServicer_to_server, servicer)], settings) as server:
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
        self._server: grpc.aio.Server | None = None
        self._health = AioHealth()
        self._ended = asyncio.Event()
        self._registration: Registration | None = None
        self.gate = AioGate(self.settings.admission(), load_reports=self.settings.load_reports)
        self._pool = ThreadPool(self.settings.max_workers)
        self._starting: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen, and serve and register when it is ready: at once, or when ``settings.ready`` says so.

        Raises OSError when it can't listen there, RuntimeError in a forked child where no server can work
        (docs/forking.md).
        """
        forking.check(aio=True)
        settings = self.settings
        readiness = Readiness(settings.ready)
        server = grpc.aio.server(
            migration_thread_pool=self._pool,
            interceptors=list(settings.interceptors),
            options=settings.server_options(),
        )
        recorder = Recorder(
            server,
            lambda handler, method: wrap_aio(handler, method, self._pool, self.gate),
            self._arrived,
            settings.observer,
        )
        recorder.add(self._servicers)
        self.services = recorder.services
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        add_reflection((*self.services, health.SERVICE_NAME), server, settings)
        add_channelz(server, settings)
        load_report.add_to_server(self.gate.load, server, self._ended)
        self._listener = listen(server, settings)
        self.port = self._listener.port
        self.address = advertised(settings, self.port)
        lines.info(LOG, "listening", "listening on %s", listening(settings.listen, self.port, self.address))
        if readiness.given:
            self.gate.admission.close(Reason.STARTING)
        self._health.set(NOT_SERVING, self.services)
        await server.start()
        self._server = server
        if readiness.given:
            self._starting = asyncio.get_running_loop().create_task(
                keep_running("starting to serve", functools.partial(self._when_ready, readiness))
            )
        else:
            await self._serve()

    def _arrived(self, call: grpc.HandlerCallDetails) -> None:
        self.gate.arrivals += 1
        mesh_context.enter(arriving(call.invocation_metadata))

    async def _when_ready(self, readiness: Readiness) -> None:
        rng = random.Random()
        while not await readiness.ask(self._pool):  # noqa: ASYNC110 - nothing tells when that changes
            await asyncio.sleep(readiness.pace.delay(rng))
        self.gate.admission.open()
        await self._serve()

    async def _serve(self) -> None:
        settings = self.settings
        self._health.set(SERVING, self.services)
        lines.info(LOG, "serving", "serving %s on %s", ", ".join(self.services) or "no services", self.address)
        if settings.registry:
            self._registration = Registration(
                settings.registry, instances(self.services, settings, self.address), settings.lease_ttl
            )
            self._registration.start()

    async def drain(self) -> None:
        """Take no new work and finish the old: NOT_SERVING, deregister, let clients notice, and stop within the grace.

        Returns when it is done; called again, it waits for the first.
        """
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        await asyncio.shield(self._draining)

    async def _drain(self) -> None:
        if self._server is None:
            return
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        self._health.set(NOT_SERVING, self.services)
        if self._registration is not None:
            await self._registration.close(self.settings.deregister_timeout)
        await asyncio.sleep(self.settings.drain_wait)
        self.gate.admission.close(Reason.DRAINING)
        self._health.end_watches()
        self._ended.set()
        await self._stop(self.settings.grace)

    async def _stop(self, grace: float) -> None:
        assert self._server is not None
        stopping = asyncio.get_running_loop().create_task(self._server.stop(grace))
        for_streams = min(self.settings.stream_grace, grace)
        await asyncio.wait([stopping], timeout=for_streams)
        self.gate.end_streams()
        # A handler that won't be cancelled would hold this for ever.
        await asyncio.wait([stopping], timeout=grace - for_streams + _AT_ONCE)
        stopping.cancel()
        await asyncio.wait([stopping])
        self._listener.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def kill(self) -> None:
        """End at once: calls in flight are cancelled."""
        for task in (self._starting, self._draining):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        if self._registration is not None:
            await self._registration.close(0.0)
        if self._server is not None:
            await self._stop(0.0)

    async def wait(self) -> None:
        """Wait until the server has ended."""
        if self._server is not None:
            await self._server.wait_for_termination()

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.drain()

    def __repr__(self) -> str:
        return (
            f"<mesh.aio Server {', '.join(self.services) or 'not started'} on {self.address or self.settings.listen}>"
        )


async def serve(servicers: Servicers, settings: ServerSettings | None = None) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the process's exit code.

    ``servicers``: pairs of a generated ``add_XServicer_to_server`` and a servicer. ``settings``: from ``MESH_*`` in the
    environment without one.

    Returns 0 after a drain; 2, with one line on stderr, when the settings are wrong or the port is taken; 130 (SIGINT)
    or 143 (SIGTERM) when a second signal ended it at once.
    """
    # Before the server starts: a signal may come as soon as somebody can see that it does.
    with _signals() as signals:
        try:
            server = Server(servicers, settings)
            await server.start()
        except (ValueError, OSError) as error:
            print(error.strerror if isinstance(error, OSError) else error, file=sys.stderr)
            return BAD_START
        try:
            return await _until_signalled(server, signals)
        except asyncio.CancelledError:
            await server.drain()
            raise


async def _until_signalled(server: Server, signals: asyncio.Queue[int]) -> int:
    async with _Tasks() as tasks:
        await tasks.first(server.wait(), signals.get())
        drained, second = await tasks.first(server.drain(), signals.get())
        if drained.done():
            return 0
        await server.kill()
        return 128 + int(second.result())


class _Tasks:
    """Tasks that are awaited against each other; those still running are cancelled at the end."""

    def __init__(self) -> None:
        self._all: list[asyncio.Future[Any]] = []

    async def first(self, *coroutines: Coroutine[Any, Any, Any]) -> list[asyncio.Future[Any]]:
        """Wait until one of them is done; a task for each."""
        tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
        self._all += tasks
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks

    async def __aenter__(self) -> _Tasks:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._all:
            task.cancel()
        await asyncio.gather(*self._all, return_exceptions=True)


@contextlib.contextmanager
def _signals() -> Iterator[asyncio.Queue[int]]:
    """The numbers of the ending signals that arrive; none do outside of the main thread. The handlers are put back."""
    arrived: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS:
            loop.add_signal_handler(number, arrived.put_nowait, number)
    except (ValueError, RuntimeError, NotImplementedError):
        yield arrived
        return
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
