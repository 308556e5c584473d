"""The pool of threads that run handlers."""

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

SPARE_THREADS = 256
"""Threads beyond those for running handlers: for calls that wait for their request or a permit, and for streams."""

STALL_TIMEOUT = 0.5
"""Seconds that a call may wait for its request while others wait for its thread."""

STALL_CHECK_PERIOD = 0.1
"""Seconds between two checks for stalled calls, while work waits."""


class _Work:
    """A piece of work. ``handler_started``: the call's request has arrived, and its handler was called."""

    __slots__ = ("args", "fn", "future", "handler_started", "kwargs", "since")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.future: Future[Any] = Future()
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.since = math.inf
        self.handler_started = False

    def perform(self) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.fn(*self.args, **self.kwargs))
            except BaseException as error:
                self.future.set_exception(error)

    def evict(self) -> None:
        """Cancel the call that this belongs to, as if its client had."""
        # grpc waits for a unary call's request on the handler's thread, for as long as its client likes. Only this
        # private attribute can end that: a test holds it in place.
        for argument in self.args:
            call = getattr(argument, "call", None)
            if call is not None:
                call.cancel()


_thread = threading.local()


def mark_handler_started() -> None:
    """The call that this thread runs has reached its handler."""
    work = getattr(_thread, "work", None)
    if work is not None:
        work.handler_started = True


def iterate_responses(
    stream: Callable[..., object], threads: threading.Semaphore, request: Any, context: Any
) -> Iterator[Any]:
    """The responses of a callback handler (``experimental_non_blocking``), for callers that iterate.

    An interceptor that rebuilds a handler drops the attribute that marks it as a callback handler; each call then holds
    a thread. ``threads`` limits how many may. Calls beyond that get UNIMPLEMENTED: the client then treats the server as
    healthy (gRFC A17), and doesn't ask for its load again.
    """
    if not threads.acquire(blocking=False):
        details = "with interceptors on the server, each of these streams holds a thread; the limit is reached"
        context.abort(grpc.StatusCode.UNIMPLEMENTED, details)
    mark_handler_started()
    try:
        sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stream(request, context, sent.put)
        yield from iter(sent.get, None)
    finally:
        threads.release()


class ThreadPool(Executor):
    """Up to ``max_workers`` threads, started as needed, that never keep the process from exiting.

    The standard pool joins its threads at exit, so after a drain one handler that hangs would keep the process alive
    until it is killed. And when all threads of this pool are taken, stalled calls (whose clients never send the
    request) are cancelled to make room, so that they can't block a server.
    """

    def __init__(self, max_workers: int, name: str = "mesh-handler") -> None:
        self._max_workers = max_workers
        self._running: set[_Work] = set()
        self._making_room = False
        self._newest_first = False
        self._name = name
        self._work: deque[_Work] = deque()
        # True for each piece of work in the deque; False ends a thread.
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
        """Cancel stalled calls for as long as others wait for their threads."""
        pause = threading.Event()
        while self._work and not self._closed:
            pause.wait(STALL_CHECK_PERIOD)
            now = time.monotonic()
            for work in tuple(self._running):
                if not work.handler_started and now - work.since > STALL_TIMEOUT:
                    self._newest_first = True
                    work.evict()
        self._making_room = self._newest_first = False

    def _run(self) -> None:
        while self._tokens.get():
            try:
                # Many old calls are stalled then.
                work = self._work.pop() if self._newest_first else self._work.popleft()
            except IndexError:  # cancelled
                continue
            work.since = time.monotonic()
            _thread.work = work
            self._running.add(work)
            work.perform()
            self._running.discard(work)
            del work, _thread.work  # or a request would be kept until the thread gets other work
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
