"""What tests share for ports, processes and waiting. The fixtures that hand it out are in conftest.py."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

HOST = "127.0.0.1"
REPOSITORY = Path(__file__).resolve().parent.parent

T = TypeVar("T")


def eventually(condition: Callable[[], T], within: float = 10.0, what: str = "") -> T:
    """What ``condition`` returns once that is true; AssertionError when it isn't ``within`` seconds."""
    end = time.monotonic() + within
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() >= end:
            raise AssertionError(f"not within {within:g} s: {what or getattr(condition, '__doc__', None) or condition}")
        time.sleep(0.01)  # between two looks; never a wait by the clock


def _ports() -> Iterator[int]:
    # Below the kernel's range for outgoing connections, so that none of those takes a port between its choice and its
    # use.
    least, most = 10000, 30000
    port = random.Random(os.getpid()).randrange(least, most)
    while True:
        port = port + 1 if port < most else least
        yield port


_candidates = _ports()


def _take(port: int) -> bool:
    """Take ``port`` for as long as this process lives, unless something listens on it or another test run took it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    # The port is for TCP; having it for UDP, too, tells the other runs (xdist's workers, another checkout's).
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mark:
        try:
            mark.bind((HOST, port))
        except OSError:
            return False
        mark.detach()  # open until the process ends
        return True


def free_ports(count: int) -> range:
    """``count`` ports in a row that nothing listens on; no two calls return the same, in any test run."""
    first, taken = 0, 0
    while taken < count:
        port = next(_candidates)
        if not _take(port):
            taken = 0
        elif taken and port == first + taken:
            taken += 1
        else:
            first, taken = port, 1
    return range(first, first + count)


class Process:
    """A running program, and all it has said so far (stdout and stderr in one)."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path) -> None:
        self.log = log
        self._arguments = arguments
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def wait_until(self, condition: Callable[[], T], within: float = 20.0, what: str = "") -> T:
        """What ``condition`` returns once that is true; fails at once, with what was said, when the program ends."""

        def met() -> T | None:
            result = condition()
            if not result and not self.running:
                raise AssertionError(f"{self!r} ended with {self._popen.returncode} before {what}:\n{self.said}")
            return result or None

        try:
            found = eventually(met, within, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self!r} said:\n{self.said}") from None
        assert found is not None
        return found

    def wait_for(self, text: str, within: float = 20.0) -> str:
        """All that the program said, once ``text`` is in it."""
        self.wait_until(lambda: text in self.said, within, f"it said {text!r}")
        return self.said

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the program alone."""
        self._popen.send_signal(number)

    def wait(self, within: float = 20.0) -> int:
        """The exit code, negative for a signal."""
        try:
            return self._popen.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self!r} still runs after {within:g} s; it said:\n{self.said}") from None

    def end(self, number: signal.Signals = signal.SIGTERM, within: float = 20.0) -> int:
        """Send a signal and return the exit code."""
        self.send(number)
        return self.wait(within)

    def kill(self) -> None:
        """Kill the program and whatever still runs in its group."""
        try:
            os.killpg(self._popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._popen.wait()

    def __repr__(self) -> str:
        return f"<Process {' '.join(self._arguments)} pid={self.pid}>"


class Spawn:
    """Starts programs for one test, and kills those that are left at its end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[Process] = []

    def __call__(
        self, *arguments: str | Path, environment: Mapping[str, str] | None = None, cwd: Path = REPOSITORY
    ) -> Process:
        """Start a program."""
        log = self._folder / f"process-{len(self._processes) + 1}.log"
        process = Process([str(argument) for argument in arguments], environment or {}, cwd, log)
        self._processes.append(process)
        return process

    def python(
        self, *arguments: str | Path, environment: Mapping[str, str] | None = None, cwd: Path = REPOSITORY
    ) -> Process:
        """Start this Python: ``spawn.python("-m", "services.user", environment={...})``."""
        return self(sys.executable, *arguments, environment=environment, cwd=cwd)

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._processes:
            process.kill()
