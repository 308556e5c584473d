"""The pages name only what there is: variables, public names, files, commands, links, keys and settings."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from mesh import variables
from mesh.config.parse import parse
from mesh.server.settings import ServerSettings
from mesh.server.sync import Server
from weft.mesh.v1 import registry_pb2, service_config_pb2

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "tests/**/*.md")
    for page in ROOT.glob(pattern)
    if page.name != "CHANGELOG.md"  # it tells what was
)
HOMES = ("", "mesh", "tests", "benchmarks", "generated")
"""Where a page's paths may begin."""

SERVICES = {
    service.full_name: service
    for file in (registry_pb2, health_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
}
"""What may be called in an example."""

page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def quoted(page: Path) -> Iterator[str]:
    """What the page has in backticks, outside of its blocks of code."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", prose)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


@page
def test_variables(page: Path) -> None:
    named = set(re.findall(r"\bMESH_[A-Z_]*[A-Z]\b", page.read_text()))
    assert named <= variables.KNOWN.keys()


@page
def test_public_names(page: Path) -> None:
    named = set(re.findall(r"(?<![\w/.])(?:mesh|services)(?:\.[A-Za-z_]\w*)+", " ".join(quoted(page))))
    assert [name for name in sorted(named) if not exists(name)] == []


@page
def test_imports_in_code(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                assert all(exists(alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert all(exists(f"{node.module}.{alias.name}") for alias in node.names), ast.unparse(node)
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("mesh."):
                assert exists(ast.unparse(node)), ast.unparse(node)


@page
def test_files(page: Path) -> None:
    named = [name for name in quoted(page) if re.fullmatch(r"[\w.-]+(/[\w.-]*)+|\w+\.(py|md|toml|lock|proto)", name)]
    tops = {path.name for path in (ROOT, *ROOT.glob("*"), *(ROOT / "mesh").glob("*")) if path.is_dir()} - {".venv"}
    ours = [name for name in named if "/" not in name or name.split("/")[0] in tops]
    homes = [ROOT / home for home in HOMES]
    assert [name for name in ours if not any((home / name).exists() for home in homes)] == []


@page
def test_links(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@page
def test_commands(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = [*quoted(page), *(line for block in blocks(page, "console") for line in block.splitlines())]
    assert {found for each in code for found in re.findall(r"^(?:\$ )?make ([a-z-]+)", each)} <= targets
    modules = re.findall(r"python -m (\w+(?:\.\w+)*)", text)
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []
    scripts = re.findall(r"python ((?:examples|docs|benchmarks)/\S+\.py)", text)
    assert [script for script in scripts if not (ROOT / script).exists()] == []


@page
def test_grpcurl(page: Path) -> None:
    for block in blocks(page, "console"):
        for line in re.findall(r"^\$ (grpcurl .* \S+/\S+)$", block, re.MULTILINE):
            arguments = shlex.split(line)
            service, _, method = arguments[-1].rpartition("/")
            found = SERVICES[service].FindMethodByName(method) if method in SERVICES[service].methods_by_name else None
            assert found is not None, line
            request = arguments[arguments.index("-d") + 1] if "-d" in arguments else "{}"
            json_format.Parse(request, message_factory.GetMessageClass(found.input_type)())


@page
def test_service_configs(page: Path) -> None:
    for block in blocks(page, "json"):
        root = json.loads(block)
        for text in root["services"].values() if "services" in root else [root]:
            assert parse(json.dumps(text)).warnings == ()


def keys(message: Descriptor, seen: set[str]) -> set[str]:
    """The JSON names of a message's fields and of all below it."""
    if message.full_name in seen:
        return set()
    seen.add(message.full_name)
    found = set()
    for field in message.fields:
        found.add(field.json_name)
        if field.message_type is not None:
            found |= keys(field.message_type, seen)
    return found


@page
def test_keys_of_the_service_config(page: Path) -> None:
    known = keys(service_config_pb2.ServiceConfig.DESCRIPTOR, set())
    named = {part for name in quoted(page) if re.fullmatch(r"[\w.]+", name) for part in name.split(".")}
    camel = {name for name in named if re.fullmatch(r"[a-z]+([A-Z][a-z]+)+", name)}
    others = {"setUp"}
    assert camel - others <= known


@page
def test_what_is_given_at_registration(page: Path) -> None:
    given = re.findall(r"`(\w+)`[^`.;|]* at registration", page.read_text())
    settings = {each.name for each in dataclasses.fields(ServerSettings)}
    fields = {field.name for field in registry_pb2.Instance.DESCRIPTOR.fields}
    assert set(given) <= settings & fields


@page
def test_what_can_be_seen_of_a_server(page: Path) -> None:
    server = Server([], ServerSettings())
    for name in quoted(page):
        if re.fullmatch(r"(server|admission)(\.[a-z_]+)+(\(.*\))?", name):
            found: object = server if name.startswith("server") else server.admission
            for attribute in name.partition("(")[0].split(".")[1:]:
                assert hasattr(found, attribute), name
                found = getattr(found, attribute)


def test_names_in_the_glossary() -> None:
    rows = [
        line.split("|") for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.count("|") == 7
    ]
    named = {part for row in rows for name in re.findall(r"`([^`]+)`", row[3]) for part in name.split(".")}
    sources = [*(ROOT / "mesh").rglob("*.py"), *(ROOT / "protos").rglob("*.proto")]
    assert len(named) > 50
    assert named - {word for source in sources for word in re.findall(r"\w+", source.read_text())} == set()


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = set(re.findall(r"^- \[[^]]+\]\(([^)]+)\)", index.read_text(), re.MULTILINE))
    pages = {page.name for page in index.parent.glob("*.md")} - {index.name}
    assert pages - linked == set()
