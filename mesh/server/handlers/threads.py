"""Handlers on an aio server that aren't async: each runs in a thread."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextvars import copy_context
from typing import Any

import grpc

from mesh.server.handlers.scope import Behavior, named_after


class _ThreadContext:
    """A threaded server's context for a handler that runs in a thread of an aio server; calls go to the loop."""

    __slots__ = ("_context", "_loop", "ended")

    def __init__(self, context: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._context = context
        self._loop = loop
        self.ended = False
        """The call has ended or was cancelled; grpc.aio reports neither here. Set on the loop."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        asyncio.run_coroutine_threadsafe(self._context.abort(code, details, trailing_metadata), self._loop).result()

    def abort_with_status(self, status: Any) -> None:
        self.abort(status.code, status.details, status.trailing_metadata)

    def send_initial_metadata(self, metadata: Any) -> None:
        asyncio.run_coroutine_threadsafe(self._context.send_initial_metadata(metadata), self._loop).result()

    def is_active(self) -> bool:
        return not (self.ended or self._context.done() or self._context.cancelled())

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if not self.is_active():
            return False
        self._loop.call_soon_threadsafe(self._add, callback)
        return True

    def _add(self, callback: Callable[[], None]) -> None:
        if self.ended:  # since then; grpc.aio calls no callback that is added later
            callback()
        else:
            self._context.add_done_callback(lambda _: callback())


def _in_thread(requests: AsyncIterable[Any], loop: asyncio.AbstractEventLoop) -> Iterator[Any]:
    # Runs when the handler first reads: an async generator that is never read warns.
    messages = aiter(requests)

    async def receive() -> Any:
        return await anext(messages, None)  # a message is never None

    while (request := asyncio.run_coroutine_threadsafe(receive(), loop).result()) is not None:
        yield request


def async_behavior(
    behavior: Behavior, pool: Executor | None, *, request_streaming: bool, response_streaming: bool
) -> Behavior:
    """An async handler that runs one that isn't in ``pool``, in the call's context. So does each step of its responses.

    grpc.aio runs such handlers, too, but outside of the call's context, and doesn't tell them when the call is
    cancelled.
    """

    def in_context(request: Any, context: Any) -> tuple[Callable[..., Awaitable[Any]], Any, _ThreadContext]:
        loop = asyncio.get_running_loop()
        enter = copy_context().run

        def run(step: Callable[..., Any], *args: Any) -> Awaitable[Any]:
            return loop.run_in_executor(pool, functools.partial(enter, step, *args))

        return run, _in_thread(request, loop) if request_streaming else request, _ThreadContext(context, loop)

    async def handle(request: Any, context: Any) -> Any:
        run, request, threaded = in_context(request, context)
        try:
            return await run(behavior, request, threaded)
        finally:
            threaded.ended = True

    async def handle_responses(request: Any, context: Any) -> AsyncIterator[Any]:
        run, request, threaded = in_context(request, context)
        end = object()
        try:
            responses: Iterator[Any] = iter(await run(behavior, request, threaded))
            while (response := await run(next, responses, end)) is not end:
                yield response
        finally:
            threaded.ended = True

    return named_after(behavior, handle_responses if response_streaming else handle)
