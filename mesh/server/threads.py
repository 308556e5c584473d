"""Threads for handlers: the pool that runs them, and handlers that aren't async on an aio server."""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from concurrent.futures import Executor, Future
from contextvars import copy_context
from typing import Any

import grpc

_Work = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class ThreadPool(Executor):
    """Up to ``max_workers`` threads, started as they are needed, that never keep the process from ending.

    The standard pool's are joined at exit, so that one handler that hangs would turn a finished drain into a process
    that has to be killed.
    """

    def __init__(self, max_workers: int, name: str = "mesh-handler") -> None:
        self._max_workers = max_workers
        self._name = name
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the thread pool is shut down")
            self._work.put((future, fn, args, kwargs))
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._max_workers:
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            _perform(*work)
            del work  # or a handler's request lives until the next one comes
            self._idle.release()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            self._closed = True
        while cancel_futures:
            try:
                work = self._work.get_nowait()
            except queue.Empty:
                break
            if work is not None:
                work[0].cancel()
        for _ in self._threads:
            self._work.put(None)
        if wait:
            for thread in self._threads:
                thread.join()


def _perform(future: Future[Any], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)


class _ThreadContext:
    """The context of a handler that runs in a thread of an aio server: as a threaded server's, over the loop's."""

    __slots__ = ("_context", "_loop")

    def __init__(self, context: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._context = context
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        asyncio.run_coroutine_threadsafe(self._context.abort(code, details, trailing_metadata), self._loop).result()

    def abort_with_status(self, status: Any) -> None:
        self.abort(status.code, status.details, status.trailing_metadata)

    def send_initial_metadata(self, metadata: Any) -> None:
        asyncio.run_coroutine_threadsafe(self._context.send_initial_metadata(metadata), self._loop).result()

    def is_active(self) -> bool:
        return not (self._context.done() or self._context.cancelled())

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if not self.is_active():
            return False
        self._loop.call_soon_threadsafe(self._context.add_done_callback, lambda _: callback())
        return True


def _in_thread(requests: AsyncIterable[Any], loop: asyncio.AbstractEventLoop) -> Iterator[Any]:
    # Begun when the handler begins to read: a generator that is made and never read warns.
    messages = aiter(requests)

    async def receive() -> Any:
        return await anext(messages, None)  # a message is never None

    while (request := asyncio.run_coroutine_threadsafe(receive(), loop).result()) is not None:
        yield request


def async_behavior(
    behavior: Callable[..., Any], pool: Executor | None, *, request_streaming: bool, response_streaming: bool
) -> Callable[..., Any]:
    """A handler that isn't async as one that is. It runs in ``pool``, each step of its responses too, in the call's
    context.

    grpc runs such handlers on an aio server as well, but outside of the call's context, and it doesn't let them know
    when the call is cancelled.
    """

    async def handle(request: Any, context: Any) -> Any:
        loop = asyncio.get_running_loop()
        enter = copy_context().run

        def run(step: Callable[..., Any], *args: Any) -> Awaitable[Any]:
            return loop.run_in_executor(pool, functools.partial(enter, step, *args))

        if request_streaming:
            request = _in_thread(request, loop)
        threaded = _ThreadContext(context, loop)
        if not response_streaming:
            return await run(behavior, request, threaded)
        end = object()
        responses: Iterator[Any] = iter(await run(behavior, request, threaded))
        while (response := await run(next, responses, end)) is not end:
            await context.write(response)
        return None

    handle.__qualname__ = getattr(behavior, "__qualname__", handle.__qualname__)
    return handle
