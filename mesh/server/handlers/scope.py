"""The scope of an inbound call, and what is sent with its status."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import grpc

from mesh import context as mesh_context
from mesh.context import Scope
from mesh.criticality import BY_NAME, CRITICALITY
from mesh.model import Metadatum
from mesh.server.handlers.admission import ServerAdmission
from mesh.wire import HEDGED_ATTEMPTS, PREVIOUS_ATTEMPTS, PUSHBACK

LOG = logging.getLogger("mesh.server")

Handler = Any  # an RpcMethodHandler; grpc's is generic over messages that nothing here looks at
Behavior = Callable[..., Any]
_B = TypeVar("_B", bound=Behavior)

MAX_DIGITS = 9
"""Digits of an attempt's number in metadata."""

_DO_NOT_RETRY: Metadatum = (PUSHBACK, "-1")
_ATTEMPT_KEYS = (PREVIOUS_ATTEMPTS, HEDGED_ATTEMPTS)

# grpc reports about 9.2e18 s, or None, for "no deadline" (docs/correctness.md, P1).
NO_DEADLINE = 3e9


def scope_from_metadata(metadata: Iterable[Metadatum]) -> Scope:
    """The scope of an inbound call that has just arrived. It gets its deadline when its handler starts."""
    is_retry, criticality = False, ""
    for key, value in metadata:
        if key in _ATTEMPT_KEYS:
            is_retry = _is_number(value) and int(value) > 0
        elif key == CRITICALITY and value in BY_NAME:
            criticality = str(value)
    return Scope(is_retry=is_retry, criticality=criticality, arrived=time.monotonic())


def _is_number(value: str | bytes) -> bool:
    # Python refuses to read more than 4,300 digits.
    return isinstance(value, str) and len(value) <= MAX_DIGITS and value.isdecimal()


def start_scope(context: Any) -> Scope:
    """The scope, entered, of the inbound call that ``context`` (of any of grpc's kinds) belongs to."""
    scope = mesh_context.inbound()
    if scope is None or scope.handler_started:  # nothing here saw it arrive
        scope = scope_from_metadata(context.invocation_metadata())
        mesh_context.enter(scope)
    scope.handler_started = True
    left = context.time_remaining()
    if left is not None and left <= NO_DEADLINE:
        scope.deadline = time.monotonic() + left
    return scope


def trailers_for(
    own: Iterable[Metadatum] | None, failed: bool, scope: Scope, admission: ServerAdmission | None
) -> tuple[Metadatum, ...]:
    """The trailers of a call: the handler's own, the load, and "don't retry" if the call ``failed`` after a call made
    for it used up its retries (unless the handler set a pushback itself)."""
    trailers = tuple(own or ())
    if failed and scope.exhausted and not any(key == PUSHBACK for key, _ in trailers):
        trailers = (*trailers, _DO_NOT_RETRY)
    if admission is not None and admission.sends_load:
        trailers += admission.load_reporter.trailers(time.monotonic())
    return trailers


def set_trailers(context: Any, scope: Scope, admission: ServerAdmission | None) -> None:
    """Set the trailers of a call whose handler returned."""
    if scope.exhausted or admission is not None:
        trailers = trailers_for(context.trailing_metadata(), has_failed(context), scope, admission)
        if trailers:
            context.set_trailing_metadata(trailers)


def status_for(behavior: Behavior, error: Exception, context: Any) -> tuple[grpc.StatusCode, str]:
    """The status of a call whose handler raised ``error``, which is logged: INTERNAL, unless the handler has set a
    code."""
    name = os.urandom(8).hex()
    LOG.error("internal error, id %s, in %s", name, getattr(behavior, "__qualname__", behavior), exc_info=error)
    code, details = context.code(), context.details()
    if code is None or code is grpc.StatusCode.OK:
        return grpc.StatusCode.INTERNAL, f"internal error, id {name}"
    if isinstance(details, bytes):  # the threaded context keeps them encoded
        details = details.decode("utf-8", "replace")
    return code, details or f"internal error, id {name}"


def has_failed(context: Any) -> bool:
    """Whether the call has a status other than OK."""
    code = context.code()
    return code is not None and code is not grpc.StatusCode.OK


def named_after(behavior: Behavior, wrapper: _B) -> _B:
    """``wrapper`` with the name of ``behavior``, which logs and tracebacks show."""
    wrapper.__qualname__ = getattr(behavior, "__qualname__", wrapper.__qualname__)
    return wrapper


class AioContext:
    """A handler's context on an aio server: grpc's own, but ``abort`` adds the trailers of ``trailers_for``."""

    __slots__ = ("_admission", "_context", "_scope")

    def __init__(self, context: Any, scope: Scope, admission: ServerAdmission | None) -> None:
        self._context = context
        self._scope = scope
        self._admission = admission

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    # These two aren't left to __getattr__ because streams call them for each message.
    def read(self) -> Awaitable[Any]:
        return self._context.read()  # type: ignore[no-any-return]

    def write(self, message: Any) -> Awaitable[None]:
        return self._context.write(message)  # type: ignore[no-any-return]

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[Metadatum, ...] = ()
    ) -> None:
        if self._scope.exhausted or self._admission is not None:
            own = trailing_metadata or self._context.trailing_metadata()
            trailing_metadata = trailers_for(own, True, self._scope, self._admission)
        await self._context.abort(code, details, trailing_metadata)

    async def abort_with_status(self, status: Any) -> None:
        await self.abort(status.code, status.details, status.trailing_metadata)
