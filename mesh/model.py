"""The values that the mesh passes around: endpoints, calls, the flow's steps and wake-ups, outcomes and verdicts.

A flow (``policy/call/flow.py``) yields steps and is sent wake-ups; a driver (``channel/driver.py``) performs the steps.
Nothing here does IO or knows gRPC's classes. Instants (``now``, ``until``, ``deadline``) are monotonic seconds;
timeouts are spans in seconds. What is made for every call is slotted and not frozen: freezing costs up to a
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
"""Held for arithmetic alone. Policies are given their locks, as they are given time and chance."""


class Connectivity(enum.IntEnum):
    """The state of an endpoint's connection, or of a channel over all of them, with gRPC core's numbers."""

    IDLE = 0
    CONNECTING = 1
    READY = 2
    TRANSIENT_FAILURE = 3
    SHUTDOWN = 4


@dataclass(frozen=True, slots=True)
class Locality:
    """Where an endpoint runs, from the largest to the smallest."""

    region: str = ""
    zone: str = ""
    sub_zone: str = ""


MAX_WEIGHT = 1_000
"""The largest weight that an instance may have; the least is 1. So one instance that asks for too much gets at most a
thousand times the share of another."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address that may be called: ``host:port``, or a target that gRPC itself takes (``unix:path``).

    ``weight`` is its share of the load against others; ``priority`` 0 is used before 1.
    """

    address: str
    locality: Locality = Locality()
    weight: int = 1
    priority: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(slots=True)
class CallSpec:
    """One call: what the user asked for, and the record of what was done for it.

    ``deadline`` is math.inf without one. ``may_retry`` is false under an inbound attempt that is itself a retry
    (chain stop). ``attempts`` is filled by the flow as it goes and is what ``explain()`` reads.
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

    ``pushback``: the server's word on when to retry, in seconds; negative: not at all; None: it said nothing.
    ``committed``: the server had begun to answer, so the caller may have seen it. ``never_sent``: the driver didn't
    start it. ``cancelled``: it was cancelled here. ``result``: what the driver keeps with it; the flow never looks
    inside.
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
    """Step: start this attempt, and wait until something happens or ``until``.

    ``timeout`` None: unbounded. ``previous``: attempts that were sent for the call before this one, which the server
    is told. The flow writes down what became of it: ``started``, ``ended``, ``outcome`` and ``note`` (what was unusual
    about the pick) are for ``explain()``.
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
    """Step: start nothing; wait until something happens or ``until``.

    Backoff, a pushback before the next hedge, a queue for a READY endpoint, and the life of a committed stream are
    all this. With ``picker``, a change of the cluster's picker from this one is something that happens.
    """

    __slots__ = ("picker", "until")

    def __init__(self, until: float | None = None, picker: object = None) -> None:
        self.until = until
        self.picker = picker

    def __repr__(self) -> str:
        return f"<Wait until={self.until}{' for an endpoint' if self.picker is not None else ''}>"


class Commit:
    """Step: attempt ``number`` is the call now; cancel the others, hand it to the caller, go on waiting."""

    __slots__ = ("number",)

    until = None  # as the other steps have it

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"<Commit {self.number}>"


class Cancel:
    """Step: cancel attempt ``number``, whose end is reported as any other's."""

    __slots__ = ("number",)

    until = None

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"<Cancel {self.number}>"


Step = Attempt | Wait | Commit | Cancel


# -- wake-ups: what a driver sends


class Headers:
    """Wake-up: the server has begun to answer attempt ``number``."""

    __slots__ = ("now", "number")

    def __init__(self, now: float, number: int) -> None:
        self.now = now
        self.number = number


class Overflow(Headers):
    """Wake-up: what attempt ``number`` has sent is more than the replay buffer holds."""

    __slots__ = ()


class Ended:
    """Wake-up: attempt ``number`` has ended."""

    __slots__ = ("now", "number", "outcome")

    def __init__(self, now: float, number: int, outcome: Outcome) -> None:
        self.now = now
        self.number = number
        self.outcome = outcome


class Elapsed:
    """Wake-up: the step's time is over, or what it waits for may have come: look again."""

    __slots__ = ("now",)

    def __init__(self, now: float) -> None:
        self.now = now


Wake = Headers | Ended | Elapsed


class Verdict:
    """How a call ended: the ``outcome``, and the ``attempt`` that it is of; None when the mesh itself ended it."""

    __slots__ = ("attempt", "outcome")

    def __init__(self, outcome: Outcome, attempt: Attempt | None = None) -> None:
        self.outcome = outcome
        self.attempt = attempt

    def __repr__(self) -> str:
        return f"<Verdict {Code(self.outcome.code).name} {f'of {self.attempt!r}' if self.attempt else 'by the mesh'}>"
