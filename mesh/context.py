"""Context propagation: the inbound call being handled, and what the calls made for it inherit.

This is the only file with contextvars. Servers set a ``Scope`` around each handler; channels read it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar


class Scope:
    """The inbound call being handled.

    ``deadline``: in monotonic seconds; None if there is none. ``is_retry``: the inbound attempt is itself a retry or a
    hedge, so calls made for it aren't retried. ``exhausted``: a call made for it was allowed to retry and failed, so
    the server tells its caller not to retry. ``criticality``: the inbound call's ("CRITICAL", "SHEDDABLE", ...; empty
    if it has none), which calls made for it send as ``weft-criticality``. ``arrived``: when it arrived in this process.
    ``handler_started``: its handler runs.
    """

    __slots__ = (
        "_children",
        "arrived",
        "cancelled",
        "closed",
        "criticality",
        "deadline",
        "exhausted",
        "handler_started",
        "is_retry",
    )

    def __init__(
        self, deadline: float | None = None, *, is_retry: bool = False, criticality: str = "", arrived: float = 0.0
    ) -> None:
        self.deadline = deadline
        self.is_retry = is_retry
        self.criticality = criticality
        self.arrived = arrived
        self.handler_started = False
        self.exhausted = False
        self.cancelled = False
        self.closed = False
        # A dict, for its order and O(1) removal; keyed by the child call's identity.
        self._children: dict[int, Callable[[], object]] = {}

    def adopt(self, child: object, cancel: Callable[[], object]) -> None:
        """Call ``cancel`` when the inbound call is cancelled; at once, if it already was."""
        self._children[id(child)] = cancel
        if self.cancelled:
            self.cancel()

    def release(self, child: object) -> None:
        """Forget a child that has ended."""
        self._children.pop(id(child), None)

    def cancel(self) -> None:
        """The inbound call was cancelled: cancel the calls made for it."""
        if self.closed:
            return
        self.cancelled = True
        while self._children:
            try:
                _, cancel = self._children.popitem()
            except KeyError:  # another thread took the last one
                return
            cancel()

    def close(self) -> None:
        """The handler has ended: what it left running inherits nothing anymore, and isn't cancelled with the call."""
        self.closed = True

    def __repr__(self) -> str:
        return f"<Scope deadline={self.deadline} is_retry={self.is_retry} cancelled={self.cancelled}>"


_scope: ContextVar[Scope | None] = ContextVar("mesh_scope", default=None)

REFUSAL_REASON: ContextVar[str] = ContextVar("mesh_refused", default="")
"""Why the inbound call was refused before its handler, for the server's observer; empty when it was not."""

inbound = _scope.get
"""The scope of the inbound call that this context belongs to, even after its handler has ended; or None."""


def current() -> Scope | None:
    """The scope of the inbound call being handled; None outside of one, and once its handler has ended.

    A task or thread that a handler starts keeps the handler's context forever. After the handler has ended, the inbound
    call's deadline no longer applies to it.
    """
    scope = _scope.get()
    return None if scope is None or scope.closed else scope


@contextlib.contextmanager
def entered(scope: Scope | None) -> Iterator[None]:
    """Handle an inbound call: calls made in here inherit from ``scope``."""
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)


def enter(scope: Scope | None) -> None:
    """Like ``entered``, for the rest of the current context (a task of its own, for example)."""
    _scope.set(scope)


def remaining() -> float | None:
    """Seconds until the deadline of the inbound call being handled (0.0 once it has passed); None outside of one, or
    without a deadline."""
    scope = current()
    if scope is None or scope.deadline is None:
        return None
    return max(0.0, scope.deadline - time.monotonic())


def detach() -> contextlib.AbstractContextManager[None]:
    """Calls made in here outlive the inbound call: they inherit neither its deadline nor its cancellation."""
    return entered(None)
