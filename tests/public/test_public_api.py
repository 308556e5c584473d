"""What users import: the names and signatures that hold between releases, typed and documented."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import mesh
import mesh.aio
from tests.public import api

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("typed_program.py")


def test_the_public_api_is_what_the_snapshot_says() -> None:
    """A change is meant: run ``python -m tests.public.api``, and tell users in the changelog. A name that goes keeps an
    alias that warns (docs/compatibility.md)."""
    assert api.text() == api.PATH.read_text()


@pytest.mark.parametrize("module", api.MODULES, ids=lambda module: module.__name__)
def test_every_public_name_exists_and_has_a_docstring(module: object) -> None:
    for name in module.__all__:  # type: ignore[attr-defined]
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
            assert inspect.getdoc(value), name


@pytest.mark.parametrize("module", api.MODULES, ids=lambda module: module.__name__)
def test_help_names_everything_that_is_public(module: object) -> None:
    page = pydoc.plain(pydoc.render_doc(module))
    description = page[
        page.index("DESCRIPTION") : page.index("PACKAGE CONTENTS" if hasattr(module, "__path__") else "CLASSES")
    ]
    missing = {name for name in module.__all__ if name not in description}  # type: ignore[attr-defined]
    assert missing <= {"__version__"}
    assert len(description.splitlines()) < 60


def test_the_version_is_the_distribution_s() -> None:
    assert mesh.__version__ == metadata.version("weft")


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mesh' has no attribute 'insecure_chanel'"):
        _ = mesh.insecure_chanel


@pytest.mark.slow
def test_importing_mesh_gives_mesh_aio_on_demand() -> None:
    code = """
import sys, mesh
assert "mesh.aio" not in sys.modules
mesh.aio.insecure_channel
assert "mesh.aio" in sys.modules
from mesh import *
assert aio is mesh.aio
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=30)


@pytest.mark.slow
def test_a_typed_program_that_uses_every_public_name_passes_mypy(tmp_path: Path) -> None:
    text = PROGRAM.read_text()
    for module in api.MODULES:
        for name in module.__all__:
            assert f"{module.__name__}.{name}" in text, f"{module.__name__}.{name} is not used in {PROGRAM.name}"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={tmp_path}", "--config-file=", PROGRAM],
        cwd=tmp_path,
        env={"MYPYPATH": f"{ROOT}:{ROOT / 'generated'}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stdout
