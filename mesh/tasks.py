"""Background tasks: one that fails is logged and restarted."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from concurrent import futures
from typing import Any

from mesh.config.settings import RetryPolicy
from mesh.policy.call.backoff import Backoff

_LOG = logging.getLogger("mesh.tasks")

BACKOFF = RetryPolicy(max_attempts=2, initial_backoff=0.1, max_backoff=5.0)
"""The delays between restarts of a task that keeps failing."""

STEADY = 10.0
"""A task that ran for this long before it failed is restarted after the initial backoff. Seconds."""


async def keep_running(
    name: str,
    work: Callable[[], Coroutine[Any, Any, None]],
    on_failure: Callable[[str], object] | None = None,
    *,
    where: str = "",
    rng: random.Random | None = None,
) -> None:
    """Run ``work`` until it returns. When it raises, log the exception and restart it, with backoff.

    ``name`` is the task's name in logs and errors, ``where`` a prefix in logs. ``on_failure`` is called with the cause
    of each failure, to fail whatever waits for the task. Repeated failures are logged once, with a traceback.
    """
    rng = rng or random.Random()
    loop = asyncio.get_running_loop()
    backoff = Backoff(BACKOFF)
    logged = ""
    while True:
        started = loop.time()
        try:
            await work()
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _cancelled():
                raise
            cause = f"{name} failed: {type(error).__name__}: {error}"
            if loop.time() - started > STEADY:
                backoff.reset()
            delay = backoff.delay(rng)
            if cause != logged:
                logged = cause
                _LOG.exception("%s%s; retrying in %.1f s", where and f"{where}: ", cause, delay)
        else:
            return
        if on_failure is not None:
            on_failure(f"{cause}; retrying in {delay:.1f} s")
        await asyncio.sleep(delay)


def _cancelled() -> bool:
    """Whether this task itself is being cancelled, rather than something that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def log_failure(task: asyncio.Future[None] | futures.Future[None]) -> None:
    """A done callback that logs the exception of a task that nobody awaits."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _LOG.error("%r failed: %s: %s", task, type(error).__name__, error, exc_info=error)
