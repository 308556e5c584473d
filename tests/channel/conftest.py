"""Servers that the channels' tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.channel.suite import Server


@pytest.fixture(scope="package")
def servers() -> Iterator[list[Server]]:
    """Three servers alike."""
    servers = [Server() for _ in range(3)]
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def server(servers: list[Server]) -> Iterator[Server]:
    """One of them, which the test leaves idle."""
    yield servers[0]
    for server in servers:
        server.wait_until_idle()
