"""The one daemon thread of the sync world: an event loop for discovery, states and timers, shared by all sync channels.

It starts with the first call. A forked child has none of it and starts its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import grpc

OLD_CORE = tuple(int(part) for part in grpc.__version__.split(".")[:2]) < (1, 80)
"""Before 1.80 core reads and writes only while a thread waits in it: where none does, nothing connects and no health is
received. A channel with a subscriber has such a thread, and that serves all channels of the process."""

_insecure_channel = grpc.insecure_channel  # a program may replace it by the mesh's own

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_waiting: grpc.Channel | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The loop, started if it isn't running."""
    global _loop, _waiting
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            if OLD_CORE:
                _waiting = _insecure_channel("ipv4:127.0.0.1:1")  # it never connects
                _waiting.subscribe(lambda _: None)
            threading.Thread(target=_loop.run_forever, name="mesh-background", daemon=True).start()
        return _loop


def spawn(work: Coroutine[Any, Any, None]) -> Future[None]:
    """Run ``work`` on the loop; cancelling the future cancels it. It inherits no context: it outlives who starts it."""
    return contextvars.Context().run(asyncio.run_coroutine_threadsafe, work, loop())


def call(callback: Callable[[], object]) -> None:
    """Call ``callback`` on the loop soon. It may block as briefly as arithmetic does."""
    loop().call_soon_threadsafe(callback)


class Timer:
    """Calls ``callback`` on the loop in ``delay`` seconds, unless cancelled before. Safe from any thread."""

    __slots__ = ("_callback", "_handle", "_loop")

    def __init__(self, delay: float, callback: Callable[[], object]) -> None:
        self._callback: Callable[[], object] | None = callback
        self._handle: asyncio.Handle | None = None
        self._loop = loop()
        self._loop.call_soon_threadsafe(self._start, delay)

    def cancel(self) -> None:
        self._callback = None
        self._loop.call_soon_threadsafe(self._stop)

    def _start(self, delay: float) -> None:
        if self._callback is not None:
            self._handle = self._loop.call_later(delay, self._run)

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _run(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


def _forked() -> None:
    global _loop, _lock
    _lock, _loop = threading.Lock(), None


os.register_at_fork(after_in_child=_forked)
