"""``make run-mesh`` as its user sees it: what it prints works, the examples run, and it stops when signalled."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import HOST, REPOSITORY, Spawn, eventually, free_ports

pytestmark = pytest.mark.slow

BUF = Path(sys.executable).with_name("buf")


TOLD = """
import uuid
import mesh
from weft.notification.v1 import notification_pb2, notification_pb2_grpc
from weft.order.v1 import order_pb2, order_pb2_grpc
from weft.user.v1 import user_pb2, user_pb2_grpc

with (
    mesh.insecure_channel("mesh:///weft.user.v1.UserService") as users,
    mesh.insecure_channel("mesh:///weft.order.v1.OrderService") as orders,
    mesh.insecure_channel("mesh:///weft.notification.v1.NotificationService") as notifications,
):
    name = uuid.uuid4().hex
    user = user_pb2_grpc.UserServiceStub(users).CreateUser(
        user_pb2.CreateUserRequest(name=name, email=f"{name}@example.com"), timeout=10
    ).user
    watch = notification_pb2_grpc.NotificationServiceStub(notifications).WatchNotifications(
        notification_pb2.WatchNotificationsRequest(user_id=user.id), timeout=20
    )
    assert next(watch).resume_token
    order = order_pb2_grpc.OrderServiceStub(orders).CreateOrder(
        order_pb2.CreateOrderRequest(
            request_id=str(uuid.uuid4()), user_id=user.id, items=[order_pb2.OrderItem(sku="DRUM", quantity=1)]
        ),
        timeout=10,
    ).order
    told = next(watch).notification
    assert (told.order_id, told.kind) == (order.id, notification_pb2.Notification.KIND_ORDER_CREATED), told
    watch.cancel()
"""

TAKEN = """
import grpc
import mesh
from weft.user.v1 import user_pb2, user_pb2_grpc

with mesh.insecure_channel("mesh:///weft.user.v1.UserService") as channel:
    users = user_pb2_grpc.UserServiceStub(channel)
    users.CreateUser(user_pb2.CreateUserRequest(name="Ada", email="ada.lovelace@example.com"), timeout=10)
    try:
        users.CreateUser(user_pb2.CreateUserRequest(name="Ada", email="ada.lovelace@example.com"), timeout=10)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS, error
    try:
        users.GetUser(user_pb2.GetUserRequest(id="ada.lovelace@example.com"), timeout=10)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
"""


class Mesh:
    """A shop started like ``make run-mesh``, on its own ports."""

    def __init__(self, spawn: Spawn, data: Path, users: int = 3, orders: int = 2, notifications: int = 2) -> None:
        self.port = free_ports(32)[0]
        self.registry = f"{HOST}:{self.port}"
        self.data = data
        self.process = spawn.python(
            *("-m", "services", "--port", str(self.port), "--data", data),
            *("--users", str(users), "--orders", str(orders), "--notifications", str(notifications)),
        )

    def ready(self) -> str:
        """Its output until it is ready."""
        return self.process.wait_for("Ready in", within=40)

    def pids(self) -> dict[str, int]:
        """The pids by process name, from the table."""
        rows = re.findall(rf"^ *([a-z]+(?:-\d+)?) +{re.escape(HOST)}:\d+ +(\d+)", self.process.said, re.MULTILINE)
        return {name: int(pid) for name, pid in rows}

    def run(self, *command: str, input: str | None = None) -> str:
        done = subprocess.run(
            command,
            input=input,
            capture_output=True,
            text=True,
            timeout=30,
            cwd=REPOSITORY,
            env={"MESH_REGISTRY": self.registry, "PYTHONWARNINGS": "error"},
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.process.said
        return done.stdout


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One running shop for the tests that only call it."""
    folder = tmp_path_factory.mktemp("shop")
    spawn = Spawn(folder)
    mesh = Mesh(spawn, folder / "data")
    try:
        mesh.ready()
        yield mesh
    finally:
        if mesh.process.running:
            mesh.process.end()
        spawn.close()


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie counts, as its parent has only to reap it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class TestWhatItPrints:
    def test_a_table_of_what_runs_where(self, shop: Mesh) -> None:
        services = ["user-1", "user-2", "user-3", "order-1", "order-2", "notification-1", "notification-2"]
        assert list(shop.pids()) == ["registry", "nats", *services]
        said = shop.process.said
        for offset in (0, 1, 2, 3, 11, 12, 21, 22, 31):
            assert f"{HOST}:{shop.port + offset} " in said

    def test_its_logs_say_where_each_listens_and_is_registered_and_know_every_variable(self, shop: Mesh) -> None:
        for name in ("user-1", "order-2", "notification-1"):
            log = (shop.data / "logs" / f"{name}.log").read_text()
            events = [json.loads(line) for line in log.splitlines()]
            said = [event["event"] for event in events if event["logger"] == "mesh.server" and event["level"] == "info"]
            address = said[0].removeprefix("listening on ")
            assert f" {address} " in shop.process.said
            assert f"registered at {shop.registry} as {name}: " in "\n".join(said)
            assert "unknown environment variable" not in log

    def test_the_grpcurl_lines_work(self, shop: Mesh) -> None:
        lines = [line for line in shop.process.said.splitlines() if line.startswith("grpcurl ")]
        assert len(lines) == 3
        for line in lines:
            grpcurl, plaintext, d, data, address, method = shlex.split(line)
            assert (grpcurl, plaintext, d) == ("grpcurl", "-plaintext", "-d")
            # buf replaces grpcurl: it gets the schema by reflection, too.
            answer = self._curl(shop, data, f"http://{address}/{method}")
            assert "ada" in answer if "CreateUser" in method else answer.startswith("{")

    def _curl(self, shop: Mesh, data: str, url: str) -> str:
        return shop.run(str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", data, url)

    def test_the_python_client_works_and_has_five_lines(self, shop: Mesh) -> None:
        match = re.search(r"^\S+python\S* <<'EOF'\n(?P<code>.*?)^EOF$", shop.process.said, re.MULTILINE | re.DOTALL)
        assert match is not None
        assert match["code"].count("\n") == 5
        shop.run(sys.executable, "-", input=match["code"])

    def test_the_readmes_program_prints_what_the_readme_says(self, shop: Mesh) -> None:
        code, output = re.findall(
            r"^```(?:python|console)\n(import.*?|/weft.*?)^```$",
            (REPOSITORY / "README.md").read_text(),
            re.MULTILINE | re.DOTALL,
        )
        said = shop.run(sys.executable, "-", input=code.replace("127.0.0.1:50050", shop.registry))
        numbers = re.compile(r"127\.0\.0\.1:\d+|\d+\.\d ms")  # ports and times differ
        assert numbers.sub("N", said) == numbers.sub("N", output)

    def test_a_user_is_notified_of_an_order(self, shop: Mesh) -> None:
        shop.run(sys.executable, "-c", TOLD)

    def test_a_load_runs_against_it_and_shows_its_statistics(self, shop: Mesh) -> None:
        said = shop.run(sys.executable, "-m", "services.load", "--rate", "20", "--for", "2", "--seed", "6")
        rows = dict(re.findall(r"^ +([a-z ]+?) +(\d+) ", said, re.MULTILINE))
        assert {"create order", "get order", "notification delay"} <= rows.keys()
        assert int(rows["notification delay"]) > 0

    @pytest.mark.parametrize("example", sorted(REPOSITORY.glob("examples/*.py")), ids=lambda path: path.stem)
    def test_each_example_runs(self, shop: Mesh, example: Path) -> None:
        assert shop.run(sys.executable, "-W", "error", str(example))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_drains_everything_and_exits_with_0(spawn: Spawn, tmp_path: Path, number: signal.Signals) -> None:
    mesh = Mesh(spawn, tmp_path / "data", users=1, orders=1, notifications=1)
    mesh.ready()
    assert f"service configs are kept in {mesh.data}/registry" in (mesh.data / "logs/registry.log").read_text()
    pids = mesh.pids()
    assert len(pids) == 5
    assert mesh.process.end(number, within=40) == 0
    assert all(gone(pid) for pid in pids.values())
    assert "Killing" not in mesh.process.said


def test_ctrl_c_in_a_terminal_ends_make_run_mesh_with_0(tmp_path: Path) -> None:
    """make would fail with "Interrupt" if the terminal's signal reached it."""
    make = ["make", "-o", ".venv/.ready", "run-mesh", f"BIN={BUF.parent}"]
    make += [f"PORT={free_ports(32)[0]}", f"DATA={tmp_path / 'data'}", "USERS=1", "ORDERS=1", "NOTIFICATIONS=1"]
    code = f"import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn({make!r})))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as terminal:
        assert terminal.stdin is not None
        assert terminal.stdout is not None
        said = b""
        for line in terminal.stdout:
            said += line
            if b"Ready in" in line:
                terminal.stdin.write(b"\x03")
                terminal.stdin.flush()
    assert terminal.returncode == 0, said.decode()
    assert b"\r\nDraining; press Ctrl-C again to kill\r\nAll processes stopped\r\n" in said, "on a line below the ^C"


def test_a_signal_during_startup_stops_it(spawn: Spawn, tmp_path: Path) -> None:
    mesh = Mesh(spawn, tmp_path / "data", users=1, orders=1, notifications=1)
    mesh.process.wait_for("Starting")
    assert mesh.process.end(signal.SIGINT, within=40) == 0


def _another(port: int) -> int:
    return port + 1000 if port + 2000 < 65536 else port - 1000


def test_a_port_in_use_is_one_line_and_exit_code_2(spawn: Spawn, tmp_path: Path) -> None:
    mesh_port = free_ports(32)[0]
    with socket.socket() as taken:
        taken.bind((HOST, mesh_port + 2))
        taken.listen()
        process = spawn.python("-m", "services", "--port", str(mesh_port), "--data", tmp_path / "data")
        assert process.wait() == 2
    assert process.said.count("\n") == 1
    assert (
        f"user-2 can't listen on {HOST}:{mesh_port + 2}: address already in use; to use other ports: " in process.said
    )
    assert process.said.endswith(f"make run-mesh DATA={tmp_path / 'data'} PORT={_another(mesh_port)}\n")


def test_a_folder_in_use_is_one_line_that_names_another_and_exit_code_2(spawn: Spawn, tmp_path: Path) -> None:
    """Two shops on one folder would have two brokers on one store."""
    data = tmp_path / "data"
    mesh = Mesh(spawn, data, users=1, orders=1, notifications=1)
    mesh.process.wait_for("Starting")
    in_use = f"run-mesh: {data} is in use by another mesh (pid {mesh.process.pid}); to run a second one: make run-mesh "
    port = free_ports(32)[0]
    second = spawn.python("-m", "services", "--port", str(port), "--data", data)
    assert second.wait() == 2
    assert second.said == f"{in_use}DATA={data}-2 PORT={port}\n", "its ports are free"
    with socket.socket() as taken:
        taken.bind((HOST, port))
        taken.listen()
        third = spawn.python("-m", "services", "--port", str(port), "--data", data)
        assert third.wait() == 2
    assert third.said == f"{in_use}DATA={data}-2 PORT={_another(port)}\n"
    assert mesh.process.end(signal.SIGINT, within=40) == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--users", "none"], "argument --users: 'none' is not a whole number from 1 to 100"),
        (["--notifications", "0"], "argument --notifications: '0' is not a whole number from 1 to 100"),
        (["--orders", "0"], "argument --orders: '0' is not a whole number from 1 to 100"),
        (["--port", "70000"], "argument --port: '70000' is not a whole number from 1 to 65000"),
        (["--data", "/dev/null/data"], "can't write to /dev/null/data"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_argument_is_one_line_and_exit_code_2(spawn: Spawn, arguments: list[str], complaint: str) -> None:
    process = spawn.python("-m", "services", "--port", str(free_ports(32)[0]), *arguments)
    assert process.wait() == 2
    assert complaint in process.said
    assert len(process.said.splitlines()) == 1


def test_a_bad_variable_of_a_service_is_named(spawn: Spawn, tmp_path: Path) -> None:
    port = free_ports(32)[0]
    process = spawn.python(
        "-m", "services", "--port", str(port), "--data", tmp_path / "data", environment={"MESH_WEIGHT": "much"}
    )
    assert process.wait(within=40) == 2
    assert "MESH_WEIGHT" in process.said
    assert "Traceback" not in process.said


def started(pid: int) -> float:
    """When the process started, on the clock of ``time.clock_gettime(time.CLOCK_BOOTTIME)``."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return int(ticks) / os.sysconf("SC_CLK_TCK")


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="when a process began is in /proc")
def test_a_replica_that_was_ready_is_restarted_immediately_however_often_it_is_killed(
    spawn: Spawn, tmp_path: Path
) -> None:
    mesh = Mesh(spawn, tmp_path / "data", users=1, orders=1, notifications=1)
    mesh.ready()
    pid = mesh.pids()["user-1"]
    for number in range(1, 5):
        killed = time.clock_gettime(time.CLOCK_BOOTTIME)
        os.kill(pid, signal.SIGKILL)
        said = mesh.process.wait_until(
            lambda number=number: re.findall(r"user-1 is ready again \(pid (\d+)\)", mesh.process.said)[number - 1 :],  # type: ignore[misc]
            within=30,
        )
        pid = int(said[0])
        assert started(pid) - killed <= 0.2
    assert mesh.process.said.count("user-1 killed (SIGKILL); restarting now") == 4
    assert mesh.run(sys.executable, str(REPOSITORY / "examples/quickstart_sync.py"))
    assert mesh.process.end(signal.SIGINT, within=40) == 0


@pytest.mark.faults
def test_a_replica_that_fails_at_startup_is_restarted_with_backoff(spawn: Spawn, tmp_path: Path) -> None:
    mesh = Mesh(spawn, tmp_path / "data", users=1, orders=1, notifications=1)
    mesh.ready()
    database = mesh.data / "user.db"
    database.rename(mesh.data / "aside.db")
    database.mkdir()  # no SQLite database
    os.kill(mesh.pids()["user-1"], signal.SIGKILL)
    for when in (
        "killed (SIGKILL); restarting now",
        "restarting in 0.25 s",
        "restarting in 0.5 s",
        "restarting in 1 s",
    ):
        mesh.process.wait_for(f"user-1 {when}" if "now" in when else when, within=30)
    database.rmdir()
    (mesh.data / "aside.db").rename(database)
    mesh.process.wait_for("user-1 is ready again", within=30)
    assert mesh.process.end(signal.SIGINT, within=40) == 0


def open_to_others(folder: Path) -> list[str]:
    """Paths in the folder that other users may read, write or enter."""
    return sorted(str(path) for path in [folder, *folder.rglob("*")] if path.stat().st_mode & 0o077)


def test_its_files_are_private_and_its_logs_have_no_emails(spawn: Spawn, tmp_path: Path) -> None:
    data = tmp_path / "data"
    umask = os.umask(0o022)
    try:
        mesh = Mesh(spawn, data, users=1, orders=1, notifications=1)
    finally:
        os.umask(umask)
    mesh.ready()
    mesh.run(sys.executable, "-c", TOLD)
    mesh.run(sys.executable, "-c", TAKEN)
    assert {"user.db", "order.db", "notification.db", "logs", "nats"} <= {path.name for path in data.iterdir()}
    assert open_to_others(data) == []
    logs = {path.name: path.read_text() for path in (data / "logs").iterdir()}
    assert "another user has this email" in logs["user-1.log"]
    assert not [name for name, log in logs.items() if "@example.com" in log]
    assert mesh.process.end(signal.SIGINT, within=40) == 0


def test_files_that_an_earlier_release_left_world_readable_are_made_private(spawn: Spawn, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("logs/user-1.log", "nats/jetstream/a.blk", "user.db", "user.db-wal", "order.db"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(b"")
    for path in [data, *data.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    mesh = Mesh(spawn, data, users=1, orders=1, notifications=1)
    mesh.process.wait_for("Starting")
    assert open_to_others(data) == []
    assert mesh.process.end(signal.SIGINT, within=40) == 0


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's word that a parent has ended is Linux's")
def test_no_process_outlives_a_killed_supervisor(spawn: Spawn, tmp_path: Path) -> None:
    mesh = Mesh(spawn, tmp_path / "data", users=1, orders=1, notifications=1)
    mesh.ready()
    pids = mesh.pids()
    os.kill(pids["nats"], signal.SIGSTOP)
    assert mesh.process.end(signal.SIGKILL) == -signal.SIGKILL
    second = spawn.python("-m", "services", "--port", str(free_ports(32)[0]), "--data", mesh.data)
    assert second.wait() == 2, "while the broker runs, no other may use its store"
    assert "is in use by another mesh" in second.said
    os.kill(pids["nats"], signal.SIGCONT)
    eventually(lambda: all(gone(pid) for pid in pids.values()), within=30, what="its processes had ended")
