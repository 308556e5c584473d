"""Handlers behind a gate: they begin with a permit, or the call is refused and they never do.

A unary call holds its permit until its handler is through. A stream needs one to begin and then gives it back, as how
long it lasts says nothing of how busy the server is; streams that are open are counted apart. When a drain has waited
for them long enough they end with UNAVAILABLE, so that their clients resume elsewhere.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from mesh import context as mesh_context
from mesh.context import Scope
from mesh.criticality import Criticality, criticality_of
from mesh.policy.server.admission import Method, Reason
from mesh.policy.server.limiter import Ending
from mesh.server.handlers.gate import AioGate, Gate, ThreadGate

Behavior = Callable[..., Any]


def _scope() -> Scope:
    scope = mesh_context.inbound()
    assert scope is not None  # entered by what stands around
    return scope


def _expired(gate: Gate, method: Method, criticality: Criticality, scope: Scope, now: float) -> Reason:
    """Why a call that has its permit, and no time left, isn't run; it has given the permit back then."""
    reason = gate.admission.expire(method, criticality, scope.arrived, now)
    gate.settle()
    return reason


def _waited(scope: Scope) -> float:
    return time.monotonic() - scope.arrived


def _left(scope: Scope, now: float) -> float:
    return math.inf if scope.deadline is None else scope.deadline - now


# -- threads ----------------------------------------------------------------------------------------------------------


def _refuse(gate: Gate, reason: Reason, method: Method, scope: Scope, context: Any, *, begun: bool = False) -> None:
    code, details, trailers = gate.refusal(reason, method, _waited(scope), begun=begun)
    context.set_trailing_metadata(trailers)
    context.abort(code, details)


def _admitted(gate: ThreadGate, method: Method, criticality: Criticality, scope: Scope, context: Any) -> float:
    """Wait for a permit; returns the time when it was granted. Ends the call when there is none."""
    now = time.monotonic()
    if not gate.enter(method, criticality, now):
        reason = gate.wait(method, criticality, scope)
        if reason is not None:
            _refuse(gate, reason, method, scope, context)
        now = time.monotonic()
    if scope.deadline is not None and scope.deadline <= now:
        _refuse(gate, _expired(gate, method, criticality, scope, now), method, scope, context)
    return now


def _begin_stream(gate: ThreadGate, method: Method, scope: Scope, context: Any) -> None:
    criticality = criticality_of(scope.criticality)
    _admitted(gate, method, criticality, scope, context)
    reason = gate.admission.begin_stream(method, criticality)
    gate.settle()
    if reason is not None:
        _refuse(gate, reason, method, scope, context)


def sync_gated(behavior: Behavior, name: str, gate: ThreadGate, *, is_stream: bool = False) -> Behavior:
    """A handler with one response."""
    admission = gate.admission
    method = admission.method(name)

    def gated(request: Any, context: Any) -> Any:
        scope = _scope()
        criticality = criticality_of(scope.criticality)
        started = _admitted(gate, method, criticality, scope, context)
        ending = Ending.FAILED
        try:
            response = behavior(request, context)
            ending = Ending.OK
        finally:
            now = time.monotonic()
            if not context.is_active():
                ending = Ending.CANCELLED
            admission.leave(method, criticality, started - scope.arrived, now - started, _left(scope, now), ending, now)
            gate.settle()
        return response

    def gated_stream(requests: Any, context: Any) -> Any:
        _begin_stream(gate, method, _scope(), context)
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


def sync_gated_responses(behavior: Behavior, name: str, gate: ThreadGate, *, is_stream: bool = True) -> Behavior:  # noqa: ARG001
    """A handler with a stream of responses."""
    method = gate.admission.method(name)

    def gated(request: Any, context: Any) -> Iterator[Any]:
        scope = _scope()
        _begin_stream(gate, method, scope, context)
        ending = Ending.FAILED
        try:
            for response in behavior(request, context):
                if gate.ending:
                    _refuse(gate, Reason.DRAINING, method, scope, context, begun=True)
                yield response
            ending = Ending.OK
        finally:
            gate.admission.end_stream(ending)

    gated.__qualname__ = getattr(behavior, "__qualname__", gated.__qualname__)
    return gated


# -- asyncio ----------------------------------------------------------------------------------------------------------


def aio_gated(behavior: Behavior, name: str, gate: AioGate) -> Behavior:
    """A handler of a unary call."""
    admission = gate.admission
    method = admission.method(name)

    async def gated(request: Any, context: Any) -> Any:
        scope = _scope()
        started = time.monotonic()
        criticality = criticality_of(scope.criticality)
        if not gate.enter(method, criticality, started):
            reason = await gate.wait(method, criticality, scope)
            if reason is not None:
                await context.abort(*gate.refusal(reason, method, _waited(scope)))
            started = time.monotonic()
        if scope.deadline is not None and scope.deadline <= started:
            await context.abort(
                *gate.refusal(_expired(gate, method, criticality, scope, started), method, _waited(scope))
            )
        ending = Ending.FAILED
        try:
            response = await behavior(request, context)
            ending = Ending.OK
        except asyncio.CancelledError:
            ending = Ending.CANCELLED
            raise
        finally:
            now = time.monotonic()
            admission.leave(method, criticality, started - scope.arrived, now - started, _left(scope, now), ending, now)
            gate.settle()
        return response

    gated.__qualname__ = getattr(behavior, "__qualname__", gated.__qualname__)
    return gated


async def _aio_begin_stream(gate: AioGate, method: Method, scope: Scope, context: Any) -> None:
    now = time.monotonic()
    criticality = criticality_of(scope.criticality)
    reason = None if gate.enter(method, criticality, now) else await gate.wait(method, criticality, scope)
    if reason is None and scope.deadline is not None and scope.deadline <= (now := time.monotonic()):
        reason = _expired(gate, method, criticality, scope, now)
    if reason is None:
        reason = gate.admission.begin_stream(method, criticality)
        gate.settle()
    if reason is not None:
        await context.abort(*gate.refusal(reason, method, _waited(scope)))


async def _aio_drained(gate: AioGate, task: asyncio.Task[Any], scope: Scope, method: Method, context: Any) -> None:
    """End a cancelled stream with UNAVAILABLE where the drain cancelled it; returns where something else did."""
    if gate.ending and not context.done():
        task.uncancel()
        scope.cancel()
        await context.abort(*gate.refusal(Reason.DRAINING, method, _waited(scope), begun=True))


def aio_gated_stream(behavior: Behavior, name: str, gate: AioGate) -> Behavior:
    """A handler of a stream in any direction that is a coroutine."""
    admission = gate.admission
    method = admission.method(name)

    async def gated(request: Any, context: Any) -> Any:
        scope = _scope()
        await _aio_begin_stream(gate, method, scope, context)
        task = asyncio.current_task()
        assert task is not None
        gate.streams.add(task.cancel)
        ending = Ending.FAILED
        try:
            response = await behavior(request, context)
            ending = Ending.OK
        except asyncio.CancelledError:
            await _aio_drained(gate, task, scope, method, context)
            raise
        finally:
            gate.streams.discard(task.cancel)
            admission.end_stream(ending)
        return response

    gated.__qualname__ = getattr(behavior, "__qualname__", gated.__qualname__)
    return gated


def aio_gated_responses(behavior: Behavior, name: str, gate: AioGate) -> Behavior:
    """A handler with a stream of responses that is an async generator."""
    admission = gate.admission
    method = admission.method(name)

    async def gated(request: Any, context: Any) -> AsyncIterator[Any]:
        scope = _scope()
        await _aio_begin_stream(gate, method, scope, context)
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
                        await context.abort(*gate.refusal(Reason.DRAINING, method, _waited(scope), begun=True))
            ending = Ending.OK
        except asyncio.CancelledError:
            await _aio_drained(gate, task, scope, method, context)
            raise
        finally:
            gate.streams.discard(end)
            admission.end_stream(ending)

    gated.__qualname__ = getattr(behavior, "__qualname__", gated.__qualname__)
    return gated
