"""A background task that fails is logged and restarted, and what waits for it learns why."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from mesh import tasks
from mesh.config.settings import RetryPolicy
from mesh.tasks import keep_running, log_failure


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "BACKOFF", RetryPolicy(max_attempts=2, initial_backoff=0.001, max_backoff=0.004))


async def test_a_task_that_fails_is_restarted(caplog: pytest.LogCaptureFixture) -> None:
    runs: list[int] = []
    causes: list[str] = []

    async def work() -> None:
        runs.append(1)
        if len(runs) < 4:
            raise ValueError("boom" if len(runs) < 3 else "bang")

    await keep_running("discovery", work, causes.append, where="mesh:///a", rng=random.Random(1))
    assert len(runs) == 4
    assert causes[0] == "discovery failed: ValueError: boom; retrying in 0.0 s"
    assert len(causes) == 3
    # The same failure is logged once, with its traceback.
    logged = [record for record in caplog.records if record.name == "mesh.tasks"]
    assert [record.getMessage().split(";")[0] for record in logged] == [
        "mesh:///a: discovery failed: ValueError: boom",
        "mesh:///a: discovery failed: ValueError: bang",
    ]
    assert all(record.levelno == logging.ERROR and record.exc_info for record in logged)


async def test_a_task_that_is_cancelled_ends() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(keep_running("work", work))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_task_that_awaits_something_cancelled_is_restarted() -> None:
    runs = []

    async def work() -> None:
        runs.append(1)
        if len(runs) == 1:
            cancelled = asyncio.get_running_loop().create_future()
            cancelled.cancel()
            await cancelled

    await keep_running("work", work)
    assert len(runs) == 2


async def test_a_failure_after_a_long_run_starts_the_backoff_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "STEADY", -1.0)
    causes: list[str] = []
    runs = []

    async def work() -> None:
        runs.append(1)
        if len(runs) < 20:
            raise ValueError

    async with asyncio.timeout(5):
        await keep_running("work", work, causes.append)
    assert len(causes) == 19


async def test_the_failure_of_a_task_that_nobody_awaits_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        raise ValueError("boom")

    task = asyncio.create_task(work())
    task.add_done_callback(log_failure)
    await asyncio.wait([task])
    await asyncio.sleep(0)
    assert "failed: ValueError: boom" in caplog.text
