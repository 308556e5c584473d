"""Background tasks that don't end by surprise: one that fails is logged and restarted."""

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
"""Between two starts of a task that keeps failing."""

STEADY = 10.0
"""A task that ran this long before it failed is restarted after the initial backoff. Seconds."""


async def keep_running(
    name: str,
    work: Callable[[], Coroutine[Any, Any, None]],
    failed: Callable[[str], object] | None = None,
    *,
    where: str = "",
    rng: random.Random | None = None,
) -> None:
    """Run ``work`` until it returns; when it raises, log that and start it again, with backoff.

    ``name`` is what the log and errors call it, and ``where`` is the log's prefix. ``failed`` is called with each
    failure and its cause, to fail what waits for the task. The same failure is logged once, with its traceback.
    """
    rng = rng or random.Random()
    loop = asyncio.get_running_loop()
    backoff = Backoff(BACKOFF)
    logged = ""
    while True:
        begun = loop.time()
        try:
            await work()
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _cancelled():
                raise
            cause = f"{name} failed: {type(error).__name__}: {error}"
            if loop.time() - begun > STEADY:
                backoff.reset()
            delay = backoff.delay(rng)
            if cause != logged:
                logged = cause
                _LOG.exception("%s%s; retrying in %.1f s", where and f"{where}: ", cause, delay)
        else:
            return
        if failed is not None:
            failed(f"{cause}; retrying in {delay:.1f} s")
        await asyncio.sleep(delay)


def _cancelled() -> bool:
    """Whether this task is being cancelled, and did not just await something else that was."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def log_failure(task: asyncio.Future[None] | futures.Future[None]) -> None:
    """A done callback for a task that nobody awaits: log its exception."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _LOG.error("%r failed: %s: %s", task, type(error).__name__, error, exc_info=error)
