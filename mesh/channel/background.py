"""The one daemon thread of the sync world: an event loop for discovery, states and timers, shared by all sync channels.

It starts with the first call. A forked child has none of it and starts its own.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The loop, started if it isn't running."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="mesh-background", daemon=True).start()
        return _loop


def spawn(work: Coroutine[Any, Any, None]) -> Future[None]:
    """Run ``work`` on the loop; cancelling the future cancels it."""
    return asyncio.run_coroutine_threadsafe(work, loop())


class Timer:
    """Calls ``callback`` on the loop in ``delay`` seconds, unless cancelled before."""

    __slots__ = ("_handle", "_loop")

    def __init__(self, delay: float, callback: Callable[[], object]) -> None:
        self._loop = loop()
        self._handle: asyncio.Handle | None = self._loop.call_soon_threadsafe(self._start, delay, callback)

    def _start(self, delay: float, callback: Callable[[], object]) -> None:
        if self._handle is not None:
            self._handle = self._loop.call_later(delay, callback)

    def cancel(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._loop.call_soon_threadsafe(handle.cancel)


def _forked() -> None:
    global _loop, _lock
    _lock, _loop = threading.Lock(), None


os.register_at_fork(after_in_child=_forked)
