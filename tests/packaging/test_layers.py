"""What the layers ask for beyond import-linter's contracts in pyproject.toml."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MESH = REPOSITORY / "mesh"

# The three packages that the channel library needs, and the stubs in the same wheel.
CHANNEL_LIBRARY = {"grpc", "grpc_health", "google", "weft", "mesh"}


def _modules(folder: Path) -> list[Path]:
    modules = sorted(folder.rglob("*.py"))
    assert modules, f"{folder} has no modules"
    return modules


def _name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def _unconditional_imports(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when the module is imported: not those in functions, nor for type checkers alone."""
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement
        elif isinstance(statement, ast.ClassDef | ast.With):
            yield from _unconditional_imports(statement.body)


def _roots(statement: ast.Import | ast.ImportFrom) -> set[str]:
    if isinstance(statement, ast.Import):
        return {alias.name.split(".")[0] for alias in statement.names}
    return {(statement.module or "").split(".")[0]}


@pytest.mark.parametrize("path", _modules(MESH), ids=_name)
def test_the_channel_library_needs_grpcio_protobuf_and_health_checking_alone(path: Path) -> None:
    imported = {
        root for statement in _unconditional_imports(ast.parse(path.read_text()).body) for root in _roots(statement)
    }
    assert not imported - CHANNEL_LIBRARY - sys.stdlib_module_names


@pytest.mark.parametrize("path", _modules(MESH / "policy"), ids=_name)
def test_policies_take_chance_as_an_argument(path: Path) -> None:
    """``random`` is there for the type ``random.Random`` alone; its global would make a call's course unrepeatable."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            assert {alias.name for alias in node.names} == {"Random"}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            assert node.attr == "Random", f"line {node.lineno}: random.{node.attr}"


def test_only_context_py_holds_contextvars() -> None:
    assert [_name(path) for path in _modules(MESH) if "ContextVar" in path.read_text()] == ["mesh/context.py"]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["mesh", "mesh.aio"])
def test_making_a_channel_starts_no_thread(module: str) -> None:
    """A program may import the mesh, make channels, and then fork."""
    code = f"""
import threading, {module}
channel = {module}.insecure_channel("static:///127.0.0.1:1")
assert threading.active_count() == 1, threading.enumerate()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=REPOSITORY, timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("mesh/channel/subchannel.py", "from mesh.channel import load_reports"),
        ("mesh/config/settings.py", "from mesh.config import parse"),
        ("mesh/policy/cluster/breaker.py", "from mesh.policy.cluster import cluster"),
        ("mesh/channel/sync/driver.py", "from mesh.channel.aio import driver as aio_driver"),
        ("mesh/server/handlers/scope.py", "from mesh.server import sync"),
        ("mesh/policy/server/queue.py", "from mesh.policy.call import budget"),
        ("mesh/policy/call/backoff.py", "from mesh import context"),
        ("mesh/channel/worker.py", "from mesh.server import settings"),
    ],
)
def test_the_contracts_catch(path: str, line: str, tmp_path: Path) -> None:
    """Circles, siblings of one layer, and a clock behind an import, in a copy of the tree."""
    for name in ("mesh", "services", "pyproject.toml"):
        source, copy = REPOSITORY / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    file = tmp_path / path
    file.write_text(f"{file.read_text()}\n\n{line}\n")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY / 'generated'}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
