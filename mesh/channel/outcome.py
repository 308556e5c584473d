"""Outcomes of attempts, from what core reports; and the metadata that a retry sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mesh.channel.pool import Pool
from mesh.channel.replay import LIMIT
from mesh.codes import Code
from mesh.model import Attempt, Outcome
from mesh.wire import PREVIOUS_ATTEMPTS, PUSHBACK

LONGEST_PUSHBACK = 20
"""Characters of a server's pushback: as many as the longest 64-bit number has."""


# Only for an attempt that the driver did not start. One that it started counts as sent: core doesn't report whether a
# call left the client, and a status text may be the peer's (docs/decisions/0013).
NEVER_SENT = Outcome(Code.UNAVAILABLE, "the connection was lost before the call was sent", never_sent=True)


# As gRPC words them.
CANCELLED_DETAILS = "Locally cancelled by application!"


CLOSED_DETAILS = "Channel closed!"


FORKED_DETAILS = "Call cancelled in fork child"


def pushback_of(trailing_metadata: Any) -> float | None:
    """The server's pushback in seconds; -1.0 (do not retry) when it can't be parsed; None without one (A6)."""
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
    """The outcome of an attempt that core ended with a status other than OK. ``final``: it must not be retried."""
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


def exceeds_replay_limit(serializer: Callable[[Any], bytes] | None, request: Any) -> bool:
    """Whether a unary request exceeds the replay buffer."""
    try:
        return len(serializer(request) if serializer else request) > LIMIT
    except Exception:  # it could not be serialized, which is why the attempt failed
        return False


def retry_metadata(attempt: Attempt) -> Any:
    """The metadata to send: the call's own and, for a retry, how many attempts came before (A6)."""
    if not attempt.previous:
        return attempt.metadata
    return (*(attempt.metadata or ()), (PREVIOUS_ATTEMPTS, str(attempt.previous)))
