"""What releases and commits rely on: the changelog's order, and hooks that run what make runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ORDER = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def test_each_version_s_parts_stand_in_the_order_of_keep_a_changelog() -> None:
    versions = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    assert versions[0].startswith("[Unreleased]\n")
    for version in versions:
        parts = re.findall(r"^### (.+)$", version, re.MULTILINE)
        assert parts == [part for part in ORDER if part in parts]


def test_the_version_stands_in_one_place() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    sources = [*ROOT.glob("mesh/**/*.py"), *ROOT.glob("services/**/*.py")]
    assert len(sources) > 50
    assert [source for source in sources if f'"{version}"' in source.read_text()] == []


def test_hooks_run_targets_of_make_and_fetch_nothing() -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    entries = re.findall(r"entry: (.+)$", config, re.MULTILINE)
    assert entries
    assert {entry.removeprefix("make -s ") for entry in entries} <= targets
    assert set(re.findall(r"repo: (.+)$", config, re.MULTILINE)) == {"local"}
    assert set(re.findall(r"language: (.+)$", config, re.MULTILINE)) == {"system"}
