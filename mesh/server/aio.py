"""Serving with asyncio: ``serve`` for a whole process, ``Server`` for a program that does other things as well."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import signal
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import Any

import grpc

from mesh import forking
from mesh.health import AioHealth
from mesh.server import load_report
from mesh.server.handlers.admission import AioServerAdmission
from mesh.server.handlers.registrar import Servicers
from mesh.server.handlers.wrap import wrap_aio
from mesh.server.lifecycle import KILL_TIMEOUT, SIGNALS, START_ERRORS, ServerBase, report_bad_start
from mesh.server.readiness import Readiness
from mesh.server.settings import ServerSettings
from mesh.server.thread_pool import ThreadPool
from mesh.tasks import keep_running


class Server(ServerBase[grpc.aio.Server, AioServerAdmission, Coroutine[Any, Any, None]]):
    """Serves servicers, with health checking, registration, deadline propagation, overload protection and graceful
    shutdown; and with reflection if the settings enable it.

    ::

        async with Server([(add_UserServiceServicer_to_server, servicer)], settings) as server:
            ...  # server.port

    Leaving the block drains the server. ``services``: their full names; ``port`` and ``address`` (the
    advertised one) are known once it has started. ``admission``: its load, and what it refused.
    """

    _KIND = "mesh.aio"

    def __init__(self, servicers: Servicers, settings: ServerSettings | None = None) -> None:
        super().__init__(servicers, settings)
        self.admission = AioServerAdmission(self.settings.admission(), load_reports=self.settings.load_reports)
        self._pool = ThreadPool(self.settings.max_workers)
        self._health = AioHealth()
        self._ended = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen; serve and register once the server is ready: at once, or when ``settings.ready`` says so.

        Raises OSError if it can't listen, RuntimeError in a forked child where no server can work (docs/forking.md).
        """
        forking.check(aio=True)
        server = grpc.aio.server(
            migration_thread_pool=self._pool,
            interceptors=list(self.settings.interceptors),
            options=self.settings.server_options(),
        )
        load_report.add_to_server(self.admission.load_reporter, server, self._ended)
        readiness = self._assemble(
            server, lambda handler, method: wrap_aio(handler, method, self._pool, self.admission)
        )
        await server.start()
        self._server = server
        if readiness.given:
            self._starting = asyncio.get_running_loop().create_task(
                keep_running("starting to serve", functools.partial(self._when_ready, readiness))
            )
        else:
            self._serve()

    async def _when_ready(self, readiness: Readiness) -> None:
        rng = random.Random()
        while not await readiness.ask(self._pool):  # noqa: ASYNC110 - nothing reports when that changes
            await asyncio.sleep(readiness.backoff.delay(rng))
        self._serve()

    def _serve(self) -> None:
        self._registration = registration = self._begin_serving()
        if registration is not None:
            registration.start()

    async def drain(self) -> None:
        """Stop accepting calls and finish those in flight: become NOT_SERVING, deregister, give clients time to notice,
        and stop within the grace period.

        Returns when that is done; a second call waits for the first.
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
        for step, seconds in self._drain_steps():
            await step(seconds)

    async def _wait_for_clients(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def _end_own_streams(self) -> None:
        super()._end_own_streams()
        self._ended.set()

    async def _stop(self, grace: float) -> None:
        assert self._server is not None
        stopping = asyncio.get_running_loop().create_task(self._server.stop(grace))
        for_streams = min(self.settings.stream_grace, grace)
        await asyncio.wait([stopping], timeout=for_streams)
        self.admission.end_streams()
        # A handler that ignores its cancellation would block this forever.
        await asyncio.wait([stopping], timeout=grace - for_streams + KILL_TIMEOUT)
        stopping.cancel()
        await asyncio.wait([stopping])
        self._listener.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def kill(self) -> None:
        """Stop at once: calls in flight are cancelled."""
        for task in (self._starting, self._draining):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        if self._registration is not None:
            await self._registration.close(0.0)
        if self._server is not None:
            await self._stop(0.0)

    async def wait(self) -> None:
        """Wait until the server has stopped."""
        if self._server is not None:
            await self._server.wait_for_termination()

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.drain()


async def serve(servicers: Servicers, settings: ServerSettings | None = None) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the process's exit code.

    ``servicers``: pairs of a generated ``add_XServicer_to_server`` and a servicer. ``settings``: by default from the
    ``MESH_*`` variables in the environment.

    Returns 0 after a drain; 2, with one line on stderr, if the settings are invalid or the port is in use; 130 (SIGINT)
    or 143 (SIGTERM) if a second signal killed the server.
    """
    # Before the server starts: a signal may come as soon as anybody can see it start.
    with _signals() as signals:
        try:
            server = Server(servicers, settings)
            await server.start()
        except START_ERRORS as error:
            return report_bad_start(error)
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
    """Tasks that race each other; those still running at the end are cancelled."""

    def __init__(self) -> None:
        self._all: list[asyncio.Future[Any]] = []

    async def first(self, *coroutines: Coroutine[Any, Any, Any]) -> list[asyncio.Future[Any]]:
        """Wait until one of them is done. Returns a task for each."""
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
    """The numbers of the signals that arrive; none outside of the main thread. The previous handlers are restored."""
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
