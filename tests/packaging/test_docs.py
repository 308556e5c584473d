"""The pages that are written from the sources say what the sources say."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["service-config.md", "limits.md", "statuses.md", "variables.md", "diagrams.md"])
def test_a_page_is_what_its_sources_say(generate: Any, name: str) -> None:
    page = ROOT / "docs" / name
    assert page.read_text() == generate.PAGES[page](), "run: make docs"


def test_every_limit_of_the_code_is_on_the_page(generate: Any) -> None:
    listed = {f"{limit.module}.{limit.name}" for limits in generate.LIMITS.values() for limit in limits}
    bounds = set()
    for file in sorted((ROOT / "mesh").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(file.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            bounds |= {f"{module}.{name}" for name in names if re.match(r"(MAX|MIN)_", name)}
    assert len(bounds) > 10
    assert bounds - listed == set(), "add them to LIMITS in docs/generate.py"
