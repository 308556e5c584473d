"""Threads for handlers: the pool that runs them, and handlers that aren't async on an aio server."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import grpc

SPARE = 256
"""Threads beyond those for handlers at work: for calls that wait, for their request or their turn, and for streams."""

STALL = 0.5
"""Seconds that a call may wait for its request when others wait for its thread."""

LOOK = 0.1
"""Seconds between two looks for calls that stall, while work waits."""


class _Work:
    """What a thread is given. ``begun``: a call's request is here, and its handler was called."""

    __slots__ = ("args", "begun", "fn", "future", "kwargs", "since")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.future: Future[Any] = Future()
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.since = math.inf
        self.begun = False

    def perform(self) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.fn(*self.args, **self.kwargs))
            except BaseException as error:
                self.future.set_exception(error)

    def evict(self) -> None:
        """Cancel the call that this is of: it is gone as if its client had cancelled it."""
        # grpc waits for a unary call's request on the handler's thread, for as long as its client likes, and hands out
        # nothing to end that with but this, private: a test pins it.
        for argument in self.args:
            call = getattr(argument, "call", None)
            if call is not None:
                call.cancel()


_running = threading.local()


def begun() -> None:
    """The handler that this thread is for was called."""
    work = getattr(_running, "work", None)
    if work is not None:
        work.begun = True


def responses(stream: Callable[..., object], held: threading.Semaphore, request: Any, context: Any) -> Iterator[Any]:
    """The responses of a handler of the callback kind (``experimental_non_blocking``), for callers that iterate.

    An interceptor that rebuilds a handler drops the attribute that marks this kind; each call then holds a thread.
    ``held`` limits how many may. Beyond it the call gets UNIMPLEMENTED: the client then treats the server as healthy
    (gRFC A17), and doesn't ask for its load again.
    """
    if not held.acquire(blocking=False):
        details = "under interceptors each of these calls holds a thread; as many as may do"
        context.abort(grpc.StatusCode.UNIMPLEMENTED, details)
    begun()
    try:
        sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stream(request, context, sent.put)
        yield from iter(sent.get, None)
    finally:
        held.release()


class ThreadPool(Executor):
    """Up to ``max_workers`` threads, started as they are needed, that never keep the process from ending.

    The standard pool's are joined at exit, so that one handler that hangs would turn a finished drain into a process
    that has to be killed. And when all threads of this one are taken, calls that stall (their clients never send the
    request) make room for those that come, so that they can't hold a server up.
    """

    def __init__(self, max_workers: int, name: str = "mesh-handler") -> None:
        self._max_workers = max_workers
        self._at_work: set[_Work] = set()
        self._making_room = False
        self._newest_first = False
        self._name = name
        self._work: deque[_Work] = deque()
        # One for each that was put into the deque, True; False ends a thread.
        self._tokens: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        work = _Work(fn, args, kwargs)
        with self._lock:
            if self._closed:
                raise RuntimeError("the thread pool is shut down")
            self._work.append(work)
            self._tokens.put(True)
            if self._idle.acquire(blocking=False):
                return work.future
            if len(self._threads) < self._max_workers:
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
                return work.future
            if not self._making_room:
                self._making_room = True
                threading.Thread(target=self._make_room, name=f"{self._name}-room", daemon=True).start()
        return work.future

    def _make_room(self) -> None:
        """Evict calls that stall, for as long as others wait for their threads."""
        pause = threading.Event()
        while self._work and not self._closed:
            pause.wait(LOOK)
            now = time.monotonic()
            for work in tuple(self._at_work):
                if not work.begun and now - work.since > STALL:
                    self._newest_first = True
                    work.evict()
        self._making_room = self._newest_first = False

    def _run(self) -> None:
        while self._tokens.get():
            try:
                # Those that stall are many then, and old.
                work = self._work.pop() if self._newest_first else self._work.popleft()
            except IndexError:  # cancelled
                continue
            work.since = time.monotonic()
            _running.work = work
            self._at_work.add(work)
            work.perform()
            self._at_work.discard(work)
            del work, _running.work  # or a handler's request lives until the next one comes
            self._idle.release()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            self._closed = True
        while cancel_futures:
            try:
                self._work.pop().future.cancel()
            except IndexError:
                break
        for _ in self._threads:
            self._tokens.put(False)
        if wait:
            for thread in self._threads:
                thread.join()
