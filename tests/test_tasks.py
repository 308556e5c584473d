"""A background task that fails is logged and restarted, and what waits for it learns why."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random

import pytest

from mesh.tasks import keep_running, log_failure
from tests import clock


def test_a_task_that_fails_is_restarted_with_backoff(caplog: pytest.LogCaptureFixture) -> None:
    runs: list[float] = []
    causes: list[str] = []

    async def work() -> None:
        runs.append(asyncio.get_running_loop().time())
        if len(runs) < 4:
            raise ValueError("boom" if len(runs) < 3 else "bang")

    clock.run(keep_running("discovery", work, causes.append, where="mesh:///a", rng=random.Random(1)))
    pauses = [after - before for before, after in itertools.pairwise(runs)]
    assert pauses == [pytest.approx(pause, rel=0.2) for pause in (0.1, 0.2, 0.4)]
    assert causes == [
        f"discovery failed: ValueError: {what}; retrying in {pause:.1f} s"
        for what, pause in zip(("boom", "boom", "bang"), pauses, strict=True)
    ]
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


def test_a_task_that_awaits_something_cancelled_is_restarted() -> None:
    runs = []

    async def work() -> None:
        runs.append(1)
        if len(runs) == 1:
            cancelled = asyncio.get_running_loop().create_future()
            cancelled.cancel()
            await cancelled

    clock.run(keep_running("work", work))
    assert len(runs) == 2


@pytest.mark.parametrize(("lasts", "longest"), [(0.0, 5.0), (9.0, 5.0), (11.0, 0.1)])
def test_the_backoff_begins_anew_after_a_run_of_more_than_ten_seconds(lasts: float, longest: float) -> None:
    ended: list[float] = []
    pauses: list[float] = []

    async def work() -> None:
        now = asyncio.get_running_loop().time
        pauses.extend([now() - ended[-1]] if ended else [])
        await asyncio.sleep(lasts)
        ended.append(now())
        if len(ended) < 20:
            raise ValueError

    clock.run(keep_running("work", work))
    assert len(pauses) == 19
    assert pauses[-1] == pytest.approx(longest, rel=0.2)


async def test_the_failure_of_a_task_that_nobody_awaits_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        raise ValueError("boom")

    task = asyncio.create_task(work())
    task.add_done_callback(log_failure)
    await asyncio.wait([task])
    await asyncio.sleep(0)
    assert "failed: ValueError: boom" in caplog.text
