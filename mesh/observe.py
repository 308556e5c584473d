"""What ``explain()`` returns, for every call object and every raised error; and the observer of a server's calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh.codes import Code
from mesh.model import CallSpec, Outcome, Verdict


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt of a call.

    ``started``: seconds since the call started. ``seconds``: how long it took. ``code``: a status code's name,
    "NEVER_SENT" for an attempt that didn't leave this process, or "RUNNING". ``note``: what was unusual about the pick
    ("panic: ...").
    """

    number: int
    address: str
    started: float
    seconds: float | None
    code: str
    details: str
    note: str = ""

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" after {_milliseconds(self.seconds)}"
        details = f": {self.details}" if self.details else ""
        to = f"{self.address} ({self.note})" if self.note else self.address
        return f"attempt {self.number} to {to} at +{_milliseconds(self.started)}: {self.code}{took}{details}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """A call and its attempts; its ``str`` is for people. While the call runs, ``seconds`` is None and ``code`` is
    "RUNNING". ``endpoint``: the address whose response, or failure, is the call's; empty when the mesh itself ended the
    call, or while it runs."""

    method: str
    target: str
    code: str
    details: str
    seconds: float | None
    attempts: tuple[AttemptRecord, ...]
    endpoint: str = ""

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" after {_milliseconds(self.seconds)}"
        details = f": {self.details}" if self.details else ""
        lines = [f"{self.method} to {self.target}: {self.code}{took}{details}", *map(str, self.attempts)]
        return "\n  ".join(lines)


@dataclass(frozen=True, slots=True)
class EndpointStats:
    """What a channel knows about one endpoint.

    ``state``: its connection's, as balancing sees it and ``grpc.ChannelConnectivity`` names it. ``cause``: why it can't
    be reached, if known. ``ejected``: why outlier detection has ejected it, and for how long; empty while it is not.
    ``in_flight``: attempts. ``latency``: the peak-sensitive moving average that balancing compares, in seconds, in
    which failures count as slow; 0.0 before the first response. ``weight``: its share of the load relative to the
    others.
    """

    address: str
    state: str
    cause: str
    ejected: str
    in_flight: int
    latency: float
    weight: float

    def __str__(self) -> str:
        cause = f": {self.cause}" if self.cause else ""
        ejected = f", ejected: {self.ejected}" if self.ejected else ""
        flight = f"{self.in_flight} in flight, {_milliseconds(self.latency)}, weight {self.weight:g}"
        return f"{self.address} {self.state}{cause}{ejected}, {flight}"


@dataclass(frozen=True, slots=True)
class ChannelStats:
    """A snapshot of what a channel knows: ``channel.stats()``.

    ``state``: of the whole channel. ``error``: why there are no endpoints, if there are none. ``panic``: so many
    endpoints are ejected that ejections are ignored. ``ejections``: how often each kind occurred ("ejected: consecutive
    failures", "returned", "kept: ..." where too many were ejected already, "would eject: ..." in a dry run).
    ``refusals``: calls that the client refused, by reason. ``outstanding``: calls that have not ended.
    ``retry_budget``: retries and hedges that the budget allows now.
    """

    target: str
    state: str
    error: str
    endpoints: tuple[EndpointStats, ...]
    panic: bool
    ejections: Mapping[str, int] = field(hash=False)
    refusals: Mapping[str, int] = field(hash=False)
    outstanding: int
    retry_budget: float

    def __str__(self) -> str:
        lines = [f"{self.target} {self.state}{' (panic: ejections are ignored)' if self.panic else ''}"]
        lines += [str(each) for each in self.endpoints] or ([self.error] if self.error else [])
        return "\n  ".join(lines)


class ServerObserver:
    """Called for each call of a server, for metrics: ``ServerSettings(observer=...)``.

    Override what you need. The methods run on the event loop or on the handlers' threads, several at a time, so they
    must be fast and must not block. Exceptions are logged, and don't affect calls.
    """

    def handled(self, method: str, code: int, seconds: float) -> None:
        """A call that reached its handler has ended. ``method``: "/package.Service/Method". ``code``: the status code's
        number. ``seconds``: how long it took, including its time in the queue."""

    def refused(self, method: str, reason: str) -> None:
        """A call was refused before its handler. ``reason``: starting, draining, delay, full, streams, expired or
        late."""


def explain(call: CallSpec, target: str, verdict: Verdict | None, now: float) -> Explanation:
    """Explain ``call``. ``verdict``: None while it runs. ``now``: when it ended, or the current time."""
    attempts = tuple(
        AttemptRecord(
            number=attempt.number,
            address=attempt.endpoint.address,
            started=attempt.started - call.started,
            seconds=None if attempt.ended is None else attempt.ended - attempt.started,
            code=_code(attempt.outcome),
            details=attempt.outcome.details if attempt.outcome else "",
            note=attempt.note,
        )
        for attempt in tuple(call.attempts)
    )
    outcome = verdict.outcome if verdict else None
    return Explanation(
        method=call.method,
        target=target,
        code=Code(outcome.code).name if outcome else "RUNNING",
        details=outcome.details if outcome else "",
        seconds=now - call.started if verdict else None,
        attempts=attempts,
        endpoint=verdict.attempt.endpoint.address if verdict and verdict.attempt else "",
    )


def _code(outcome: Outcome | None) -> str:
    if outcome is None:
        return "RUNNING"
    return "NEVER_SENT" if outcome.never_sent else Code(outcome.code).name


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
