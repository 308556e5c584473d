"""Handlers behind admission control: a call gets a permit before its handler starts, or is refused and never runs.

A unary call holds its permit until its handler returns. A stream needs one to start and then returns it, because its
duration says nothing about load; open streams are counted separately. When a drain has waited long enough for streams,
they end with UNAVAILABLE, so that their clients resume on another endpoint.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from mesh import context as mesh_context
from mesh.context import Scope
from mesh.criticality import Criticality, criticality_of
from mesh.policy.server.limiter import Ending
from mesh.policy.server.queue import Method
from mesh.policy.server.reasons import Reason
from mesh.server.handlers.admission import AioServerAdmission, ServerAdmission, ThreadServerAdmission
from mesh.server.handlers.scope import Behavior, named_after


def _scope() -> Scope:
    scope = mesh_context.inbound()
    assert scope is not None  # entered by the wrapper outside of this one
    return scope


def _waited(scope: Scope) -> float:
    return time.monotonic() - scope.arrived


def _left(scope: Scope, now: float) -> float:
    return math.inf if scope.deadline is None else scope.deadline - now


def _count_stream(admission: ServerAdmission, method: Method, criticality: Criticality) -> Reason | None:
    """Return a stream's permit and count the stream as open. Returns a reason when too many are open."""
    reason = admission.policy.begin_stream(method, criticality)
    admission.dispatch()
    return reason


# -- threads ----------------------------------------------------------------------------------------------------------


def _refuse(
    admission: ServerAdmission,
    reason: Reason,
    method: Method,
    scope: Scope,
    context: Any,
    *,
    handler_started: bool = False,
) -> None:
    code, details, trailers = admission.refusal(reason, method, _waited(scope), handler_started=handler_started)
    context.set_trailing_metadata(trailers)
    context.abort(code, details)


def _take_permit(
    admission: ThreadServerAdmission, method: Method, criticality: Criticality, scope: Scope, context: Any
) -> float:
    """Wait for a permit. Returns the time when it was granted; ends the call if there is none."""
    now = time.monotonic()
    if not admission.enter(method, criticality, now):
        reason = admission.wait(method, criticality, scope)
        if reason is not None:
            _refuse(admission, reason, method, scope, context)
        now = time.monotonic()
    if scope.deadline is not None and scope.deadline <= now:
        _refuse(admission, admission.expire(method, criticality, scope, now), method, scope, context)
    return now


def _begin_stream(admission: ThreadServerAdmission, method: Method, scope: Scope, context: Any) -> None:
    criticality = criticality_of(scope.criticality)
    _take_permit(admission, method, criticality, scope, context)
    reason = _count_stream(admission, method, criticality)
    if reason is not None:
        _refuse(admission, reason, method, scope, context)


def sync_admitted(
    behavior: Behavior, name: str, admission: ThreadServerAdmission, *, is_stream: bool = False
) -> Behavior:
    """A handler with one response."""
    policy = admission.policy
    method = policy.method(name)

    def admitted(request: Any, context: Any) -> Any:
        scope = _scope()
        criticality = criticality_of(scope.criticality)
        started = _take_permit(admission, method, criticality, scope, context)
        ending = Ending.FAILED
        try:
            response = behavior(request, context)
            ending = Ending.OK
        finally:
            now = time.monotonic()
            if not context.is_active():
                ending = Ending.CANCELLED
            policy.leave(method, criticality, started - scope.arrived, now - started, _left(scope, now), ending, now)
            admission.dispatch()
        return response

    def admitted_stream(requests: Any, context: Any) -> Any:
        _begin_stream(admission, method, _scope(), context)
        ending = Ending.FAILED
        try:
            response = behavior(requests, context)
            ending = Ending.OK
        finally:
            policy.end_stream(ending)
        return response

    return named_after(behavior, admitted_stream if is_stream else admitted)


def sync_admitted_responses(
    behavior: Behavior,
    name: str,
    admission: ThreadServerAdmission,
    *,
    is_stream: bool = True,  # noqa: ARG001
) -> Behavior:
    """A handler with a stream of responses."""
    policy = admission.policy
    method = policy.method(name)

    def admitted(request: Any, context: Any) -> Iterator[Any]:
        scope = _scope()
        _begin_stream(admission, method, scope, context)
        ending = Ending.FAILED
        try:
            for response in behavior(request, context):
                if admission.ending_streams:
                    _refuse(admission, Reason.DRAINING, method, scope, context, handler_started=True)
                yield response
            ending = Ending.OK
        finally:
            policy.end_stream(ending)

    return named_after(behavior, admitted)


# -- asyncio ----------------------------------------------------------------------------------------------------------


def aio_admitted(behavior: Behavior, name: str, admission: AioServerAdmission) -> Behavior:
    """A handler of a unary call."""
    policy = admission.policy
    method = policy.method(name)

    async def admitted(request: Any, context: Any) -> Any:
        scope = _scope()
        started = time.monotonic()
        criticality = criticality_of(scope.criticality)
        if not admission.enter(method, criticality, started):
            reason = await admission.wait(method, criticality, scope)
            if reason is not None:
                await context.abort(*admission.refusal(reason, method, _waited(scope)))
            started = time.monotonic()
        if scope.deadline is not None and scope.deadline <= started:
            reason = admission.expire(method, criticality, scope, started)
            await context.abort(*admission.refusal(reason, method, _waited(scope)))
        ending = Ending.FAILED
        try:
            response = await behavior(request, context)
            ending = Ending.OK
        except asyncio.CancelledError:
            ending = Ending.CANCELLED
            raise
        finally:
            now = time.monotonic()
            policy.leave(method, criticality, started - scope.arrived, now - started, _left(scope, now), ending, now)
            admission.dispatch()
        return response

    return named_after(behavior, admitted)


async def _aio_begin_stream(admission: AioServerAdmission, method: Method, scope: Scope, context: Any) -> None:
    now = time.monotonic()
    criticality = criticality_of(scope.criticality)
    reason = None if admission.enter(method, criticality, now) else await admission.wait(method, criticality, scope)
    if reason is None and scope.deadline is not None and scope.deadline <= (now := time.monotonic()):
        reason = admission.expire(method, criticality, scope, now)
    if reason is None:
        reason = _count_stream(admission, method, criticality)
    if reason is not None:
        await context.abort(*admission.refusal(reason, method, _waited(scope)))


async def _end_if_draining(
    admission: AioServerAdmission, task: asyncio.Task[Any], scope: Scope, method: Method, context: Any
) -> None:
    """End a cancelled stream with UNAVAILABLE if the drain cancelled it; return if something else did."""
    if admission.ending_streams and not context.done():
        task.uncancel()
        scope.cancel()
        await context.abort(*admission.refusal(Reason.DRAINING, method, _waited(scope), handler_started=True))


def aio_admitted_stream(behavior: Behavior, name: str, admission: AioServerAdmission) -> Behavior:
    """A coroutine that handles a stream in either direction."""
    policy = admission.policy
    method = policy.method(name)

    async def admitted(request: Any, context: Any) -> Any:
        scope = _scope()
        await _aio_begin_stream(admission, method, scope, context)
        task = asyncio.current_task()
        assert task is not None
        admission.streams.add(task.cancel)
        ending = Ending.FAILED
        try:
            response = await behavior(request, context)
            ending = Ending.OK
        except asyncio.CancelledError:
            await _end_if_draining(admission, task, scope, method, context)
            raise
        finally:
            admission.streams.discard(task.cancel)
            policy.end_stream(ending)
        return response

    return named_after(behavior, admitted)


def aio_admitted_responses(behavior: Behavior, name: str, admission: AioServerAdmission) -> Behavior:
    """An async generator that handles a call with a stream of responses."""
    policy = admission.policy
    method = policy.method(name)

    async def admitted(request: Any, context: Any) -> AsyncIterator[Any]:
        scope = _scope()
        await _aio_begin_stream(admission, method, scope, context)
        task = asyncio.current_task()
        assert task is not None
        sending = False

        def end() -> None:
            # While a response is sent, grpc or an interceptor awaits, and would end the call without a status.
            if not sending:
                task.cancel()

        admission.streams.add(end)
        ending = Ending.FAILED
        try:
            async with aclosing(behavior(request, context)) as responses:
                async for response in responses:
                    sending = True
                    yield response
                    sending = False
                    if admission.ending_streams:
                        scope.cancel()
                        await context.abort(
                            *admission.refusal(Reason.DRAINING, method, _waited(scope), handler_started=True)
                        )
            ending = Ending.OK
        except asyncio.CancelledError:
            await _end_if_draining(admission, task, scope, method, context)
            raise
        finally:
            admission.streams.discard(end)
            policy.end_stream(ending)

    return named_after(behavior, admitted)
