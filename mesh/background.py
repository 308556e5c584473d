"""The background thread of blocking channels: one event loop for the discovery, states and timers of all of them.

A daemon thread that starts with the first call. A forked child starts its own (``forking.py``).
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
"""Before 1.80 core does IO only while a thread waits in it: otherwise nothing connects, and no health updates arrive. A
channel with a subscriber has such a thread, and one such channel serves the whole process."""

_insecure_channel = grpc.insecure_channel  # programs may replace it with the mesh's own

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_io_channel: grpc.Channel | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The loop; starts it if necessary."""
    global _loop, _io_channel
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            if OLD_CORE:
                _io_channel = _insecure_channel("ipv4:127.0.0.1:1")  # never connects
                _io_channel.subscribe(lambda _: None)
            _loop.set_exception_handler(_log_exception)
            threading.Thread(target=_run, args=(_loop,), name=NAME, daemon=True).start()
        return _loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            loop.run_forever()
        except BaseException:  # asyncio lets SystemExit through, but every channel needs this thread
            _LOG.exception("the background thread was interrupted; continuing")


def spawn(work: Coroutine[Any, Any, None]) -> Future[None]:
    """Run ``work`` on the loop; cancelling the future cancels it. It inherits no context, because it outlives its
    caller."""
    future = contextvars.Context().run(asyncio.run_coroutine_threadsafe, work, loop())
    future.add_done_callback(log_failure)
    return future


def call(callback: Callable[[], object]) -> None:
    """Call ``callback`` on the loop soon. It must not block."""
    loop().call_soon_threadsafe(callback)


def call_from_finalizer(callback: Callable[[], object]) -> None:
    """Like ``call``, but takes no lock: garbage collection runs in any thread, which may hold any lock. Does nothing if
    the loop was never started."""
    if _loop is not None:
        _loop.call_soon_threadsafe(callback)


def _log_exception(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log exceptions raised by callbacks, and those of tasks that nobody retrieved."""
    if OLD_CORE and isinstance(context.get("exception"), BlockingIOError):
        return  # grpc.aio's, with several loops in use; no call fails because of it (grpc/grpc#42357)
    _LOG.error("%s: %r", context["message"], context.get("handle"), exc_info=context.get("exception"))


class Timer:
    """Calls ``callback`` on the loop after ``delay`` seconds, unless cancelled. Thread-safe."""

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


def pause(works: Sequence[Callable[[], Coroutine[Any, Any, None]]], timeout: float) -> None:
    """Run ``works`` on the loop and wait for them, at most ``timeout`` seconds."""
    if _loop is not None and works and not _here():
        future = contextvars.Context().run(asyncio.run_coroutine_threadsafe, _all(works), _loop)
        with contextlib.suppress(TimeoutError):
            future.result(timeout)


def hold(timeout: float) -> Callable[[], object]:
    """Block the loop's thread, outside of gRPC, until the returned function is called. Waits at most ``timeout``
    seconds for that."""
    released = threading.Event()
    if _loop is not None and not _here():
        blocked = threading.Event()

        def block() -> None:
            blocked.set()
            released.wait()

        _loop.call_soon_threadsafe(block)
        blocked.wait(timeout)
    return released.set


def forked() -> object:
    """In a forked child: forget the parent's loop and return it. It must not be closed: the parent shares its
    selector."""
    global _loop, _lock
    inherited, _loop, _lock = _loop, None, threading.Lock()
    return inherited


async def _all(works: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    await asyncio.gather(*(work() for work in works))


def _here() -> bool:
    """Whether this is the loop's own thread, which can't wait for itself."""
    return threading.current_thread().name == NAME
