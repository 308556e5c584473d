"""The notification service as a process: its settings, and how it stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from tests.processes import Spawn
from weft.notification.v1 import notification_pb2, notification_pb2_grpc

pytestmark = pytest.mark.slow


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.notification", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_help_names_the_broker() -> None:
    told = run("--help")
    assert told.returncode == 0
    assert "  MESH_NATS_URL " in told.stdout
    assert "  MESH_DATABASE_URL " in told.stdout


def test_an_invalid_broker_url_is_a_one_line_error(tmp_path: Path) -> None:
    told = run(MESH_NATS_URL="localhost:4222", MESH_DATA=str(tmp_path))
    assert told.returncode == 2
    assert told.stderr.startswith("notification: MESH_NATS_URL='localhost:4222': ")
    assert "expected nats://host:port" in told.stderr
    assert told.stderr.count("\n") == 1


def test_it_serves_and_drains_while_the_broker_is_unavailable(
    tmp_path: Path, spawn: Spawn, free_port: Callable[[], int]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    environment = {
        "MESH_DATA": str(tmp_path / "data"),
        "MESH_LISTEN": address,
        "MESH_REGISTRY": "",
        "MESH_NATS_URL": f"nats://127.0.0.1:{free_port()}",
    }
    service = spawn.python("-m", "services.notification", environment=environment)
    with grpc.insecure_channel(address) as channel:
        answer = notification_pb2_grpc.NotificationServiceStub(channel).ListNotifications(
            notification_pb2.ListNotificationsRequest(), timeout=40, wait_for_ready=True
        )
    assert not answer.notifications
    assert service.end(within=40) == 0
    lines = [json.loads(line) for line in service.said.splitlines()]
    assert {line["service"] for line in lines} == {"notification"}
    assert lines[-1]["event"] == "stopped"
