"""What the layers ask for beyond import-linter's contracts in pyproject.toml."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MESH = REPOSITORY / "mesh"

# The three packages that the channel library needs, and the stubs in the same wheel.
CHANNEL_LIBRARY = {"grpc", "grpc_health", "google", "weft", "mesh"}
# What only some use, and so may need an extra.
EXTRAS = ("mesh/cli", "mesh/testing", "mesh/registry/__main__.py")


def _modules(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


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


def _needs_no_extra(path: Path) -> bool:
    return not _name(path).startswith(EXTRAS)


@pytest.mark.parametrize("path", [path for path in _modules(MESH) if _needs_no_extra(path)], ids=_name)
def test_the_channel_library_needs_grpcio_protobuf_and_health_checking_alone(path: Path) -> None:
    imported = {
        root for statement in _unconditional_imports(ast.parse(path.read_text()).body) for root in _roots(statement)
    }
    assert not imported - CHANNEL_LIBRARY - sys.stdlib_module_names


@pytest.mark.parametrize("path", _modules(MESH / "policy", MESH / "sim"), ids=_name)
def test_policies_take_chance_as_an_argument(path: Path) -> None:
    """``random`` is there for the type ``random.Random`` alone; its global would make a call's course unrepeatable."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            assert {alias.name for alias in node.names} == {"Random"}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            assert node.attr == "Random", f"line {node.lineno}: random.{node.attr}"


def test_only_context_py_holds_contextvars() -> None:
    users = [
        _name(path)
        for path in _modules(MESH)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and node.module == "contextvars"
        and any(alias.name == "ContextVar" for alias in node.names)
    ]
    assert users == ["mesh/context.py"]


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
