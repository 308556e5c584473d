"""How attempts end: what core says of one that failed, as an ``Outcome``; and what one that follows is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mesh.channel.pool import Pool
from mesh.channel.replay import LIMIT
from mesh.codes import Code
from mesh.model import Attempt, Outcome
from mesh.wire import PREVIOUS_ATTEMPTS, PUSHBACK

LONGEST_PUSHBACK = 20
"""A server's word on when to retry; any 64-bit number has fewer or as many characters."""


# Only where the driver didn't start the attempt. What was started counts as sent: core doesn't tell whether a call
# left, and its status text may be a peer's (docs/decisions/0013).
NEVER_SENT = Outcome(Code.UNAVAILABLE, "no connection to send it on", never_sent=True)


# grpc's words
CANCELLED_DETAILS = "Locally cancelled by application!"


CLOSED_DETAILS = "Channel closed!"


FORKED_DETAILS = "Call cancelled in fork child"


def pushback_of(trailing_metadata: Any) -> float | None:
    """The server's word on when to retry, in seconds; -1.0 (never) when it can't be read (A6)."""
    for key, value in trailing_metadata or ():
        if key == PUSHBACK:
            if len(value) > LONGEST_PUSHBACK:
                return -1.0
            try:
                milliseconds = int(value)
            except ValueError:
                return -1.0
            return milliseconds / 1000 if milliseconds >= 0 else -1.0
    return None


def failed(
    pool: Pool,
    address: str,
    code: int,
    details: str | None,
    initial: Any,
    trailing: Any,
    result: object,
    *,
    final: bool = False,
    cancelled: bool = False,
) -> Outcome:
    """The outcome of an attempt that core ended with a status other than OK. ``final``: it can't be made again."""
    if code == Code.UNAVAILABLE:
        pool.refresh_state(address)
    return Outcome(
        code,
        details or "",
        pushback=pushback_of(trailing),
        committed=final or bool(initial),
        cancelled=cancelled,
        result=result,
    )


def too_large(serializer: Callable[[Any], bytes] | None, request: Any) -> bool:
    """Whether a unary request is more than is kept for another attempt."""
    try:
        return len(serializer(request) if serializer else request) > LIMIT
    except Exception:  # it could not be serialised, which is how the attempt has failed
        return False


def retry_metadata(attempt: Attempt) -> Any:
    """The metadata to send: the call's own, and for a retry how many attempts came before (A6)."""
    if not attempt.previous:
        return attempt.metadata
    return (*(attempt.metadata or ()), (PREVIOUS_ATTEMPTS, str(attempt.previous)))
