"""The leak check that follows every test finds what a test leaves behind, the mesh's own threads included."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import REPOSITORY

LEAKS = """
import asyncio, threading
import grpc, pytest
import mesh
import tests.conftest
from tests.channel.suite import UNARY, Server

tests.conftest.SETTLE = 0.2
kept = []

@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()

def opened(server):
    channel = mesh.insecure_channel(f"static:///{server.address}")
    kept.append(channel)
    assert channel.unary_unary(UNARY)(b"ok", timeout=10) == b"ok"
    return channel

def test_nothing(server):
    opened(server).close()

@pytest.mark.parametrize("name", ["mesh-registration", "mesh-calls", "another"])
def test_a_thread(name):
    threading.Thread(target=threading.Event().wait, name=name, daemon=True).start()

def test_a_channel(server):
    opened(server)

def test_a_call_in_flight(server):
    channel = opened(server)
    channel.assembly.cluster.nodes[server.address].start()
    channel.close()

async def test_a_task():
    kept.append(asyncio.create_task(asyncio.Event().wait(), name="a task"))
"""


@pytest.mark.slow
def test_the_leak_check_finds_threads_channels_calls_and_tasks(tmp_path: Path) -> None:
    file = tmp_path / "test_leaking.py"
    file.write_text(LEAKS)
    options = ("-p", "tests.conftest", "-p", "no:cacheprovider", "-c", REPOSITORY / "pyproject.toml")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, file], cwd=REPOSITORY, capture_output=True, text=True, timeout=50
    )
    left = dict(re.findall(r"^_+ ERROR at teardown of test_(\S+) _+$\n(.*)", done.stdout, re.MULTILINE))
    assert left.pop("a_channel").startswith("channels left behind: <")
    assert "in_flight=1" in left.pop("a_call_in_flight")
    assert left.pop("a_task").startswith("tasks left behind: <Task pending name='a task'")
    assert left == {
        "a_thread[mesh-registration]": "threads left behind: mesh-registration",
        "a_thread[mesh-calls]": "threads left behind: mesh-calls",
        "a_thread[another]": "threads left behind: another",
    }
    assert "7 passed, 6 errors" in done.stdout
