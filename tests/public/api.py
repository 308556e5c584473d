"""The public API as text: every public name with its signature. ``python -m tests.public.api`` writes api.txt."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import grpc.aio

import mesh
import mesh.aio
import mesh.testing
import mesh.testing.aio

MODULES = (mesh, mesh.aio, mesh.testing, mesh.testing.aio)

PATH = Path(__file__).with_name("api.txt")

# A channel's methods for its own calls, and for forks.
INTERNAL = {"adopt", "connectivity", "forked", "start"}

# A mesh makes them, and nobody else.
MADE = {"Calls", "Fault", "Faults", "Replica"}


def text() -> str:
    """What api.txt should say."""
    lines = [line for module in MODULES for line in _module(module)]
    return "\n".join(lines).replace("'", "") + "\n"


def _module(module: ModuleType) -> Iterator[str]:
    for name in sorted(module.__all__):
        value = getattr(module, name)
        full = f"{module.__name__}.{name}"
        if inspect.isclass(value):
            yield from _class(full, value)
        elif inspect.isfunction(value):
            yield f"{full}{inspect.signature(value)}"
        else:
            yield f"{full}: {type(value).__name__}"


def _class(full: str, cls: type[Any]) -> Iterator[str]:
    bases = [base.__name__ for base in cls.__mro__[1:] if base.__module__.split(".")[0] == "grpc"]
    yield f"{full}({', '.join(bases)})" if bases else full
    if issubclass(cls, enum.Enum):
        yield from (f"{full}.{member.name} = {member.value!r}" for member in cls)
        return
    if dataclasses.is_dataclass(cls):
        yield from (f"{full}.{field.name}: {field.type}" for field in dataclasses.fields(cls))
    elif "__init__" in vars(cls) and cls.__name__ not in MADE:
        yield f"{full}{inspect.signature(cls)}"
    ours = [base for base in cls.__mro__ if base.__module__.split(".")[0] == "mesh"]
    theirs = {name for base in (grpc.Channel, grpc.aio.Channel) for name in dir(base)} if bases else set()
    methods = {
        name: value
        for base in reversed(ours)
        for name, value in vars(base).items()
        if not name.startswith("_")
        and name not in theirs
        and not (bases and name in INTERNAL)
        and (inspect.isroutine(value) or isinstance(value, property))
    }
    for name, value in sorted(methods.items()):
        function: Any = getattr(value, "__func__", value)
        yield f"{full}.{name}" + ("" if isinstance(value, property) else str(inspect.signature(function)))


if __name__ == "__main__":
    PATH.write_text(text())
