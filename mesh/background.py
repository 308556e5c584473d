"""The one daemon thread of the sync world: an event loop for discovery, states and timers, shared by all sync channels.

It starts with the first call. A forked child has none of it and starts its own (``forking.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import grpc

from mesh.tasks import log_failure

_LOG = logging.getLogger("mesh.channel")

NAME = "mesh-background"

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
            _loop.set_exception_handler(_failed)
            threading.Thread(target=_run, args=(_loop,), name=NAME, daemon=True).start()
        return _loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            loop.run_forever()
        except BaseException:  # SystemExit, which asyncio lets through: every channel needs this thread
            _LOG.exception("the background thread was interrupted, and goes on")


def spawn(work: Coroutine[Any, Any, None]) -> Future[None]:
    """Run ``work`` on the loop; cancelling the future cancels it. It inherits no context: it outlives who starts it."""
    future = contextvars.Context().run(asyncio.run_coroutine_threadsafe, work, loop())
    future.add_done_callback(log_failure)
    return future


def call(callback: Callable[[], object]) -> None:
    """Call ``callback`` on the loop soon. It may block as briefly as arithmetic does."""
    loop().call_soon_threadsafe(callback)


def call_from_finalizer(callback: Callable[[], object]) -> None:
    """As ``call``, but takes no lock: garbage is collected in any thread, which may hold any lock. Does nothing where
    the loop was never started."""
    if _loop is not None:
        _loop.call_soon_threadsafe(callback)


def _failed(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what a callback raised, and an exception that nobody took from its task."""
    if OLD_CORE and isinstance(context.get("exception"), BlockingIOError):
        return  # grpc.aio's, where several loops are in use; no call fails by it (grpc/grpc#42357)
    _LOG.error("%s: %r", context["message"], context.get("handle"), exc_info=context.get("exception"))


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


def pause(works: Sequence[Callable[[], Coroutine[Any, Any, None]]], within: float) -> None:
    """Run ``works`` on the loop, and wait for them for up to ``within`` seconds."""
    if _loop is not None and works and not _here():
        future = contextvars.Context().run(asyncio.run_coroutine_threadsafe, _all(works), _loop)
        with contextlib.suppress(TimeoutError):
            future.result(within)


def hold(within: float) -> Callable[[], object]:
    """Have the loop's thread stand still, outside of gRPC, until what is returned is called. Waits for that for up to
    ``within`` seconds."""
    released = threading.Event()
    if _loop is not None and not _here():
        held = threading.Event()

        def stand() -> None:
            held.set()
            released.wait()

        _loop.call_soon_threadsafe(stand)
        held.wait(within)
    return released.set


def forked() -> object:
    """In a forked child: forget the parent's loop, and return it. It must not be closed here: its selector is shared
    with the parent's."""
    global _loop, _lock
    left, _loop, _lock = _loop, None, threading.Lock()
    return left


async def _all(works: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    await asyncio.gather(*(work() for work in works))


def _here() -> bool:
    """Whether this is the loop's own thread, which can't wait for itself."""
    return threading.current_thread().name == NAME
