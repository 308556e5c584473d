"""Weft's pytest plugin: the fixtures ``weft_mesh`` and ``weft_mesh_aio``.

Every pytest run with weft installed loads this module. It is outside the package ``mesh`` because importing
``mesh`` imports gRPC, which takes time, and because coverage doesn't see what is imported before the tests begin.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mesh import testing
    from mesh.testing import aio


@pytest.fixture
def weft_mesh() -> Iterator[testing.Mesh]:
    """A mesh in this process, for tests with blocking calls: a ``mesh.testing.Mesh`` for the length of the test."""
    from mesh.testing import Mesh

    with Mesh() as mesh:
        yield mesh


async def weft_mesh_aio() -> AsyncIterator[aio.Mesh]:
    """A mesh on the test's event loop: a ``mesh.testing.aio.Mesh`` for the length of the test. Needs pytest-asyncio, or
    another plugin that runs asynchronous fixtures."""
    from mesh.testing.aio import Mesh

    async with Mesh() as mesh:
        yield mesh


def pytest_configure(config: pytest.Config) -> None:
    """Add ``weft_mesh_aio`` as a fixture of the plugin that runs the asynchronous tests."""
    fixture: Any = pytest.fixture
    if config.pluginmanager.hasplugin("asyncio"):  # in strict mode it only runs its own fixtures
        import pytest_asyncio

        fixture = pytest_asyncio.fixture
    plugin = ModuleType("pytest_weft_aio")
    plugin.weft_mesh_aio = fixture(weft_mesh_aio)  # type: ignore[attr-defined]
    config.pluginmanager.register(plugin, plugin.__name__)
