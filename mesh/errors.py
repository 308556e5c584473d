"""The errors that calls raise: gRPC's own error classes, with ``explain()``."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable
from types import AsyncGeneratorType, GeneratorType, TracebackType
from typing import Any, NoReturn

import grpc
import grpc.aio

from mesh.model import Metadatum
from mesh.observe import Explanation


def explain(call_or_error: object) -> Explanation:
    """All attempts of a call: to which endpoint, when, and how each ended.

    ``call_or_error``: a call of a mesh channel, an error that one raised, or an interceptor's wrapper around either: a
    call, an error, or a generator of responses that isn't exhausted.

    Raises TypeError when it has no call of a mesh channel, and asyncio.InvalidStateError while interceptors haven't
    made the call yet.
    """
    visited: list[object] = []
    to_visit = [call_or_error]
    while to_visit:
        found = to_visit.pop(0)
        if any(found is other for other in visited):
            continue
        visited.append(found)
        own = getattr(found, "explain", None)
        if callable(own) and isinstance(explanation := own(), Explanation):
            return explanation
        to_visit += (each for each in _inside(found) if isinstance(each, _CALLS))
    raise TypeError(f"no call of a mesh channel in {call_or_error!r}")


_CALLS = (grpc.RpcContext, grpc.aio.RpcContext, grpc.Future, BaseException, GeneratorType, AsyncGeneratorType)


def _inside(found: object) -> Iterable[object]:
    """What a call, an error or a generator holds."""
    if isinstance(found, GeneratorType):
        return [found.gi_yieldfrom, *inspect.getgeneratorlocals(found).values()]
    if isinstance(found, AsyncGeneratorType):
        return list(found.ag_frame.f_locals.values()) if found.ag_frame else []
    held = list(getattr(found, "__dict__", {}).values())
    return [*held, found.__cause__, found.__context__] if isinstance(found, BaseException) else held


class RpcError(grpc.RpcError):
    """The base of what failed calls of a mesh channel raise: blocking, future, stream and asyncio. A ``grpc.RpcError``;
    each subclass is also of the type that grpc raises there."""

    def explain(self) -> Explanation:
        """All attempts of the call: to which endpoint, when, and how each ended."""
        raise NotImplementedError


class CallError(RpcError, grpc.Call, grpc.Future):  # type: ignore[type-arg]
    """A blocking call failed. As in grpc, a ``grpc.RpcError`` that is also a ``grpc.Call`` and a ``grpc.Future``."""

    def __init__(
        self,
        code: grpc.StatusCode,
        details: str | None,
        explanation: Explanation,
        initial_metadata: tuple[Metadatum, ...] = (),
        trailing_metadata: tuple[Metadatum, ...] = (),
        debug_error_string: str | None = None,
    ) -> None:
        super().__init__(code, details)
        self._code = code
        self._details = details
        self._explanation = explanation
        self._initial_metadata = initial_metadata
        self._trailing_metadata = trailing_metadata
        self._debug_error_string = debug_error_string

    def explain(self) -> Explanation:
        return self._explanation

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details or ""

    def debug_error_string(self) -> str | None:
        return self._debug_error_string

    def initial_metadata(self) -> tuple[Metadatum, ...]:
        return self._initial_metadata

    def trailing_metadata(self) -> tuple[Metadatum, ...]:  # type: ignore[override]
        return self._trailing_metadata

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> None:  # type: ignore[override]
        return None

    def add_callback(self, callback: Callable[[], None]) -> bool:  # noqa: ARG002
        return False

    def cancel(self) -> bool:
        return False

    def cancelled(self) -> bool:
        return False

    def running(self) -> bool:
        return False

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> NoReturn:  # noqa: ARG002
        raise self

    def exception(self, timeout: float | None = None) -> CallError:  # noqa: ARG002
        return self

    def traceback(self, timeout: float | None = None) -> TracebackType | None:  # noqa: ARG002
        try:
            raise self
        except CallError:
            return sys.exc_info()[2]

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        fn(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (
            self._code,
            self._details,
            self._explanation,
            self._initial_metadata,
            self._trailing_metadata,
            self._debug_error_string,
        )

    def __repr__(self) -> str:
        name = type(self).__name__
        return terminated(name, self._code, self._details, self._debug_error_string, self._explanation.endpoint)

    __str__ = __repr__


class AioRpcError(RpcError, grpc.aio.AioRpcError):
    """An asyncio call failed. Also a ``grpc.aio.AioRpcError``."""

    def __init__(
        self,
        code: grpc.StatusCode,
        initial_metadata: grpc.aio.Metadata,
        trailing_metadata: grpc.aio.Metadata,
        details: str | None,
        debug_error_string: str | None,
        explanation: Explanation,
    ) -> None:
        super().__init__(code, initial_metadata, trailing_metadata, details, debug_error_string)
        self._explanation = explanation

    def explain(self) -> Explanation:
        return self._explanation

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (
            self.code(),
            self.initial_metadata(),
            self.trailing_metadata(),
            self.details(),
            self.debug_error_string(),
            self._explanation,
        )

    def __repr__(self) -> str:
        name = type(self).__name__
        return terminated(name, self.code(), self.details(), self.debug_error_string(), self._explanation.endpoint)

    __str__ = __repr__


def terminated(
    name: str, code: grpc.StatusCode, details: str | None, debug: str | None = None, endpoint: str = ""
) -> str:
    """The text of an RPC that has terminated, as grpc's, plus the endpoint if nothing in it names it."""
    lines = [f"<{name} of RPC that terminated with:", f"\tstatus = {code}", f'\tdetails = "{details}"']
    if code is not grpc.StatusCode.OK:
        lines.append(f'\tdebug_error_string = "{debug}"')
    text = "\n".join([*lines, ">"])
    if not endpoint or re.search(rf"(?<![\w.]){re.escape(endpoint)}(?!\w)", text):
        return text
    return f"{text} The call went to endpoint {endpoint}."


_LONGEST = 200  # characters of core's details that an error repeats


def short_details(details: str) -> str:
    """Core's details of a failed connection, without what all of them have. For people, not for programs."""
    text = details.partition("last error: ")[2] or details
    text = re.sub(r"^[A-Z_]+: ", "", text)
    text = re.sub(r"^(ipv4|ipv6|unix|unix-abstract|vsock):\S+: ", "", text)
    text = text.removeprefix("Failed to connect to remote host: ").removeprefix("connect: ")
    text = re.sub(r" \(\d+\)$", "", text)  # the system's number for it
    if text[1:2].islower():
        text = text[:1].lower() + text[1:]
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
