"""Handlers behind a gate: they begin with a permit, or the call is refused and they never do.

A unary call holds its permit until its handler is through. A stream needs one to begin and then gives it back, as how
long it lasts says nothing of how busy the server is; streams that are open are counted apart. When a drain has waited
for them long enough they end with UNAVAILABLE, so that their clients resume elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from mesh import context as mesh_context
from mesh.context import Scope
from mesh.policy.admission import Reason
from mesh.policy.limiter import Ending, Latency
from mesh.server.gate import AioGate, Gate, ThreadGate, criticality_of

Behavior = Callable[..., Any]


def _scope() -> Scope:
    scope = mesh_context.inbound()
    assert scope is not None  # entered by what stands around
    return scope


def _unfit(gate: Gate, latency: Latency, scope: Scope, now: float) -> Reason | None:
    """Why a call that has its permit shouldn't begin; it has given the permit back then."""
    if scope.deadline is None:
        return None
    reason = gate.admission.unfit(latency, scope.deadline - now, criticality_of(scope.criticality), now)
    if reason is not None:
        gate.admission.release()
        gate.settle()
    return reason


# -- threads ----------------------------------------------------------------------------------------------------------


def _refuse(gate: Gate, reason: Reason, context: Any, *, begun: bool = False) -> None:
    code, details, trailers = gate.refusal(reason, begun=begun)
    context.set_trailing_metadata(trailers)
    context.abort(code, details)


def _admitted(gate: ThreadGate, latency: Latency, context: Any) -> float:
    """Wait for a permit; when it was had. Ends the call when there is none."""
    scope = _scope()
    criticality = criticality_of(scope.criticality)
    if not gate.admission.enter(criticality):
        reason = gate.wait(criticality, scope)
        if reason is not None:
            _refuse(gate, reason, context)
    now = time.monotonic()
    if scope.deadline is not None and scope.deadline - now <= latency.median:
        reason = _unfit(gate, latency, scope, now)
        if reason is not None:
            _refuse(gate, reason, context)
    return now


def _begin_stream(gate: ThreadGate, context: Any) -> None:
    _admitted(gate, Latency(), context)
    reason = gate.admission.begin_stream(criticality_of(_scope().criticality))
    gate.settle()
    if reason is not None:
        _refuse(gate, reason, context)


def sync_gated(behavior: Behavior, gate: ThreadGate, *, is_stream: bool = False) -> Behavior:
    """A handler with one response."""
    admission, latency = gate.admission, Latency()

    def gated(request: Any, context: Any) -> Any:
        started = _admitted(gate, latency, context)
        ending = Ending.FAILED
        try:
            response = behavior(request, context)
            ending = Ending.OK
        finally:
            now = time.monotonic()
            admission.leave(latency, now - started, ending if context.is_active() else Ending.CANCELLED, now)
            gate.settle()
        return response

    def gated_stream(requests: Any, context: Any) -> Any:
        _begin_stream(gate, context)
        ending = Ending.FAILED
        try:
            response = behavior(requests, context)
            ending = Ending.OK
        finally:
            admission.end_stream(ending)
        return response

    chosen = gated_stream if is_stream else gated
    chosen.__qualname__ = getattr(behavior, "__qualname__", chosen.__qualname__)
    return chosen


def sync_gated_responses(behavior: Behavior, gate: ThreadGate, *, is_stream: bool = True) -> Behavior:  # noqa: ARG001
    """A handler with a stream of responses."""

    def gated(request: Any, context: Any) -> Iterator[Any]:
        _begin_stream(gate, context)
        ending = Ending.FAILED
        try:
            for response in behavior(request, context):
                if gate.ending:
                    _refuse(gate, Reason.DRAINING, context, begun=True)
                yield response
            ending = Ending.OK
        finally:
            gate.admission.end_stream(ending)

    gated.__qualname__ = getattr(behavior, "__qualname__", gated.__qualname__)
    return gated


# -- asyncio ----------------------------------------------------------------------------------------------------------


def aio_gated(behavior: Behavior, gate: AioGate) -> Behavior:
    """A handler of a unary call."""
    admission, latency = gate.admission, Latency()

    async def gated(request: Any, context: Any) -> Any:
        scope = _scope()
        started = time.monotonic()
        criticality = criticality_of(scope.criticality)
        if not gate.enter(criticality, started):
            reason = await gate.wait(criticality, scope.arrived)
            if reason is not None:
                await context.abort(*gate.refusal(reason))
            started = time.monotonic()
        if scope.deadline is not None and scope.deadline - started <= latency.median:
            reason = _unfit(gate, latency, scope, started)
            if reason is not None:
                await context.abort(*gate.refusal(reason))
        ending = Ending.FAILED
        try:
            response = await behavior(request, context)
            ending = Ending.OK
        except asyncio.CancelledError:
            ending = Ending.CANCELLED
            raise
        finally:
            now = time.monotonic()
            admission.leave(latency, now - started, ending, now)
            gate.settle()
        return response

    gated.__qualname__ = getattr(behavior, "__qualname__", gated.__qualname__)
    return gated


async def _aio_begin_stream(gate: AioGate, scope: Scope, context: Any) -> None:
    now = time.monotonic()
    criticality = criticality_of(scope.criticality)
    reason = None if gate.enter(criticality, now) else await gate.wait(criticality, scope.arrived)
    if reason is None:
        reason = _unfit(gate, Latency(), scope, now)
    if reason is None:
        reason = gate.admission.begin_stream(criticality)
        gate.settle()
    if reason is not None:
        await context.abort(*gate.refusal(reason))


def aio_gated_stream(behavior: Behavior, gate: AioGate) -> Behavior:
    """A handler of a stream in any direction that is a coroutine."""
    admission = gate.admission

    async def gated(request: Any, context: Any) -> Any:
        scope = _scope()
        await _aio_begin_stream(gate, scope, context)
        task = asyncio.current_task()
        assert task is not None
        gate.streams.add(task.cancel)
        ending = Ending.FAILED
        try:
            response = await behavior(request, context)
            ending = Ending.OK
        except asyncio.CancelledError:
            if not gate.ending or context.done():
                raise
            task.uncancel()
            scope.cancel()
            await context.abort(*gate.refusal(Reason.DRAINING, begun=True))
            raise
        finally:
            gate.streams.discard(task.cancel)
            admission.end_stream(ending)
        return response

    gated.__qualname__ = getattr(behavior, "__qualname__", gated.__qualname__)
    return gated


def aio_gated_responses(behavior: Behavior, gate: AioGate) -> Behavior:
    """A handler with a stream of responses that is an async generator."""
    admission = gate.admission

    async def gated(request: Any, context: Any) -> AsyncIterator[Any]:
        scope = _scope()
        await _aio_begin_stream(gate, scope, context)
        task = asyncio.current_task()
        assert task is not None
        sending = False

        def end() -> None:
            # What awaits while a response is sent is grpc or an interceptor, which would end the call without a status.
            if not sending:
                task.cancel()

        gate.streams.add(end)
        ending = Ending.FAILED
        try:
            async with aclosing(behavior(request, context)) as responses:
                async for response in responses:
                    sending = True
                    yield response
                    sending = False
                    if gate.ending:
                        scope.cancel()
                        await context.abort(*gate.refusal(Reason.DRAINING, begun=True))
            ending = Ending.OK
        except asyncio.CancelledError:
            if not gate.ending or context.done():
                raise
            task.uncancel()
            scope.cancel()
            await context.abort(*gate.refusal(Reason.DRAINING, begun=True))
            raise
        finally:
            gate.streams.discard(end)
            admission.end_stream(ending)

    gated.__qualname__ = getattr(behavior, "__qualname__", gated.__qualname__)
    return gated
