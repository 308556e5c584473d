"""make sets up exactly what the lock says, whatever else is on offer."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.faults


def _wheel(folder: Path, name: str, version: str, *needs: str, extra: str = "") -> str:
    """Build a package with nothing in it; returns its line of a lock."""
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [*([f"Provides-Extra: {extra}"] if extra else []), *(f"Requires-Dist: {need}" for need in needs)]
    files = {
        f"{name}.py": b"",
        f"{info}/METADATA": "\n".join(lines).encode() + b"\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _python_with_the_newest_pip(folder: Path) -> str:
    """A Python whose environments have the pip of this one (the lock's, which is the newest) for the one it ships."""
    pip = Path(str(metadata.distribution("pip").locate_file("")))
    installed = " ".join(str(path) for path in pip.glob("pip*"))
    script = folder / "python3"
    script.write_text(
        f'#!/bin/sh\n{sys.executable} "$@" || exit 1\ncase "$*" in "-m venv "*)\n'
        f'  for packages in "$3"/lib/python*/site-packages; do rm -rf "$packages"/pip*; cp -r {installed} "$packages"; '
        "done;;\nesac\n"
    )
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("installer", ["the pip that Python ships", "the newest pip", "uv"])
def test_the_environment_is_the_lock_though_newer_packages_are_on_offer(installer: str, tmp_path: Path) -> None:
    if installer == "uv" and not shutil.which("uv"):
        pytest.skip("uv is not installed")
    offered, clone = tmp_path / "offered", tmp_path / "clone"
    offered.mkdir()
    clone.mkdir()
    shutil.copy(REPOSITORY / "Makefile", clone)
    # Like pytest-cov and coverage[toml]: pip before 23.3 looks for an extra anew, and then finds the newer release.
    outer = _wheel(offered, "outer", "1.0", "inner[more]>=1.0")
    inner = _wheel(offered, "inner", "1.0", extra="more")
    for newer in ("1.1", "2.0"):
        _wheel(offered, "inner", newer, extra="more")
        _wheel(offered, "outer", newer, "inner[more]>=1.0")
    for name in ("requirements.lock", "requirements-dev.lock", "requirements-oldest.lock"):
        (clone / name).write_text(inner + outer)

    def make() -> dict[str, str]:
        offer = {"NO_INDEX": "1", "FIND_LINKS": str(offered)}
        python = _python_with_the_newest_pip(tmp_path) if installer == "the newest pip" else sys.executable
        arguments = ["make", ".venv/.locked", f"PYTHON={python}", *([] if installer == "uv" else ["UV="])]
        environment = {**os.environ, **{f"{tool}_{name}": offer[name] for tool in ("PIP", "UV") for name in offer}}
        done = subprocess.run(arguments, cwd=clone, env=environment, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stdout + done.stderr
        packages = next((clone / ".venv" / "lib").glob("python*/site-packages"))
        return {found.name: found.version for found in metadata.distributions(path=[str(packages)])}

    installed = make()
    pip = installed.pop("pip", None)
    installed.pop("setuptools", None)  # Python before 3.12 ships it
    assert installed == {"inner": "1.0", "outer": "1.0"}
    assert (pip == metadata.version("pip")) == (installer == "the newest pip")

    # What a new lock no longer names is gone.
    (clone / "requirements.lock").write_text(inner)
    os.utime(clone / "requirements.lock", (2**32, 2**32))
    assert "outer" not in make()
