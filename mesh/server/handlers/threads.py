"""Handlers that aren't async, on an aio server: each runs in a thread."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextvars import copy_context
from typing import Any

import grpc


class _ThreadContext:
    """The context of a handler that runs in a thread of an aio server: as a threaded server's, over the loop's."""

    __slots__ = ("_context", "_loop", "over")

    def __init__(self, context: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._context = context
        self._loop = loop
        self.over = False
        """The call has ended, or was cancelled; grpc says neither here. Set on the loop."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        asyncio.run_coroutine_threadsafe(self._context.abort(code, details, trailing_metadata), self._loop).result()

    def abort_with_status(self, status: Any) -> None:
        self.abort(status.code, status.details, status.trailing_metadata)

    def send_initial_metadata(self, metadata: Any) -> None:
        asyncio.run_coroutine_threadsafe(self._context.send_initial_metadata(metadata), self._loop).result()

    def is_active(self) -> bool:
        return not (self.over or self._context.done() or self._context.cancelled())

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if not self.is_active():
            return False
        self._loop.call_soon_threadsafe(self._add, callback)
        return True

    def _add(self, callback: Callable[[], None]) -> None:
        if self.over:  # since then: grpc calls no callback that comes later
            callback()
        else:
            self._context.add_done_callback(lambda _: callback())


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

    def entered(request: Any, context: Any) -> tuple[Callable[..., Awaitable[Any]], Any, _ThreadContext]:
        loop = asyncio.get_running_loop()
        enter = copy_context().run

        def run(step: Callable[..., Any], *args: Any) -> Awaitable[Any]:
            return loop.run_in_executor(pool, functools.partial(enter, step, *args))

        return run, _in_thread(request, loop) if request_streaming else request, _ThreadContext(context, loop)

    async def handle(request: Any, context: Any) -> Any:
        run, request, threaded = entered(request, context)
        try:
            return await run(behavior, request, threaded)
        finally:
            threaded.over = True

    async def handle_responses(request: Any, context: Any) -> AsyncIterator[Any]:
        run, request, threaded = entered(request, context)
        end = object()
        try:
            responses: Iterator[Any] = iter(await run(behavior, request, threaded))
            while (response := await run(next, responses, end)) is not end:
                yield response
        finally:
            threaded.over = True

    chosen = handle_responses if response_streaming else handle
    chosen.__qualname__ = getattr(behavior, "__qualname__", chosen.__qualname__)
    return chosen
