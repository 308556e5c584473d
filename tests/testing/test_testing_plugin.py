"""pytest's plugin, as a project sees it that has weft installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run(folder: Path, text: str, *arguments: str) -> str:
    """Run a test file of a project of its own; every test in it passes, and nothing warns."""
    (folder / "test_it.py").write_text(text)
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    if "no:asyncio" not in arguments:
        options += ["-o", "asyncio_default_fixture_loop_scope=function"]  # without it pytest-asyncio itself warns
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments, "test_it.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_costs_other_projects_no_import_of_grpc(tmp_path: Path) -> None:
    run(tmp_path, "import sys\n\ndef test_it():\n    assert not {'grpc', 'mesh', 'weft'} & {*sys.modules}\n")


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_the_fixtures_are_meshes(tmp_path: Path, mode: str) -> None:
    text = """
import pytest

def test_sync(weft_mesh):
    import mesh.testing
    assert isinstance(weft_mesh, mesh.testing.Mesh)
    assert weft_mesh.registry

@pytest.mark.asyncio
async def test_aio(weft_mesh_aio):
    import mesh.testing
    assert isinstance(weft_mesh_aio, mesh.testing.aio.Mesh)
    assert weft_mesh_aio.registry
"""
    assert "2 passed" in run(tmp_path, text, "-o", f"asyncio_mode={mode}")


def test_without_pytest_asyncio_the_fixture_is_a_plain_one(tmp_path: Path) -> None:
    text = "def test_sync(weft_mesh):\n    assert weft_mesh.registry\n"
    assert "1 passed" in run(tmp_path, text, "-p", "no:asyncio")
    listed = run(tmp_path, text, "-p", "no:asyncio", "--fixtures")
    assert "weft_mesh_aio" in listed


def test_the_tests_on_the_page_pass_as_they_stand_there(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "testing.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    text = "\n\n".join(blocks)
    count = len(re.findall(r"^ *(?:async )?def test_", text, re.MULTILINE))
    assert count > 5
    assert f"{count} passed" in run(tmp_path, text, "-o", "asyncio_mode=auto")
