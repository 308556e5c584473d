"""The programs in docs/migrating.md run: its servers as processes, its clients against them, from top to bottom."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.processes import Process, Spawn

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "migrating.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
BEFORE, AFTER = (block for block in BLOCKS if "class Users(" in block)


@pytest.mark.slow
def test_its_programs_run(
    spawn: Spawn,
    free_port: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, port, registry = free_port(), free_port(), f"127.0.0.1:{free_port()}"

    def run_server(name: str, block: str, **environment: str) -> Process:
        program = tmp_path / f"{name}.py"
        program.write_text(block.replace("127.0.0.1:50051", f"127.0.0.1:{plain}"))
        return spawn.python(str(program), environment=environment)

    spawn.python("-m", "mesh.registry", "--listen", registry).wait_for("serving on")
    run_server("before", BEFORE)
    after = run_server("after", AFTER, MESH_LISTEN=f"127.0.0.1:{port}", MESH_REGISTRY=registry)
    with grpc.insecure_channel(f"127.0.0.1:{plain}") as channel:
        grpc.channel_ready_future(channel).result(20)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        grpc.channel_ready_future(channel).result(20)

    monkeypatch.setenv("MESH_REGISTRY", registry)
    names: dict[str, Any] = {}
    clients = [block for block in BLOCKS if block not in (BEFORE, AFTER)]
    assert len(clients) > 5
    for block in clients:
        exec(block.replace("users.internal:50051", f"127.0.0.1:{plain}"), names)
        said = capsys.readouterr().out
        assert "Ada" in said or "OK after" in said

    assert after.end() == 0
