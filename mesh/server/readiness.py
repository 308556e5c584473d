"""Waiting until a server's dependencies are available."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from mesh.config.settings import RetryPolicy
from mesh.policy.call.backoff import Backoff

LOG = logging.getLogger("mesh.server")

_BACKOFF = RetryPolicy(max_attempts=2, initial_backoff=0.1, max_backoff=1.0)


class Readiness:
    """Calls the ``ready`` hook; an exception means not ready. ``backoff``: the delay before the next call."""

    def __init__(self, ready: Callable[[], Any] | None) -> None:
        self._ready = ready
        self._logged = ""
        self.backoff = Backoff(_BACKOFF)

    @property
    def given(self) -> bool:
        """Whether there is a hook."""
        return self._ready is not None

    async def ask(self, pool: Executor | None = None) -> bool:
        """Whether the server is ready. A hook that isn't async runs in ``pool``, or on this thread without one."""
        if self._ready is None:
            return True
        try:
            if pool is None or inspect.iscoroutinefunction(self._ready):
                answer = self._ready()
            else:
                answer = await asyncio.get_running_loop().run_in_executor(pool, self._ready)
            answer = bool(await answer if inspect.isawaitable(answer) else answer)
            reason = "" if answer else "not yet"
        except Exception as error:  # a dependency is unavailable, in whatever way
            answer, reason = False, f"{type(error).__name__}: {error}"
        if reason and reason != self._logged:
            LOG.warning("not ready; checking again: %s", reason)
        self._logged = reason
        return answer
