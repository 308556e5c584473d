"""Fixtures for every test, and the leak check after each: no thread, task or open connection outlives the test that
made it, and nothing stays counted as in flight."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh import background, forking
from tests.processes import Spawn, free_ports

SETTLE = 5.0
"""Seconds that threads and tasks have to end after a test."""

# Threads that serve the process and not a test: the mesh's one background thread; gRPC's asyncio poller, which lives as
# long as grpc.aio is in use anywhere; core's own threads, once one has run Python for call credentials; what the test
# runner itself runs (xdist, pytest-timeout, coverage). All other threads of the mesh have to end.
LASTING = (background.NAME, "_poll_wrapper", "Dummy-", "execnet", "pytest", "MainThread")
if background.OLD_CORE:
    background.loop()  # starts the thread that waits in core, whose name says nothing
    # grpc.aio's own noise where event loops share a process (docs/compatibility.md); tests of log lines don't mean it.
    logging.getLogger("asyncio").addFilter(
        lambda record: not (record.exc_info and record.exc_info[0] is BlockingIOError)
    )


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Ports on 127.0.0.1 that nothing listens on: a new one for each call."""
    return lambda: free_ports(1)[0]


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Programs that end with the test: ``spawn.python("-m", "mesh.registry", environment={...}).wait_for("ready")``."""
    spawn = Spawn(tmp_path)
    yield spawn
    spawn.close()


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Fails the test that leaves a thread behind."""
    before = set(threading.enumerate())
    yield
    left = _settled(before)
    if left:
        pytest.fail(f"threads left behind: {', '.join(sorted(thread.name for thread in left))}", pytrace=False)


@pytest.fixture(autouse=True)
def no_channel_left(no_thread_left: None) -> Iterator[None]:
    """Fails the test that leaves a mesh channel open, or whose channels count as in flight what is over."""
    before = _pools()
    yield
    new = _pools() - before
    end = time.monotonic() + SETTLE
    while left := [why for pool in new for why in _left(pool)]:
        if time.monotonic() > end:
            pytest.fail(f"channels left behind: {', '.join(sorted(left))}", pytrace=False)
        gc.collect()
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_leak(no_channel_left: None, request: pytest.FixtureRequest) -> None:
    """All checks in their order: around all that the test asks for, the channels' and threads' around the loop, too."""
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("no_task_left")


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Fails an asynchronous test that leaves a task running; the loop's end would cancel it in silence."""
    before = asyncio.all_tasks()
    yield
    end = time.monotonic() + SETTLE
    while left := asyncio.all_tasks() - before - {asyncio.current_task()}:
        if time.monotonic() > end:
            pytest.fail(f"tasks left behind: {', '.join(sorted(map(repr, left)))}", pytrace=False)
        await asyncio.sleep(0.005)


def _pools() -> set[Any]:
    """What is behind each mesh channel of this process that was used and still lives."""
    channels: list[Any] = list(forking._state.channels)
    return {channel.assembly.pool for channel in channels} | set(forking._state.pools)


def _left(pool: Any) -> Iterator[str]:
    """What a closed channel would not have."""
    yield from (
        repr(subchannel)
        for subchannel in pool.subchannels()
        if subchannel._channel is not None and not subchannel.closed
    )
    yield from (repr(node) for node in pool.cluster.nodes.values() if node.in_flight)


def _settled(before: set[threading.Thread]) -> set[threading.Thread]:
    """The threads that are new since ``before`` and don't end within SETTLE seconds."""
    end = time.monotonic() + SETTLE
    collected = False
    while True:
        left = {
            thread
            for thread in threading.enumerate()
            if thread not in before and not any(name in thread.name for name in LASTING)
        }
        if not left or time.monotonic() > end:
            return left
        if not collected:
            # gRPC's channels and servers end their threads when they are collected, at the latest.
            gc.collect()
            collected = True
        time.sleep(0.005)
