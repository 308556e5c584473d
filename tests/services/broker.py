"""A real NATS server for one test: on its own port, with a store that outlives its process."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from tests.processes import HOST, Process, Spawn, free_ports

NATS_SERVER = Path(sys.executable).with_name("nats-server")


class Broker:
    """Starts, kills and restarts a broker at ``url``."""

    def __init__(self, spawn: Spawn, store: Path) -> None:
        self.port = free_ports(1)[0]
        self.url = f"nats://{HOST}:{self.port}"
        self._spawn = spawn
        self._store = store
        self._process: Process | None = None

    def start(self) -> None:
        """Start it, and return when it listens."""
        self._process = self._spawn(
            NATS_SERVER, "-a", HOST, "-p", str(self.port), "-js", "-sd", self._store, "-l", "/dev/stdout"
        )
        self._process.wait_for("Server is ready")

    def kill(self) -> None:
        """Kill it."""
        assert self._process is not None
        assert self._process.end(signal.SIGKILL) == -signal.SIGKILL
