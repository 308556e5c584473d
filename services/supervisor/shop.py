"""The running shop: starts all processes, restarts those that exit, and drains them in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Iterator
from typing import Any

import grpc
import grpc.aio

from mesh import files
from mesh.listening import check_free
from services.supervisor import data
from services.supervisor.plan import DRAIN_ORDER, CannotRunError, Plan, ProcessSpec
from services.supervisor.process import CHANNEL_OPTIONS, Process, describe_exit
from services.supervisor.screen import Screen, say, short
from weft.mesh.v1 import registry_pb2, registry_pb2_grpc

READY_TIMEOUT = 60.0
"""Seconds in which the shop must get ready."""
DRAIN_TIMEOUT = 15.0
"""Seconds that a process gets to exit after SIGTERM, before SIGKILL."""
FIRST_BACKOFF, MAX_BACKOFF = 0.25, 10.0
"""Seconds before the restart of a process that exited before it was ready; doubled with each further one."""

CANNOT_RUN = 2
"""The exit code of a process that would fail in the same way if it were restarted."""


class Shop:
    """Runs the processes of ``plan``."""

    def __init__(self, plan: Plan, screen: Screen) -> None:
        self._plan = plan
        self._specs = plan.processes()
        self._processes = [Process(spec) for spec in self._specs]
        self._screen = screen
        self._supervisors: dict[str, asyncio.Task[None]] = {}
        self._ready = False
        self._draining = False
        self._kill = asyncio.Event()
        self._lock = -1  # the file descriptor that locks the data folder

    async def run(self) -> int:
        """Run until a signal arrives; returns the exit code."""
        stop = asyncio.Event()

        def on_signal() -> None:
            if stop.is_set():
                self._kill.set()
            stop.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, on_signal)
        began = time.monotonic()
        with self._locked_data():
            return await self._run(stop, began)

    @contextlib.contextmanager
    def _locked_data(self) -> Iterator[None]:
        folder = self._plan.data
        with contextlib.ExitStack() as stack:
            try:
                # The processes inherit the lock: while draining they may outlive the supervisor.
                self._lock = stack.enter_context(data.lock(folder))
            except files.InUseError as error:
                command = self._plan.command(data=f"{folder}-2", other_ports=self._port_in_use() is not None)
                by = f"another mesh (pid {error.holder or 'unknown'})"
                raise CannotRunError(f"{folder} is in use by {by}; to run a second one: {command}") from None
            yield

    async def _run(self, stop: asyncio.Event, began: float) -> int:
        self._check_ports()
        data.prepare(self._plan.data, (spec.log for spec in self._specs))
        starting = asyncio.create_task(self._start())
        try:
            await _first(starting, asyncio.create_task(stop.wait()))
            if not stop.is_set():
                starting.result()
                self._ready = True
                self._screen.ready(self._plan, self._processes, time.monotonic() - began)
                await stop.wait()
            self._screen.draining()
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await self._drain()
        say("All processes stopped")
        return 0

    def _check_ports(self) -> None:
        # Before anything starts: gRPC's servers would otherwise share a port with another mesh (SO_REUSEPORT).
        in_use = self._port_in_use()
        if in_use is not None:
            spec, reason = in_use
            command = self._plan.command(data=self._plan.data, other_ports=True)
            raise CannotRunError(f"{spec.name} can't listen on {spec.address}: {reason}; to use other ports: {command}")

    def _port_in_use(self) -> tuple[ProcessSpec, str] | None:
        """The first process that can't listen, and why."""
        for spec in self._specs:
            try:
                check_free(spec.address)
            except OSError as error:
                return spec, os.strerror(error.errno or 0).lower()
        return None

    async def _start(self) -> None:
        """Start all processes at once; return when all are ready and registered."""
        waiting: dict[asyncio.Task[Any], Process] = {
            asyncio.create_task(process.ready.wait()): process for process in self._processes
        }
        for process in self._processes:
            self._supervisors[process.name] = asyncio.create_task(self._supervise(process), name=process.name)
        pending: set[asyncio.Task[Any]] = set(waiting)
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                with self._screen.progress(len(self._processes)) as progress:
                    while pending:
                        progress(f"Starting: {', '.join(waiting[task].name for task in waiting if task in pending)}")
                        done, _ = await asyncio.wait(
                            {*pending, *self._supervisors.values()}, return_when=asyncio.FIRST_COMPLETED
                        )
                        for task in done:
                            task.result()  # a supervising task ends here only by raising
                        pending -= done
                    progress("Starting: waiting for registrations")
                    await self._wait_registered()
        except TimeoutError:
            late = [f"{waiting[task].name} ({waiting[task].spec.log})" for task in waiting if task in pending]
            raise TimeoutError(f"not ready within {READY_TIMEOUT:g} s: {', '.join(late) or 'registrations'}") from None
        finally:
            for task in pending:
                task.cancel()

    async def _supervise(self, process: Process) -> None:
        """Start the process, and restart it whenever it exits. Raises CannotRunError when it can't start at all."""
        failures = 0
        with process.spec.log.open("ab") as log:
            while True:
                await process.start(log, self._lock)
                watching = asyncio.create_task(self._watch_ready(process, restarted=self._ready))
                try:
                    code = await process.wait()
                finally:
                    watching.cancel()
                if self._draining:
                    return
                if code == CANNOT_RUN and not self._ready:
                    raise CannotRunError(f"{process.name}: {process.last_line()}")
                failures = 0 if process.ready.is_set() else failures + 1
                delay = min(FIRST_BACKOFF * 2.0 ** (failures - 1), MAX_BACKOFF) if failures else 0.0
                when = f"in {delay:g} s" if delay else "now"
                why = f": {process.last_line()}" if code > 0 else ""
                say(f"{process.name} {describe_exit(code)}{why}; restarting {when} (log: {short(process.spec.log)})")
                await asyncio.sleep(delay)

    async def _watch_ready(self, process: Process, restarted: bool) -> None:
        """Note when the process is ready; say so if it was ``restarted``."""
        await process.wait_ready()
        process.ready.set()
        if restarted:
            say(f"{process.name} is ready again (pid {process.pid})")

    async def _wait_registered(self) -> None:
        """Return once the registry lists every replica."""
        expected = {(spec.service, spec.address) for spec in self._specs if spec.service}
        async with grpc.aio.insecure_channel(self._plan.registry, CHANNEL_OPTIONS) as channel:
            registry = registry_pb2_grpc.RegistryStub(channel)
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    response = await registry.ListInstances(
                        registry_pb2.ListInstancesRequest(), timeout=5, wait_for_ready=True
                    )
                    if expected <= {(instance.service, instance.address) for instance in response.instances}:
                        return
                await asyncio.sleep(0.02)

    async def _drain(self) -> None:
        """Stop all processes in DRAIN_ORDER; each group gets DRAIN_TIMEOUT, or until ``_kill`` is set."""
        self._draining = True
        for prefix in DRAIN_ORDER:
            group = [process for process in self._processes if process.name.startswith(prefix)]
            supervisors = [self._supervisors[process.name] for process in group if process.name in self._supervisors]
            if not supervisors:
                continue
            for process in group:
                if process.running:
                    process.signal(signal.SIGTERM)
                else:
                    self._supervisors[process.name].cancel()  # it waits to restart the process
            exited = asyncio.gather(*supervisors, return_exceptions=True)
            await _first(exited, asyncio.create_task(self._kill.wait()), within=DRAIN_TIMEOUT)
            if not exited.done():
                for process in group:
                    if process.running:
                        say(f"Killing {process.name}")
                        process.signal(signal.SIGKILL)
                await exited


async def _first(*awaitables: Awaitable[object], within: float | None = None) -> None:
    """Wait until one is done, or for ``within`` seconds; then cancel the last."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(tasks, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    tasks[-1].cancel()
