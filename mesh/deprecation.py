"""Old names that still work, with a warning, and the release that removes them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

REMOVED_IN = "0.4"
"""The release that removes the deprecated names."""


def warn(old: str, new: str, *, stacklevel: int = 2) -> None:
    """Warn that ``old`` is deprecated. ``stacklevel``: as for ``warnings.warn``, from the caller on."""
    text = f"{old} is deprecated and will be removed in {REMOVED_IN}: use {new}"
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel + 1)


def renamed(function: str, old: str, old_value: T | None, new: str, value: T | None) -> T | None:
    """An argument that may also be given under its old name. Raises TypeError if it is given under both."""
    if old_value is None:
        return value
    if value is not None:
        raise TypeError(f"expected {new} or {old}, its old name, not both")
    warn(f"{function}({old}=...)", f"{function}({new}=...)", stacklevel=3)
    return old_value


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for names that have moved: ``names`` has the full new name of each."""

    def getattr_moved(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn(f"{module}.{name}", names[name])
        home, _, attribute = names[name].rpartition(".")
        return getattr(importlib.import_module(home), attribute)

    return getattr_moved
