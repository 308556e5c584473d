"""The mesh's value types: endpoints, calls, the flow's steps and wake-ups, outcomes and verdicts.

A flow (``policy/call/flow.py``) yields steps and is sent wake-ups; a driver (``channel/driver.py``) performs the steps.
Nothing here does IO or uses gRPC's classes. Instants (``now``, ``until``, ``deadline``) are monotonic seconds; timeouts
are spans in seconds. Types that every call creates have slots and aren't frozen: freezing would cost up to a
microsecond each.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from mesh.codes import Code
from mesh.config.settings import MethodPolicy

Metadatum = tuple[str, str | bytes]

Lock = AbstractContextManager[object]
"""Held only for arithmetic. Policies are given their locks, like time and randomness."""


class Connectivity(enum.IntEnum):
    """The connectivity state of an endpoint or of a whole channel, with gRPC core's numbers."""

    IDLE = 0
    CONNECTING = 1
    READY = 2
    TRANSIENT_FAILURE = 3
    SHUTDOWN = 4


@dataclass(frozen=True, slots=True)
class Locality:
    """Where an endpoint runs."""

    region: str = ""
    zone: str = ""
    sub_zone: str = ""


MAX_WEIGHT = 1_000
"""The largest weight of an instance; the smallest is 1. So no instance can ask for more than a thousand times the share
of another."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address that may be called: ``host:port``, or a target that gRPC itself accepts (``unix:path``).

    ``weight``: its share of the load relative to others. ``priority``: 0 is used before 1.
    """

    address: str
    locality: Locality = Locality()
    weight: int = 1
    priority: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(slots=True)
class CallSpec:
    """One call: what the user asked for, and a record of its attempts.

    ``deadline``: math.inf if there is none. ``may_retry``: false when the call is made for an inbound attempt that is
    itself a retry, so that retries don't multiply along a chain of services. ``attempts`` is filled by the flow, for
    ``explain()``.
    """

    method: str
    policy: MethodPolicy
    deadline: float
    metadata: Sequence[Metadatum] | None = None
    wait_for_ready: bool = False
    may_retry: bool = True
    started: float = 0.0
    attempts: list[Attempt] = field(default_factory=list)


class Outcome:
    """How an attempt ended.

    ``pushback``: when to retry according to the server, in seconds; negative: not at all; None: it didn't say.
    ``committed``: the server had begun to respond, so the caller may have seen it. ``never_sent``: the driver didn't
    start it. ``cancelled``: it was cancelled in this process. ``result``: the driver's own; the flow doesn't use it.
    """

    __slots__ = ("cancelled", "code", "committed", "details", "never_sent", "pushback", "result")

    def __init__(
        self,
        code: int,
        details: str = "",
        *,
        pushback: float | None = None,
        committed: bool = False,
        never_sent: bool = False,
        cancelled: bool = False,
        result: object = None,
    ) -> None:
        self.code = code
        self.details = details
        self.pushback = pushback
        self.committed = committed
        self.never_sent = never_sent
        self.cancelled = cancelled
        self.result = result

    def __repr__(self) -> str:
        flags = [name for name in ("committed", "never_sent", "cancelled") if getattr(self, name)]
        if self.pushback is not None:
            flags.append(f"pushback={self.pushback:g}s")
        return f"<Outcome {' '.join([Code(self.code).name, *flags])}>"


# -- steps: what a flow yields


class Attempt:
    """Step: start this attempt, then wait for an event, at most until ``until``.

    ``timeout`` None: no limit. ``previous``: the number of attempts sent before this one, for the server. The flow
    records ``started``, ``ended``, ``outcome`` and ``note`` (what was unusual about the pick) for ``explain()``.
    """

    __slots__ = (
        "ended",
        "endpoint",
        "metadata",
        "note",
        "number",
        "outcome",
        "previous",
        "started",
        "timeout",
        "until",
    )

    def __init__(
        self,
        number: int,
        endpoint: Endpoint,
        timeout: float | None,
        metadata: Sequence[Metadatum] | None,
        until: float | None,
        previous: int,
        started: float,
    ) -> None:
        self.number = number
        self.endpoint = endpoint
        self.timeout = timeout
        self.metadata = metadata
        self.until = until
        self.previous = previous
        self.started = started
        self.ended: float | None = None
        self.outcome: Outcome | None = None
        self.note = ""

    def __repr__(self) -> str:
        return f"<Attempt {self.number} to {self.endpoint.address} {self.outcome or 'running'}>"


class Wait:
    """Step: wait for an event, at most until ``until``; start nothing.

    For backoff, pushback, the delay before a hedge, a call that waits for a READY endpoint, and a committed stream.
    With ``picker``, the driver also wakes up the flow when this picker is replaced.
    """

    __slots__ = ("picker", "until")

    def __init__(self, until: float | None = None, picker: object = None) -> None:
        self.until = until
        self.picker = picker

    def __repr__(self) -> str:
        return f"<Wait until={self.until}{' for an endpoint' if self.picker is not None else ''}>"


class Commit:
    """Step: commit to attempt ``number``: cancel the others, hand it to the caller, and go on waiting."""

    __slots__ = ("number",)

    until = None  # the other steps have one

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"<Commit {self.number}>"


class Cancel:
    """Step: cancel attempt ``number``, and report its end as for any other attempt."""

    __slots__ = ("number",)

    until = None

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"<Cancel {self.number}>"


Step = Attempt | Wait | Commit | Cancel


# -- wake-ups: what a driver sends


class Headers:
    """Wake-up: the server has begun to respond to attempt ``number``."""

    __slots__ = ("now", "number")

    def __init__(self, now: float, number: int) -> None:
        self.now = now
        self.number = number


class Overflow(Headers):
    """Wake-up: attempt ``number`` has sent more than the replay buffer holds."""

    __slots__ = ()


class Ended:
    """Wake-up: attempt ``number`` has ended."""

    __slots__ = ("now", "number", "outcome")

    def __init__(self, now: float, number: int, outcome: Outcome) -> None:
        self.now = now
        self.number = number
        self.outcome = outcome


class Elapsed:
    """Wake-up: the step's time is up, or an event that it waits for may have happened: decide again."""

    __slots__ = ("now",)

    def __init__(self, now: float) -> None:
        self.now = now


Wake = Headers | Ended | Elapsed


class Verdict:
    """How a call ended: the ``outcome``, and its ``attempt``; None if the mesh itself ended the call."""

    __slots__ = ("attempt", "outcome")

    def __init__(self, outcome: Outcome, attempt: Attempt | None = None) -> None:
        self.outcome = outcome
        self.attempt = attempt

    def __repr__(self) -> str:
        return f"<Verdict {Code(self.outcome.code).name} {f'of {self.attempt!r}' if self.attempt else 'by the mesh'}>"
