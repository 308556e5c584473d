"""The scope of an inbound call, and what goes out with its status."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc

from mesh import context as mesh_context
from mesh.context import Scope
from mesh.criticality import BY_NAME, CRITICALITY
from mesh.model import Metadatum
from mesh.server.handlers.gate import Gate
from mesh.wire import HEDGED_ATTEMPTS, PREVIOUS_ATTEMPTS, PUSHBACK

LOG = logging.getLogger("mesh.server")

Handler = Any  # an RpcMethodHandler; grpc's is generic over messages that nothing here looks at
Behavior = Callable[..., Any]

_DO_NOT_RETRY: Metadatum = (PUSHBACK, "-1")


_ATTEMPTS = (PREVIOUS_ATTEMPTS, HEDGED_ATTEMPTS)


MAX_DIGITS = 9
"""Digits of an attempt's number in metadata."""


# grpc says about 9.2e18 s, or None, for "no deadline" (docs/correctness.md, P1).
_NO_DEADLINE = 3e9


def arriving(metadata: Iterable[Metadatum]) -> Scope:
    """The scope of an inbound call that has just been seen; it gets its deadline when its handler begins."""
    is_retry, criticality = False, ""
    for key, value in metadata:
        if key in _ATTEMPTS:
            is_retry = _is_number(value) and int(value) > 0
        elif key == CRITICALITY and value in BY_NAME:
            criticality = str(value)
    return Scope(is_retry=is_retry, criticality=criticality, arrived=time.monotonic())


def _is_number(value: str | bytes) -> bool:
    # Python refuses to read more than 4,300 digits.
    return isinstance(value, str) and len(value) <= MAX_DIGITS and value.isdecimal()


def start_scope(context: Any) -> Scope:
    """The scope, entered, of the inbound call that ``context`` (of any of grpc's kinds) stands for."""
    scope = mesh_context.inbound()
    if scope is None or scope.handler_started:  # its arrival wasn't seen here
        scope = arriving(context.invocation_metadata())
        mesh_context.enter(scope)
    scope.handler_started = True
    left = context.time_remaining()
    if left is not None and left <= _NO_DEADLINE:
        scope.deadline = time.monotonic() + left
    return scope


def trailers_for(
    own: Iterable[Metadatum] | None, failed: bool, scope: Scope, gate: Gate | None
) -> tuple[Metadatum, ...]:
    """What goes out with a status: the handler's own trailers, and beside them "don't retry" after retries in vain
    (the handler's own word on that stands), and the load."""
    trailers = tuple(own or ())
    if failed and scope.exhausted and not any(key == PUSHBACK for key, _ in trailers):
        trailers = (*trailers, _DO_NOT_RETRY)
    if gate is not None and gate.reports is not None:
        trailers += gate.reports.trailers(time.monotonic())
    return trailers


def status_for(behavior: Behavior, error: Exception, context: Any) -> tuple[grpc.StatusCode, str]:
    """The status that an exception ends a call with: a code that the handler had set stands; it is logged."""
    name = os.urandom(8).hex()
    LOG.error("internal error, id %s, in %s", name, getattr(behavior, "__qualname__", behavior), exc_info=error)
    code, details = context.code(), context.details()
    if code is None or code is grpc.StatusCode.OK:
        return grpc.StatusCode.INTERNAL, f"internal error, id {name}"
    if isinstance(details, bytes):  # the threaded context keeps them encoded
        details = details.decode("utf-8", "replace")
    return code, details or f"internal error, id {name}"


def has_failed(context: Any) -> bool:
    code = context.code()
    return code is not None and code is not grpc.StatusCode.OK


class AioContext:
    """A handler's context on an aio server: grpc's own, whose ``abort`` adds the chain stop and the load."""

    __slots__ = ("_context", "_gate", "_scope")

    def __init__(self, context: Any, scope: Scope, gate: Gate | None) -> None:
        self._context = context
        self._scope = scope
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    # Beside what differs, only what streams call for each message.
    def read(self) -> Awaitable[Any]:
        return self._context.read()  # type: ignore[no-any-return]

    def write(self, message: Any) -> Awaitable[None]:
        return self._context.write(message)  # type: ignore[no-any-return]

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[Metadatum, ...] = ()
    ) -> None:
        if self._scope.exhausted or self._gate is not None:
            own = trailing_metadata or self._context.trailing_metadata()
            trailing_metadata = trailers_for(own, True, self._scope, self._gate)
        await self._context.abort(code, details, trailing_metadata)

    async def abort_with_status(self, status: Any) -> None:
        await self.abort(status.code, status.details, status.trailing_metadata)
