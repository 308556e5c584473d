"""Call objects. As in gRPC, the object of a call in flight is a ``grpc.Call``, a ``grpc.Future`` and a
``grpc.RpcError`` at once."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import grpc

from mesh import background
from mesh.channel.base import BaseCall
from mesh.channel.sync.driver import Driver
from mesh.errors import CallError, RpcError, terminated
from mesh.model import Outcome, Verdict
from mesh.observe import Explanation
from mesh.wire import STATUS_CODES


class Call(BaseCall, RpcError, grpc.Call, grpc.Future):  # type: ignore[type-arg,misc]  # noqa: N818 - it is a call, too
    """A call started with ``.future()``, or a streaming one: what grpc returns there, with ``explain()``."""

    _driver: Driver

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver

    # -- as a grpc.RpcContext

    def is_active(self) -> bool:
        return self._driver.verdict is None

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return self._driver.add_callback(callback)

    # -- as a grpc.Call

    def initial_metadata(self) -> Any:
        inner = self._driver.committed_call()
        return () if inner is None else inner.initial_metadata() or ()

    def trailing_metadata(self) -> Any:
        inner = self._end().result
        return () if inner is None else inner.trailing_metadata() or ()  # type: ignore[attr-defined]

    def code(self) -> grpc.StatusCode:
        return STATUS_CODES[self._end().code]

    def details(self) -> str:
        return self._end().details

    def debug_error_string(self) -> str:
        """Core's description of how the call ended."""
        inner = self._end().result
        return self.details() if inner is None else _debug_error_string(inner)

    # -- as a grpc.Future

    def cancelled(self) -> bool:
        verdict = self._driver.verdict
        return verdict is not None and verdict.outcome.cancelled

    def running(self) -> bool:
        return self._driver.verdict is None

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the response. Raises itself when the call failed, FutureTimeoutError, or FutureCancelledError."""
        if self._failure(timeout) is not None:
            raise self
        return self._end().result.result()  # type: ignore[attr-defined]

    def exception(self, timeout: float | None = None) -> Exception | None:
        """Wait for the end: None after success, otherwise this call itself. Raises as ``result`` for timeouts and
        cancels."""
        return self._failure(timeout)

    def traceback(self, timeout: float | None = None) -> TracebackType | None:
        """The traceback that ``result`` would raise with."""
        if self._failure(timeout) is None:
            return None
        try:
            raise self
        except grpc.RpcError:
            return sys.exc_info()[2]

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        if not self._driver.add_callback(functools.partial(fn, self)):
            fn(self)

    def _failure(self, timeout: float | None) -> Call | None:
        verdict = self._driver.wait(timeout)
        if verdict is None:
            raise grpc.FutureTimeoutError
        if verdict.outcome.cancelled:
            raise grpc.FutureCancelledError
        return self if verdict.outcome.code else None

    def _end(self) -> Outcome:
        verdict = self._driver.wait()
        assert verdict is not None  # there was no timeout
        return verdict.outcome

    def __del__(self) -> None:
        driver = getattr(self, "_driver", None)
        if driver is not None and driver.verdict is None:
            background.call_from_finalizer(functools.partial(driver.cancel, "Cancelled upon garbage collection!"))

    def __repr__(self) -> str:
        verdict = self._driver.verdict
        name = type(self).__name__
        if verdict is None:
            return f"<{name} object>"
        endpoint = verdict.attempt.endpoint.address if verdict.attempt and verdict.outcome.code else ""
        outcome = verdict.outcome
        return terminated(name, STATUS_CODES[outcome.code], outcome.details, self.debug_error_string(), endpoint)

    __str__ = __repr__


class StreamCall(Call):
    """A call with streamed responses."""

    def __iter__(self) -> StreamCall:
        return self

    def __next__(self) -> Any:
        inner = self._driver.committed
        if inner is None:
            inner = self._driver.committed_call()
        if inner is None:
            raise self
        try:
            return next(inner)
        except StopIteration:
            self._driver.wait()  # core's thread is about to report how it ended
            raise
        except grpc.RpcError:
            self._driver.response_failed(inner)
            self._driver.wait()
            raise self from None

    next = __next__


class FinishedCall(grpc.Call):
    """The call that ``with_call`` returns beside the response: grpc's own, with ``explain()``."""

    def __init__(self, core: Any, explanation: Explanation) -> None:
        self._core = core
        self._explanation = explanation

    def explain(self) -> Explanation:
        """Every attempt that was made for the call: where, when, and how it ended."""
        return self._explanation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def initial_metadata(self) -> Any:
        return self._core.initial_metadata()

    def trailing_metadata(self) -> Any:
        return self._core.trailing_metadata()

    def code(self) -> Any:
        return self._core.code()

    def details(self) -> Any:
        return self._core.details()

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> Any:
        return self._core.time_remaining()

    def cancel(self) -> Any:
        return self._core.cancel()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return bool(self._core.add_callback(callback))

    def __repr__(self) -> str:
        return repr(self._core)


def _debug_error_string(call: Any) -> str:
    # grpc's own method blocks forever when the call was ended locally (cancelled, or by a bad message), but its repr
    # has the text. The details are the peer's and may look like what follows them.
    _, _, rest = str(call).partition(f'\tdetails = "{call.details()}"\n\tdebug_error_string = "')
    text = rest.removesuffix('"\n>')
    return "" if text == "None" else text


def call_error(explanation: Explanation, verdict: Verdict) -> CallError:
    """The error that a blocking call raises."""
    outcome = verdict.outcome
    core: Any = outcome.result
    if core is None:
        return CallError(STATUS_CODES[outcome.code], outcome.details, explanation, debug_error_string=outcome.details)
    return CallError(
        core.code(),
        outcome.details,
        explanation,
        core.initial_metadata() or (),
        core.trailing_metadata() or (),
        core.debug_error_string(),
    )
