"""A service as a process: one-line startup errors, --help, and how it stops."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from tests.processes import Spawn
from weft.user.v1 import user_pb2, user_pb2_grpc

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mesh.aio") is None, reason="the services are served by mesh.aio"),
]


FIFO = "a FIFO"
"""A placeholder for a FIFO."""


def run(service: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"services.{service}", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize("service", ["user", "order"])
def test_help_lists_every_variable_with_its_default(service: str) -> None:
    told = run(service, "--help")
    assert told.returncode == 0
    for line in ("MESH_DATA ", "MESH_DATABASE_URL ", "MESH_LOG_LEVEL ", "MESH_LISTEN ", "MESH_REGISTRY"):
        assert f"  {line}" in told.stdout
    assert "(default: data)" in told.stdout
    assert ("MESH_USER_AWAY" in told.stdout) == (service == "order")
    assert "127.0.0.1:50051" in told.stdout


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"MESH_LOG_LEVEL": "loud"}, "user: MESH_LOG_LEVEL='loud': Input should be 'debug', 'info'"),
        ({"MESH_LISTEN": "nowhere"}, "user: MESH_LISTEN='nowhere': expected host:port"),
        (
            {"MESH_DATA": "{tmp}/file/data"},
            "user: MESH_DATA='{tmp}/file/data': can't create the data folder: Not a directory",
        ),
        ({"MESH_DATABASE_URL": "nonsense"}, "user: MESH_DATABASE_URL: expected a SQLAlchemy URL"),
        ({"MESH_DATABASE_URL": "sqlite://"}, "user: SQLite needs a file"),
        ({"MESH_DATABASE_URL": "sqlite:///{tmp}/file"}, "user: file is not a database"),
        ({"MESH_DATABASE_URL": "sqlite:///{tmp}/none/user.db"}, "No such file or directory"),
    ],
    ids=["log level", "listen", "data", "url", "memory", "no database", "no folder"],
)
def test_a_startup_failure_is_a_one_line_error(tmp_path: Path, environment: dict[str, str], line: str) -> None:
    (tmp_path / "file").write_text("This is not a database, and no folder either. " * 100)
    wrong = {name: value.format(tmp=tmp_path) for name, value in environment.items()}
    told = run("user", **{"MESH_DATA": str(tmp_path / "data"), "MESH_LISTEN": "127.0.0.1:0", **wrong})
    assert told.returncode == 2
    assert line.format(tmp=tmp_path) in told.stderr
    assert told.stderr.count("\n") == 1


@pytest.mark.parametrize("service", ["user", "order"])
def test_a_port_in_use_is_a_one_line_error(tmp_path: Path, service: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        told = run(service, MESH_DATA=str(tmp_path), MESH_LISTEN=listen, MESH_USER_SERVICE="127.0.0.1:1")
    assert told.returncode == 2
    assert listen in told.stderr
    assert told.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        (None, "MESH_CONFIG='{file}': can't read it: No such file or directory"),
        (FIFO, "MESH_CONFIG='{file}': can't read it: not a regular file"),
        ("#" * (1024 * 1024 + 1), "MESH_CONFIG='{file}': can't read it: 1048577 bytes; the limit is 1048576"),
        ('MESH_ZONE = "\\u0000"', "MESH_CONFIG='{file}': MESH_ZONE can't be set: embedded null byte"),
        ("MESH_PORT = 0x" + "f" * 9_000, "MESH_CONFIG='{file}': MESH_PORT can't be set: Exceeds the limit"),
        ("MESH_LOG_LEVEL = loud", "MESH_CONFIG='{file}': invalid TOML: Invalid value (at line 1, column 18)"),
        (
            "log_level = 'info'",
            "MESH_CONFIG='{file}': unknown variable log_level; expected a name that begins with MESH_, OTEL_, GRPC_",
        ),
        ("MESH_LISTEN = ['a']", "MESH_CONFIG='{file}': MESH_LISTEN must be a string, a number, true or false"),
        ("MESH_LOG_LEVEL = 'loud'", "MESH_LOG_LEVEL='loud': Input should be 'debug', 'info'"),
        ("MESH_USER_AWAY = 'shrug'", "MESH_USER_AWAY='shrug': Input should be 'refuse' or 'accept'"),
        ("MESH_USER_TIMEOUT = 0", "MESH_USER_TIMEOUT='0': Input should be greater than 0"),
        ("MESH_REGISTRY = ''", "MESH_USER_SERVICE='mesh:///weft.user.v1.UserService': "),
        ("MESH_DATABASE_URL = 'mysql://host/name'", "unsupported database mysql; expected sqlite:///..."),
    ],
    ids=[
        "none",
        "FIFO",
        "large",
        "zero",
        "huge",
        "no TOML",
        "name",
        "type",
        "value",
        "choice",
        "range",
        "registry",
        "database",
    ],
)
def test_an_invalid_value_in_the_file_is_named_before_anything_starts(
    tmp_path: Path, file: str | None, line: str
) -> None:
    path = tmp_path / "order.toml"
    if file == FIFO:
        os.mkfifo(path)
    elif file is not None:
        path.write_text(file)
    told = run("order", MESH_CONFIG=str(path), MESH_DATA=str(tmp_path / "data"), MESH_LISTEN="127.0.0.1:0")
    assert told.returncode == 2
    assert line.format(file=path) in told.stderr
    assert told.stderr.count("\n") == 1


def test_the_environment_takes_precedence_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "user.toml"
    path.write_text("MESH_LOG_LEVEL = 'loud'\nMESH_LISTEN = 'nowhere'\n")
    told = run("user", MESH_CONFIG=str(path), MESH_DATA=str(tmp_path), MESH_LOG_LEVEL="info")
    assert told.stderr.startswith("user: MESH_LISTEN='nowhere'")


def test_it_serves_keeps_its_users_and_drains_on_sigterm(
    tmp_path: Path, spawn: Spawn, free_port: Callable[[], int]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    environment = {"MESH_DATA": str(tmp_path / "data"), "MESH_LISTEN": address, "MESH_REGISTRY": ""}

    service = spawn.python("-m", "services.user", environment=environment)
    with grpc.insecure_channel(address) as channel:
        created = user_pb2_grpc.UserServiceStub(channel).CreateUser(
            user_pb2.CreateUserRequest(name="Ann", email="ann@example.com"), timeout=20, wait_for_ready=True
        )
    assert service.end() == 0
    open_to_others = [path for path in (tmp_path / "data").rglob("*") if path.stat().st_mode & 0o077]
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    assert open_to_others == []
    assert "ann@example.com" not in service.said
    lines = [json.loads(line) for line in service.said.splitlines()]
    assert {line["service"] for line in lines} == {"user"}
    assert [line["event"] for line in lines if line["logger"] == "services.common.process"] == ["starting", "stopped"]
    assert [line["database"] for line in lines if "database" in line] == [str(tmp_path / "data" / "user.db")]

    again = spawn.python("-m", "services.user", environment=environment)
    with grpc.insecure_channel(address) as channel:
        found = user_pb2_grpc.UserServiceStub(channel).GetUser(
            user_pb2.GetUserRequest(id=created.user.id), timeout=20, wait_for_ready=True
        )
    assert found.user == created.user
    assert again.end() == 0
