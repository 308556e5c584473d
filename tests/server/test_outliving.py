"""Work that a handler starts and that outlives its call, in both worlds: the call's deadline and cancellation are the
handler's affair, and over with it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import copy_context
from typing import Any

import grpc
import pytest

import mesh
import mesh.aio
from mesh import context as mesh_context
from mesh.context import Scope
from tests.processes import eventually
from tests.server.test_deadlines import KINDS, acall, asynchronous, call, threaded

BOUND = 20.0
SHORT = 0.2  # seconds that the inbound call has


def downstream(seen: list[dict[str, Any]]) -> Callable[..., bytes]:
    def handle(request: bytes, context: Any) -> bytes:
        seen.append(dict(context.invocation_metadata()))
        return b"done"

    return handle


def over(scopes: list[Scope]) -> None:
    """Wait until the inbound call's deadline has passed."""
    (scope,) = scopes
    deadline = scope.deadline
    assert deadline is not None
    eventually(lambda: time.monotonic() > deadline, what="the deadline has passed")


@pytest.mark.slow
async def test_a_task_that_a_handler_started_works_on_when_its_deadline_has_passed() -> None:
    seen: list[dict[str, Any]] = []
    scopes: list[Scope] = []
    wanted: asyncio.Queue[None] = asyncio.Queue()
    worked: asyncio.Queue[Any] = asyncio.Queue()
    workers: list[asyncio.Task[None]] = []

    async def work(unary: Any) -> None:
        while True:
            await wanted.get()
            try:
                await worked.put((await unary(b"a"), mesh.remaining()))
            except grpc.aio.AioRpcError as error:
                await worked.put(error)

    with threaded("unary_unary", downstream(seen)) as below:
        target = below._channel.target().decode()  # type: ignore[attr-defined]
        async with mesh.aio.insecure_channel(target) as channel:

            async def handle(request: bytes, context: Any) -> bytes:
                scope = mesh_context.current()
                assert scope is not None
                scopes.append(scope)
                workers.append(asyncio.create_task(work(channel.unary_unary("/test/Method"))))
                return b"started"

            async with asynchronous("unary_unary", handle) as above:
                metadata = (("weft-criticality", "SHEDDABLE"),)
                assert await acall(above, "unary_unary", timeout=SHORT, metadata=metadata) == [b"started"]
                over(scopes)
                await wanted.put(None)
                async with asyncio.timeout(BOUND):
                    assert await worked.get() == (b"done", None)
                workers[0].cancel()
                await asyncio.wait(workers)
    assert "weft-criticality" not in seen[0]


@pytest.mark.slow
def test_a_thread_that_a_handler_gave_its_context_works_on_when_its_deadline_has_passed() -> None:
    seen: list[dict[str, Any]] = []
    scopes: list[Scope] = []
    wanted = threading.Event()
    worked: list[Any] = []
    workers: list[threading.Thread] = []

    def work(unary: Any) -> None:
        wanted.wait(BOUND)
        try:
            worked.append((unary(b"a"), unary.future(b"a").result(BOUND), mesh.remaining()))
        except grpc.RpcError as error:
            worked.append(error)

    with threaded("unary_unary", downstream(seen)) as below:
        target = below._channel.target().decode()  # type: ignore[attr-defined]
        with mesh.insecure_channel(target) as channel:

            def handle(request: bytes, context: Any) -> bytes:
                scope = mesh_context.current()
                assert scope is not None
                scopes.append(scope)
                run = copy_context().run
                workers.append(threading.Thread(target=run, args=(work, channel.unary_unary("/test/Method"))))
                workers[0].start()
                return b"started"

            with threaded("unary_unary", handle) as above:
                assert call(above, "unary_unary", timeout=SHORT) == [b"started"]
                over(scopes)
                wanted.set()
                workers[0].join(BOUND)
    assert worked == [(b"done", b"done", None)]


# -- every way that a handler ends

ENDINGS = ("returns", "raises", "aborts", "is cancelled")


def sync_behavior(kind: str, ending: str, scopes: list[Scope]) -> Callable[..., Any]:
    def end(context: Any) -> None:
        scope = mesh_context.current()
        assert scope is not None
        scopes.append(scope)
        if ending == "raises":
            raise ValueError("of the handler")
        if ending == "aborts":
            context.abort(grpc.StatusCode.ABORTED, "by the handler")
        if ending == "is cancelled":
            eventually(lambda: not context.is_active())

    def unary(request: Any, context: Any) -> bytes:
        end(context)
        return b"end"

    def stream(request: Any, context: Any) -> Iterator[bytes]:
        yield b"first"
        end(context)

    return stream if kind.endswith("stream") else unary


def aio_behavior(kind: str, ending: str, scopes: list[Scope]) -> Callable[..., Any]:
    async def end(context: Any) -> None:
        scope = mesh_context.current()
        assert scope is not None
        scopes.append(scope)
        if ending == "raises":
            raise ValueError("of the handler")
        if ending == "aborts":
            await context.abort(grpc.StatusCode.ABORTED, "by the handler")
        if ending == "is cancelled":
            await asyncio.Event().wait()

    async def unary(request: Any, context: Any) -> bytes:
        await end(context)
        return b"end"

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await end(context)

    return stream if kind.endswith("stream") else unary


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_threads_scope_ends_with_its_handler_however_that_ends(kind: str, ending: str) -> None:
    scopes: list[Scope] = []
    with threaded(kind, sync_behavior(kind, ending, scopes)) as channel:
        if ending == "is cancelled":
            made: Any = getattr(channel, kind)("/test/Method")
            request: Any = iter([b"a"]) if kind.startswith("stream") else b"a"
            running = made(request, timeout=BOUND) if kind.endswith("stream") else made.future(request, timeout=BOUND)
            eventually(lambda: scopes)
            running.cancel()
        else:
            with contextlib.suppress(grpc.RpcError):
                call(channel, kind)
        eventually(lambda: scopes[0].closed)
    assert scopes[0].cancelled == (ending == "is cancelled")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_tasks_scope_ends_with_its_handler_however_that_ends(kind: str, ending: str) -> None:
    scopes: list[Scope] = []

    async def until(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(BOUND):
            while not condition():  # noqa: ASYNC110 - what it asks has no event
                await asyncio.sleep(0.005)

    async with asynchronous(kind, aio_behavior(kind, ending, scopes)) as channel:
        if ending == "is cancelled":
            made: Any = getattr(channel, kind)("/test/Method")
            running = made(iter([b"a"]) if kind.startswith("stream") else b"a", timeout=BOUND)
            await until(lambda: scopes)
            running.cancel()
        else:
            with contextlib.suppress(grpc.RpcError):
                await acall(channel, kind)
        await until(lambda: scopes[0].closed)
    assert scopes[0].cancelled == (ending == "is cancelled")


@pytest.mark.slow
async def test_a_stream_whose_client_leaves_while_it_sends_is_closed_with_all_that_it_made() -> None:
    """Nobody is in the handler then: gRPC lets go of the generator, and its loop closes it."""
    scopes: list[Scope] = []
    closed: list[str] = []

    async def endless(request: Any, context: Any) -> AsyncIterator[bytes]:
        scope = mesh_context.current()
        assert scope is not None
        scopes.append(scope)
        try:
            while True:
                yield bytes(100_000)
        finally:
            closed.append("handler")

    async with asynchronous("unary_stream", endless) as channel:
        made: Any = channel.unary_stream("/test/Method")
        running = made(b"a", timeout=BOUND)
        await running.read()  # no more: the window fills up, and the server waits in sending
        scopes[0].adopt(closed, lambda: closed.append("child"))
        running.cancel()
        async with asyncio.timeout(BOUND):
            while len(closed) < 2:  # noqa: ASYNC110 - what it asks has no event
                await asyncio.sleep(0.005)
    assert sorted(closed) == ["child", "handler"]
    assert scopes[0].closed
