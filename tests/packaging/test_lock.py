"""The lock pins every package by hash and names no address; nothing in the repository is particular to one machine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ENTRY = re.compile(r"^(?P<name>[a-z0-9-]+)==(?P<version>[^ ;]+)(?: ; .+?)? \\$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")

# Written so that this file doesn't hold what it looks for.
ADDRESSES = ("pypi" + ".org", "python" + "hosted", "art" + "ifactory", "--index" + "-url", "extra-index" + "-url")
MACHINE = re.compile("|".join(re.escape(f"/{folder}/") for folder in ("home", "root", "work", "Users", "tmp")))


def _entries() -> dict[str, list[str]]:
    """The lock's packages (``name==version``) with their hashes; fails on any line that is neither."""
    entries: dict[str, list[str]] = {}
    name = ""
    for line in (REPOSITORY / "requirements.lock").read_text().splitlines():
        if match := ENTRY.match(line):
            name = f"{match['name']}=={match['version']}"
            entries[name] = []
        else:
            assert HASH.match(line), f"neither a package nor a hash: {line}"
            entries[name].append(line)
    return entries


def _tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True, timeout=30)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [REPOSITORY / name for name in listed.stdout.decode().split("\0") if name]


def test_every_locked_package_has_hashes_and_no_line_has_an_address() -> None:
    entries = _entries()
    assert len(entries) > 20
    assert all(entries.values())


def test_the_lock_holds_what_pyproject_asks_for() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    asked = [
        *project["project"]["dependencies"],
        *(need for needs in project["project"]["optional-dependencies"].values() for need in needs),
        *(need for need in project["dependency-groups"]["dev"] if not need.startswith("weft")),
    ]
    locked = {entry.partition("==")[0] for entry in _entries()}
    assert {re.split("[<>=!~ ;\\[]", need)[0] for need in asked} <= locked


def test_this_environment_is_the_locked_one() -> None:
    entries = dict(entry.split("==") for entry in _entries())
    assert metadata.version("grpcio") == entries["grpcio"]
    assert metadata.version("protobuf") == entries["protobuf"]


def test_all_of_grpc_is_of_one_version() -> None:
    """Stubs refuse a grpcio older than their generator when they are imported."""
    versions = {entry.partition("==")[2] for entry in _entries() if entry.startswith("grpcio")}
    assert len(versions) == 1


def test_no_file_names_a_package_registry_or_a_path_of_one_machine() -> None:
    found = []
    for path in _tracked():
        if path == Path(__file__) or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if any(address in line for address in ADDRESSES) or MACHINE.search(line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:80]}")
    assert not found
