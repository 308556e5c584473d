"""docs/correctness.md names tests and sources that there are, and what the code cites of it is there."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "correctness.md"
TEXT = PAGE.read_text()
ITEMS = {match[1]: match[0] for match in re.finditer(r"^### ([A-Z]\d+) .*?(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)}
"""What the page says of each item, by its number."""

TESTS = re.findall(r"`(test_\w+\.py)::([^`\n]+)`", TEXT)
CITED = re.compile(r"docs/correctness\.md,\s+(?:#\s+)?([A-Z]\d+(?:(?:,| and)\s+(?:#\s+)?[A-Z]\d+)*)")
FOLDERS = ("mesh", "services", "tests", "benchmarks", "examples", "docs", "protos")
OLD = re.compile(r"\bFI" r"ELD\b")
"""A document that isn't in the repository."""


@cache
def written() -> Sequence[Path]:
    """Every file of ours in which something may be cited."""
    files = [
        file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in {".py", ".md", ".proto"}
    ]
    return sorted({*files, *ROOT.glob("*.md")} - {Path(__file__).resolve()})


@cache
def body_of(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text()).body


def defines(body: Sequence[ast.stmt], names: Sequence[str]) -> bool:
    """Whether ``names[0]`` is in ``body``, ``names[1]`` in that, and so on."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == names[0]:
            return len(names) == 1 or defines(node.body, names[1:])
        if isinstance(node, ast.Assign) and any(
            isinstance(each, ast.Name) and each.id == names[0] for each in node.targets
        ):
            return len(names) == 1
    return False


@cache
def texts_beside(path: Path) -> frozenset[str]:
    """Every string in the files of a test's folder: a row's name is one of them."""
    return frozenset(
        node.value
        for file in path.parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def exists(file: str, test: str) -> bool:
    name, _, row = test.partition("[")
    return any(
        defines(body_of(path), name.split("::")) and (not row or row.removesuffix("]") in texts_beside(path))
        for path in (ROOT / "tests").rglob(file)
    )


def citations() -> Iterator[tuple[str, str]]:
    for path in written():
        for match in CITED.finditer(path.read_text()):
            for item in re.findall(r"[A-Z]\d+", match[1]):
                yield str(path.relative_to(ROOT)), item


def test_every_item_has_a_number_of_its_own() -> None:
    headings = re.findall(r"^### (\S+)", TEXT, re.MULTILINE)
    assert [heading for heading, count in Counter(headings).items() if count > 1] == []
    assert set(headings) == ITEMS.keys(), "a letter and a number begin each heading"


@pytest.mark.parametrize("item", ITEMS)
def test_an_item_names_its_source_and_tests(item: str) -> None:
    assert "\n**Source**: " in ITEMS[item]
    assert "\n**Tests**\n- `test_" in ITEMS[item]


def test_every_test_that_is_named_exists() -> None:
    assert len(TESTS) > 100
    assert [f"{file}::{test}" for file, test in TESTS if not exists(file, test)] == []


def test_items_that_name_each_other_exist() -> None:
    named = re.findall(r"\(((?:[A-Z]\d+(?:, )?)+)\)", TEXT)
    assert {item for names in named for item in names.split(", ")} <= ITEMS.keys()


def test_every_citation_is_of_an_item() -> None:
    found = list(citations())
    assert len(found) > 30
    assert [(file, item) for file, item in found if item not in ITEMS] == []


def test_links_into_the_page_arrive() -> None:
    headings = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)\s]+)\)", TEXT))
    for path in written():
        links |= set(re.findall(r"correctness\.md#([\w-]+)", path.read_text()))
    assert links - anchors == set()


def test_nothing_cites_a_document_that_is_not_in_the_repository() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in written()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if OLD.search(line)
    ]
    assert found == []
