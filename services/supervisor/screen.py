"""What the supervisor prints, and the terminal that it prints to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from services.supervisor.plan import NOTIFICATION, ORDER, USER, Plan
from services.supervisor.process import Process


class Screen:
    """Prints to ``console``."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextlib.contextmanager
    def progress(self, processes: int) -> Iterator[Callable[[str], None]]:
        """Shows how far startup is: a spinner in a terminal, otherwise one line."""
        if self._console.is_terminal:
            with self._console.status("Starting") as status:
                yield status.update
        else:
            say(f"Starting {processes} processes")
            yield lambda _: None

    def ready(self, plan: Plan, processes: Sequence[Process], seconds: float) -> None:
        """Print what runs where, and commands to try."""
        table = Table(box=box.SIMPLE, pad_edge=False)
        rows = [
            (process.name, process.spec.address, str(process.pid), short(process.spec.log)) for process in processes
        ]
        for place, column in enumerate(("name", "address", "pid", "log")):
            # A narrow terminal shortens the log's path and nothing else.
            width = max(len(column), *(len(row[place]) for row in rows)) if column != "log" else None
            table.add_column(column, no_wrap=True, min_width=width, justify="right" if column == "pid" else "left")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)
        # Not through rich, which would wrap these lines: they are to be copied.
        for line in commands_to_try(plan):
            say(line)
        say(f"\nReady in {seconds:.1f} s. Ctrl-C drains and stops everything.")

    def draining(self) -> None:
        # On a new line, below the ^C that a terminal shows.
        say(f"{chr(10) if self._console.is_terminal else ''}Draining; press Ctrl-C again to kill")


def say(line: str) -> None:
    """Print a line; a closed terminal must not keep the shop from draining."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def commands_to_try(plan: Plan) -> list[str]:
    """grpcurl commands for each service, and a Python client."""
    address = {process.name: process.address for process in plan.processes()}
    # Another email each time, as users of earlier runs are kept.
    ada = json.dumps({"name": "Ada", "email": f"ada-{uuid.uuid4().hex[:4]}@example.com"})
    return [
        f"grpcurl -plaintext -d '{ada}' {address['user-1']} {USER}/CreateUser",
        f"grpcurl -plaintext -d '{{\"page_size\": 5}}' {address['order-1']} {ORDER}/ListOrders",
        f"grpcurl -plaintext -d '{{\"page_size\": 5}}' {address['notification-1']} {NOTIFICATION}/ListNotifications",
        "",
        f"{short(Path(sys.executable))} <<'EOF'",
        "import mesh",
        "from weft.user.v1 import user_pb2, user_pb2_grpc",
        f'channel = mesh.insecure_channel("mesh://{plan.registry}/{USER}")',
        "users = user_pb2_grpc.UserServiceStub(channel).ListUsers(user_pb2.ListUsersRequest())",
        "print(users)",
        "EOF",
    ]


def short(path: Path) -> str:
    """The path relative to the working folder, if it is inside."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@contextlib.contextmanager
def foreground() -> Iterator[None]:
    """Run in a foreground process group of our own, and give the terminal back at the end.

    Ctrl-C goes to the whole foreground group, so make would get it too, and fail with "Interrupt" even after a clean
    drain. A shell gives each job its own group in the same way. Does nothing without a terminal, or when the shell
    started this program directly.
    """
    try:
        before = os.tcgetpgrp(0)
        in_foreground = os.getpgrp() == before and os.getpid() != before
    except OSError:
        in_foreground = False
    if not in_foreground:
        yield
        return
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # lets a background group make itself the foreground one
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # make would not notice that this program stopped
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpgrp())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.tcsetpgrp(0, before)
