"""Requests that can't be parsed end with INVALID_ARGUMENT: the caller is at fault, but grpc says INTERNAL or UNKNOWN.

grpc parses a request before it calls the handler, where nothing can set a status. So the parser is wrapped: it returns
a sentinel instead of a request, and whoever receives that refuses the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from mesh.server.handlers.scope import Behavior, named_after

Parse = Callable[[bytes], Any]

DETAILS = "the request's bytes are not a message of the method's request type"


class UnparsableError(ValueError):
    """A request's bytes can't be parsed."""

    def __init__(self) -> None:
        super().__init__(DETAILS)


_UNPARSABLE = UnparsableError()
"""What a parser returns for bytes that it can't parse. One for all: it says nothing about them."""


def parse_or_sentinel(parse: Parse) -> Parse:
    """``parse``, but returning a sentinel for bytes that it can't parse."""

    def parsed(request: bytes) -> Any:
        try:
            return parse(request)
        except Exception:
            return _UNPARSABLE

    return parsed


def parse_or_raise(parse: Parse) -> Parse:
    """``parse``, but raising ``UnparsableError`` for bytes that it can't parse."""

    def parsed(request: bytes) -> Any:
        try:
            return parse(request)
        except Exception:
            raise UnparsableError from None

    return parsed


def aio_parsed(behavior: Behavior) -> Behavior:
    """A handler of an aio server with one request, which ``parse_or_sentinel`` has parsed."""

    def handle(request: Any, context: Any) -> Any:
        if request is _UNPARSABLE:
            raise UnparsableError
        return behavior(request, context)

    return named_after(behavior, handle)


def sync_parsed(behavior: Behavior, *, request_streaming: bool) -> Behavior:
    """A handler of a threaded server, whose requests ``parse_or_sentinel`` has parsed."""

    def handle(request: Any, context: Any) -> Any:
        if request_streaming:
            request = _Requests(request, context)
        elif request is _UNPARSABLE:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, DETAILS)
        return behavior(request, context)

    return named_after(behavior, handle)


class _Requests:
    """A stream's requests, which ``parse_or_sentinel`` has parsed; the call ends at one that can't be parsed."""

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
