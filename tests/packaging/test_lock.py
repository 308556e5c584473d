"""The locks pin every package by hash and name no address; nothing in the repository is particular to one machine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ENTRY = re.compile(r"^(?P<name>[a-z0-9-]+)==(?P<version>[^ ;]+)(?: ; .+?)? \\$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")

# Written so that this file doesn't hold what it looks for.
ADDRESSES = ("pypi" + ".org", "python" + "hosted", "art" + "ifactory", "--index" + "-url", "extra-index" + "-url")
MACHINE = re.compile("|".join(re.escape(f"/{folder}/") for folder in ("home", "root", "work", "Users", "tmp")))


LOCKS = {group: REPOSITORY / f"requirements{group}.lock" for group in ("", "-dev", "-oldest")}


def _locked(group: str) -> dict[str, str]:
    """The versions of a lock; fails on any line that is neither a package nor its hash."""
    hashes: dict[str, int] = {}
    for line in LOCKS[group].read_text().splitlines():
        if match := ENTRY.match(line):
            name = f"{match['name']}=={match['version']}"
            hashes[name] = 0
        else:
            assert HASH.match(line), f"neither a package nor a hash: {line}"
            hashes[name] += 1
    assert len(hashes) > 20
    assert all(hashes.values())
    return dict(entry.split("==") for entry in hashes)


def _names(needs: list[Any]) -> set[str]:
    return {re.split("[<>=!~ ;\\[]", need)[0] for need in needs if isinstance(need, str)}


def _tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True, timeout=30)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [REPOSITORY / name for name in listed.stdout.decode().split("\0") if name]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


@pytest.mark.parametrize("group", LOCKS)
def test_every_locked_package_has_hashes_and_no_line_has_an_address(group: str) -> None:
    _locked(group)


def test_the_locks_hold_what_pyproject_asks_for(project: dict[str, Any]) -> None:
    mesh, extras = project["project"]["dependencies"], project["project"]["optional-dependencies"]
    groups = project["dependency-groups"]
    assert _names(mesh + extras["services"] + groups["shop"]) <= _locked("").keys()
    assert _names(mesh + groups["dev"] + groups["test"]) <= _locked("-dev").keys()
    assert {name for needs in extras.values() for name in _names(needs)} <= _locked("-dev").keys()
    assert _names(mesh + extras["dns"] + groups["test"]) <= _locked("-oldest").keys()


def test_the_shop_needs_no_linter_and_no_test_tool_and_development_adds_to_what_it_has() -> None:
    shop, dev = _locked(""), _locked("-dev")
    assert not shop.keys() & {"ruff", "mypy", "pytest", "hypothesis", "buf-bin", "grpcio-tools", "coverage"}
    assert shop.items() <= dev.items()


def test_the_floors_are_what_is_tested(project: dict[str, Any]) -> None:
    oldest = _locked("-oldest")
    for need in project["project"]["dependencies"]:
        name, floor = re.match(r"([a-z-]+)>=([0-9.]+)", need).groups()  # type: ignore[union-attr]
        assert oldest[name] in {floor, f"{floor}.0"}
    assert {oldest[name] for name in oldest if name.startswith("grpcio")} == {oldest["grpcio"]}


def test_the_stubs_are_generated_with_the_oldest_tools() -> None:
    """Stubs refuse a grpcio or protobuf older than their generator when they are imported."""
    oldest = _locked("-oldest")
    stubs = REPOSITORY / "generated" / "weft" / "user" / "v1"
    assert f"GRPC_GENERATED_VERSION = '{oldest['grpcio']}'" in (stubs / "user_pb2_grpc.py").read_text()
    assert f"# Protobuf Python Version: {oldest['protobuf']}" in (stubs / "user_pb2.py").read_text()


def test_this_environment_is_the_locked_one() -> None:
    entries = _locked("-dev")
    assert metadata.version("grpcio") == entries["grpcio"]
    assert metadata.version("protobuf") == entries["protobuf"]


def test_nothing_of_grpc_is_newer_than_grpcio() -> None:
    entries = _locked("-dev")
    versions = {name: tuple(map(int, entries[name].split("."))) for name in entries if name.startswith("grpcio")}
    assert max(versions.values()) == versions["grpcio"]


def test_no_file_names_a_package_registry_or_a_path_of_one_machine() -> None:
    found = []
    for path in _tracked():
        if path == Path(__file__) or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if any(address in line for address in ADDRESSES) or MACHINE.search(line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:80]}")
    assert not found
