"""Requests whose bytes don't parse: the caller's fault, so INVALID_ARGUMENT, where grpc says INTERNAL or UNKNOWN.

grpc parses a request before its handler is called, outside of anything that could answer for it. So the parser is
wrapped: it gives what went wrong in the request's place, and whoever reads the request then refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc

DETAILS = "the request's bytes are not a message of the method's request type"


class UnparsableError(ValueError):
    """A request's bytes don't parse."""

    def __init__(self) -> None:
        super().__init__(DETAILS)


_UNPARSABLE = UnparsableError()
"""What a parser gives for bytes that don't parse. One for all: it says nothing of them."""


def kept(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """``parse``, which for bytes that don't parse returns an ``UnparsableError`` in the message's place."""

    def parsed(request: bytes) -> Any:
        try:
            return parse(request)
        except Exception:
            return _UNPARSABLE

    return parsed


def raised(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """``parse``, which for bytes that don't parse raises an ``UnparsableError``."""

    def parsed(request: bytes) -> Any:
        try:
            return parse(request)
        except Exception:
            raise UnparsableError from None

    return parsed


def aio_parsed(behavior: Callable[..., Any]) -> Callable[..., Any]:
    """An async handler of one request, which ``kept`` has parsed."""

    def handle(request: Any, context: Any) -> Any:
        if request is _UNPARSABLE:
            raise UnparsableError
        return behavior(request, context)

    handle.__qualname__ = getattr(behavior, "__qualname__", handle.__qualname__)
    return handle


class _Requests:
    """A stream's requests, which ``kept`` has parsed; the call ends at one that doesn't parse."""

    def __init__(self, requests: Any, context: grpc.ServicerContext) -> None:
        self._requests = requests
        self._context = context

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        request = next(self._requests)
        if request is _UNPARSABLE:
            self._context.abort(grpc.StatusCode.INVALID_ARGUMENT, DETAILS)
        return request

    next = __next__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._requests, name)


def sync_parsed(behavior: Callable[..., Any], *, request_streaming: bool) -> Callable[..., Any]:
    """A handler of a threaded server, whose requests ``kept`` has parsed."""

    def handle(request: Any, context: Any) -> Any:
        if request_streaming:
            request = _Requests(request, context)
        elif request is _UNPARSABLE:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, DETAILS)
        return behavior(request, context)

    handle.__qualname__ = getattr(behavior, "__qualname__", handle.__qualname__)
    return handle
