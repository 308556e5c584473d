"""One process of the shop: starts it, signals it, and finds out when it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import IO

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from services.supervisor.plan import BROKER, HOST, ProcessSpec

PR_SET_PDEATHSIG = 1  # from linux/prctl.h

CHANNEL_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
"""For channels to processes that are still starting."""

_LOG_TAIL = 64 * 1024  # bytes at the end of a log in which its last line is looked for


class Process:
    """One process of the plan, across its restarts."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.ready = asyncio.Event()
        """Set once the current process has been ready."""
        self._process: asyncio.subprocess.Process | None = None
        self._log_start = 0

    async def start(self, log: IO[bytes], lock: int) -> None:
        """Start the process; its output goes to ``log``. It holds the ``lock`` on the data folder while it lives."""
        self._log_start = log.seek(0, os.SEEK_END)
        self.ready.clear()
        self._process = await asyncio.create_subprocess_exec(
            *self.spec.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **self.spec.environment},
            # Not in the terminal's process group: Ctrl-C reaches only the supervisor, which stops processes in order.
            process_group=0,
            pass_fds=(lock,),
            preexec_fn=_stop_with_parent(os.getpid()),
        )

    async def wait(self) -> int:
        """Wait until the process has exited; returns its exit code."""
        assert self._process is not None
        return await self._process.wait()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and its children, unless it has exited."""
        if self._process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def last_line(self) -> str:
        """The last line that the current process logged."""
        with self.spec.log.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - _LOG_TAIL))
            lines = log.read().decode(errors="replace").strip().splitlines()
        if not lines:
            return "no output"
        try:
            return str(json.loads(lines[-1])["event"])
        except (ValueError, KeyError, TypeError):
            return lines[-1].strip()

    async def wait_ready(self) -> None:
        """Return once the process answers SERVING or, for the broker, greets clients."""
        if self.name == BROKER:
            await _wait_for_greeting(self.spec.port)
            return
        async with grpc.aio.insecure_channel(self.spec.address, CHANNEL_OPTIONS) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    response = await health.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
                    if response.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                await asyncio.sleep(0.02)

    def __repr__(self) -> str:
        return f"<Process {self.name} {self.spec.address} pid={self.pid}>"


def describe_exit(code: int) -> str:
    """How a process ended, in words."""
    return f"exited with code {code}" if code >= 0 else f"killed ({signal.Signals(-code).name})"


async def _wait_for_greeting(port: int) -> None:
    """Return once NATS serves: it then sends INFO on each new connection."""
    while True:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection(HOST, port)
                try:
                    if (await reader.readline()).startswith(b"INFO "):
                        return
                finally:
                    writer.close()
        await asyncio.sleep(0.02)


def _stop_with_parent(parent: int) -> Callable[[], None]:
    """A ``preexec_fn`` that has the kernel send SIGTERM when ``parent`` dies, even by SIGKILL (Linux only)."""
    if sys.platform != "linux":
        return lambda: None
    libc = ctypes.CDLL(None)  # loaded here: little is safe between fork and exec

    def set_parent_death_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before prctl
            os._exit(1)

    return set_parent_death_signal
