"""make on a machine with little on it: says what there is, and plainly what is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def _make(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, timeout=50)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout in which nothing was set up."""
    for name in ("Makefile", "pyproject.toml", *(path.name for path in REPOSITORY.glob("requirements*"))):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def _python(folder: Path, without: str) -> str:
    """A Python that fails when its command line holds ``without``."""
    script = folder / "python3"
    script.write_text(f'#!/bin/sh\ncase "$*" in *"{without}"*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_make_alone_prints_what_there_is(clone: Path) -> None:
    said = _make(cwd=clone)
    assert said.returncode == 0
    for target in ("run-mesh", "test", "test-faults", "bench-call", "generate", "setup"):
        assert f"make {target} " in said.stdout


@pytest.mark.parametrize("target", ["run-mesh", "test"])
def test_a_missing_venv_module_is_named_with_the_line_that_installs_it(clone: Path, target: str) -> None:
    said = _make(target, "UV=", f"PYTHON={_python(clone, 'ensurepip')}", cwd=clone)
    assert said.returncode == 2
    assert "apt-get install python3-venv" in said.stdout
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("target", ["run-mesh", "test"])
def test_an_old_python_is_named_with_the_way_to_another(clone: Path, target: str) -> None:
    said = _make(target, f"PYTHON={_python(clone, 'version_info')}", cwd=clone)
    assert said.returncode == 2
    assert "weft needs Python 3.11 or later" in said.stdout
    assert "make PYTHON=" in said.stdout
    assert not (clone / ".venv").exists()


def test_no_python_at_all_is_said(clone: Path) -> None:
    said = _make("run-mesh", f"PYTHON={clone / 'no-python'}", cwd=clone)
    assert said.returncode == 2
    assert "weft needs Python 3.11 or later" in said.stdout
