"""The conformance table of retries and hedging: a row for each promise, and where gRPC's core differs.

A row says what the service config allows, what servers do with each attempt, and what the caller and the servers then
see. Rows are black boxes: they know of no class of the mesh. ``core`` is what plain grpcio does instead, and ``why``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.conformance.servers import Do

A6 = "gRFC A6, "
KIB = 1024
FOREVER = 30.0  # seconds; what takes as long fails the row
SLOW = 0.15  # seconds; an answer that something else comes before
BRIEF = 0.03  # seconds, in which small requests are written; grpc.aio may lose the status of a call that ends before


@dataclass(frozen=True)
class Expect:
    """What is seen of a call.

    ``attempts`` reach servers, and tell how many came before (``previous``; None: absent, "1", "2" ...). ``gaps``: the
    least seconds between one arrival and the next. ``messages``: responses the caller reads. ``requests``: those that
    each attempt reads. ``cancelled``: attempts that are cancelled in the end. ``elsewhere``: no two attempts in a row
    go to one server. ``shrinks``: seconds by which each attempt has at least less time left than the one before.
    """

    code: str
    attempts: int
    previous: Sequence[str | None] | None = None
    gaps: Sequence[float] = ()
    messages: int | None = None
    requests: Sequence[int] | None = None
    cancelled: int | None = None
    elsewhere: bool = False
    shrinks: float = 0.0


@dataclass(frozen=True)
class Case:
    """A row. ``then`` are further calls on the same channel: their scripts and what is expected. ``dead``: addresses
    that nobody listens at stand before the servers'. ``core_timeout``: plain grpcio's instead of ``timeout``, where it
    would wait long. ``mesh_only``: what plain grpcio does is left to chance, so it isn't asked."""

    name: str
    source: str
    config: dict[str, Any]
    script: Sequence[str | Do]
    expect: Expect
    kind: str = "unary_unary"
    timeout: float | None = 10.0
    requests: int = 1
    size: int = 10
    then: Sequence[tuple[Sequence[str | Do], Expect]] = ()
    dead: int = 0
    core: Expect | None = None
    core_then: Sequence[Expect] | None = None
    core_timeout: float | None = None
    mesh_only: bool = False
    why: str = ""

    def calls(self) -> list[tuple[Sequence[Do], Expect]]:
        """Every call of the row: what the servers do, and what the mesh makes of it."""
        return [(_steps(script), expect) for script, expect in ((self.script, self.expect), *self.then)]

    def core_calls(self) -> list[tuple[Sequence[Do], Expect]]:
        """The same for plain grpcio."""
        first, *rest = self.calls()
        further = self.core_then if self.core_then is not None else [expect for _, expect in rest]
        return [
            (first[0], self.core or first[1]),
            *((steps, expect) for (steps, _), expect in zip(rest, further, strict=True)),
        ]


def _steps(script: Sequence[str | Do]) -> list[Do]:
    return [Do(step) if isinstance(step, str) else step for step in script]


def config(method: dict[str, Any] | None = None, **further: Any) -> dict[str, Any]:
    """A service config with one entry for every method."""
    return {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [{"name": [{}], **(method or {})}],
        **further,
    }


def policy(
    attempts: int = 3,
    codes: Sequence[Any] = ("UNAVAILABLE",),
    backoff: str = "0.01s",
    most: str = "0.01s",
    multiplier: float = 1,
) -> dict[str, Any]:
    return {
        "maxAttempts": attempts,
        "initialBackoff": backoff,
        "maxBackoff": most,
        "backoffMultiplier": multiplier,
        "retryableStatusCodes": list(codes),
    }


def retry(*arguments: Any, method: dict[str, Any] | None = None, further: Any = None, **named: Any) -> dict[str, Any]:
    """A config with a retry policy; ``method`` and ``further`` hold what else is in the entry and the config."""
    return config({"retryPolicy": policy(*arguments, **named), **(method or {})}, **(further or {}))


def hedge(
    attempts: int = 3,
    delay: str = "0.01s",
    codes: Sequence[Any] = ("UNAVAILABLE",),
    further: Any = None,
    **named: Any,
) -> dict[str, Any]:
    """A config with a hedging policy."""
    policy = {"maxAttempts": attempts, "hedgingDelay": delay, "nonFatalStatusCodes": list(codes), **named}
    return config({"hedgingPolicy": policy}, **(further or {}))


UNAVAILABLE = "UNAVAILABLE"
LATE = Do(delay=SLOW)
HANGS = Do(delay=FOREVER)


def fails(pushback: str | None = None, code: str = UNAVAILABLE, **named: Any) -> Do:
    return Do(code, pushback=pushback, **named)


HEARD = 0.1  # seconds in which a client hears of headers: when the end comes with them, grpc.aio tells of the end alone

ACCEPTED_SILENTLY = "core takes a hedging policy and makes one attempt"
NO_ATTEMPT_TIMEOUT = "core doesn't know the key"
RECEIVES_SOON = config({"retryPolicy": {**policy(), "perAttemptRecvTimeout": "0.05s"}})
NO_BUDGET = "core has the throttle, and no budget"
SLEEPS = "core waits although the deadline comes first"

RETRIES = [
    Case(
        "a call that fails once is tried again and succeeds",
        A6 + "Retry Policy",
        retry(),
        [UNAVAILABLE, "OK"],
        Expect("OK", 2),
    ),
    Case(
        "a call that succeeds at once is one attempt and says nothing of attempts before",
        A6 + "Exposed Retry Metadata",
        retry(),
        ["OK"],
        Expect("OK", 1, previous=[None]),
    ),
    Case(
        "the server is told of the attempts before: nothing, 1, 2",
        A6 + "Exposed Retry Metadata",
        retry(),
        [UNAVAILABLE, UNAVAILABLE, "OK"],
        Expect("OK", 3, previous=[None, "1", "2"]),
    ),
    Case(
        "maxAttempts counts the first attempt",
        A6 + "Maximum Number of Retries",
        retry(2),
        [UNAVAILABLE],
        Expect(UNAVAILABLE, 2),
    ),
    Case(
        "five attempts are made when five are allowed",
        A6 + "Validation of retryPolicy",
        retry(5),
        [UNAVAILABLE],
        Expect(UNAVAILABLE, 5, previous=[None, "1", "2", "3", "4"]),
    ),
    Case(
        "more than five attempts are taken as five",
        A6 + "Validation of retryPolicy",
        retry(10),
        [UNAVAILABLE],
        Expect(UNAVAILABLE, 5),
    ),
    Case(
        "the last failure is what the caller sees",
        A6 + "Retry Policy",
        retry(codes=[UNAVAILABLE, "ABORTED"]),
        [UNAVAILABLE, UNAVAILABLE, "ABORTED"],
        Expect("ABORTED", 3),
    ),
    Case(
        "a status that isn't listed is not retried",
        A6 + "Retryable Status Codes",
        retry(),
        ["INTERNAL", "OK"],
        Expect("INTERNAL", 1),
    ),
    Case(
        "a status that isn't listed ends the retries",
        A6 + "Retryable Status Codes",
        retry(5),
        [UNAVAILABLE, "FAILED_PRECONDITION", "OK"],
        Expect("FAILED_PRECONDITION", 2),
    ),
    Case(
        "any status may be listed",
        A6 + "Retryable Status Codes",
        retry(5, codes=["INVALID_ARGUMENT", "UNKNOWN", "DATA_LOSS", "UNAUTHENTICATED"]),
        ["INVALID_ARGUMENT", "UNKNOWN", "DATA_LOSS", "UNAUTHENTICATED", "OK"],
        Expect("OK", 5),
    ),
    Case(
        "a server's own DEADLINE_EXCEEDED is retried where it is listed",
        A6 + "Retryable Status Codes",
        retry(codes=["DEADLINE_EXCEEDED"]),
        ["DEADLINE_EXCEEDED", "OK"],
        Expect("OK", 2),
    ),
    Case(
        "a server's own CANCELLED is retried where it is listed",
        A6 + "Retryable Status Codes",
        retry(codes=["CANCELLED"]),
        ["CANCELLED", "OK"],
        Expect("OK", 2),
    ),
    Case(
        "without a policy nothing is retried",
        A6 + "Retry Policy",
        config(),
        [UNAVAILABLE, "OK"],
        Expect(UNAVAILABLE, 1),
    ),
    Case(
        "a policy for another method is not this one's",
        "gRPC service config, MethodConfig.Name",
        {**config(), "methodConfig": [{"name": [{"service": "test.Other"}], "retryPolicy": policy()}]},
        [UNAVAILABLE, "OK"],
        Expect(UNAVAILABLE, 1),
    ),
    Case(
        "a policy for the method by its name holds, not the one for all",
        "gRPC service config, MethodConfig.Name",
        {
            **config(),
            "methodConfig": [
                {"name": [{"service": "test.Conformance", "method": "unary_unary"}], "retryPolicy": policy(2)},
                {"name": [{}], "retryPolicy": policy(5)},
            ],
        },
        [UNAVAILABLE],
        Expect(UNAVAILABLE, 2),
    ),
    Case(
        "a retry goes to another server",
        "Envoy, previous_hosts",
        retry(5),
        [UNAVAILABLE, "OK"],
        Expect("OK", 2, elsewhere=True),
    ),
    Case(
        "backoff comes before each retry",
        A6 + "Exponential Backoff",
        retry(backoff="0.05s", most="0.05s"),
        [UNAVAILABLE, UNAVAILABLE, "OK"],
        Expect("OK", 3, gaps=[0.04, 0.04]),
    ),
    Case(
        "backoff grows by its multiplier",
        A6 + "Exponential Backoff",
        retry(backoff="0.01s", most="1s", multiplier=8),
        [UNAVAILABLE, UNAVAILABLE, "OK"],
        Expect("OK", 3, gaps=[0.008, 0.064]),
    ),
    Case(
        "backoff grows no further than its maximum",
        A6 + "Exponential Backoff",
        retry(4, backoff="0.01s", most="0.02s", multiplier=10000),
        [UNAVAILABLE, UNAVAILABLE, UNAVAILABLE, "OK"],
        Expect("OK", 4),
    ),
    Case(
        "an answer with trailers and a failure that is not retried keeps both for the caller",
        A6 + "Retry Policy",
        retry(),
        [fails(code="NOT_FOUND", trailers=(("x-why", "gone"),))],
        Expect("NOT_FOUND", 1),
    ),
]

PUSHBACK = [
    Case(
        "pushback is waited out exactly, instead of a longer backoff",
        A6 + "Pushback",
        retry(backoff="30s", most="30s"),
        [fails("60"), "OK"],
        Expect("OK", 2, gaps=[0.06]),
    ),
    Case(
        "pushback is waited out exactly, instead of a shorter backoff",
        A6 + "Pushback",
        retry(),
        [fails("80"), fails("50"), "OK"],
        Expect("OK", 3, gaps=[0.08, 0.05]),
    ),
    Case(
        "a pushback of 0 retries at once",
        A6 + "Pushback",
        retry(backoff="30s", most="30s"),
        [fails("0"), "OK"],
        Expect("OK", 2),
        core=Expect("DEADLINE_EXCEEDED", 1),
        core_timeout=0.2,
        why="core takes 0 for no pushback, and backs off",
    ),
    Case(
        "a negative pushback stops retries",
        A6 + "Pushback",
        retry(),
        [fails("-1"), "OK"],
        Expect(UNAVAILABLE, 1),
    ),
    Case(
        "a pushback that is no number stops retries",
        A6 + "Pushback",
        retry(),
        [fails("soon"), "OK"],
        Expect(UNAVAILABLE, 1),
    ),
    Case(
        "an empty pushback stops retries",
        A6 + "Pushback",
        retry(),
        [fails(""), "OK"],
        Expect(UNAVAILABLE, 1),
    ),
    Case(
        "a negative pushback on the second attempt stops there",
        A6 + "Pushback",
        retry(5),
        [UNAVAILABLE, fails("-1"), "OK"],
        Expect(UNAVAILABLE, 2),
    ),
    Case(
        "pushback allows no attempt beyond maxAttempts",
        A6 + "Pushback",
        retry(2),
        [fails("10")],
        Expect(UNAVAILABLE, 2),
    ),
    Case(
        "pushback makes no status retryable",
        A6 + "Pushback",
        retry(),
        [fails("10", code="INTERNAL"), "OK"],
        Expect("INTERNAL", 1),
    ),
    Case(
        "after a pushback backoff begins anew",
        A6 + "Pushback",
        retry(5, backoff="0.01s", most="60s", multiplier=6000),
        [UNAVAILABLE, fails("20"), UNAVAILABLE, "OK"],
        Expect("OK", 4, gaps=[0.008, 0.02, 0.008]),
    ),
]

THROTTLING = [
    Case(
        "throttling stops retries at half of the tokens, for all calls of the channel",
        A6 + "Throttling Retry Attempts and Hedged RPCs",
        retry(5, further={"retryThrottling": {"maxTokens": 4, "tokenRatio": 0.1}}),
        [UNAVAILABLE],
        Expect(UNAVAILABLE, 2),
        then=[([UNAVAILABLE], Expect(UNAVAILABLE, 1)), ([UNAVAILABLE, "OK"], Expect(UNAVAILABLE, 1))],
    ),
    Case(
        "successes give tokens back, and retries with them",
        A6 + "Throttling Retry Attempts and Hedged RPCs",
        retry(2, further={"retryThrottling": {"maxTokens": 4, "tokenRatio": 1}}),
        [UNAVAILABLE],
        Expect(UNAVAILABLE, 2),
        then=[(["OK"], Expect("OK", 1)), (["OK"], Expect("OK", 1)), ([UNAVAILABLE, "OK"], Expect("OK", 2))],
        core_then=[Expect("OK", 1), Expect("OK", 1), Expect(UNAVAILABLE, 1)],
        why="core doesn't count the successes of calls that it has committed, which are nearly all",
    ),
    Case(
        "a status that isn't retryable takes no token",
        A6 + "Throttling Retry Attempts and Hedged RPCs",
        retry(2, further={"retryThrottling": {"maxTokens": 4, "tokenRatio": 0.1}}),
        ["NOT_FOUND"],
        Expect("NOT_FOUND", 1),
        then=[
            (["NOT_FOUND"], Expect("NOT_FOUND", 1)),
            (["NOT_FOUND"], Expect("NOT_FOUND", 1)),
            ([UNAVAILABLE, "OK"], Expect("OK", 2)),
        ],
    ),
    Case(
        "a pushback that forbids to retry takes a token, whatever the status",
        A6 + "Pushback",
        retry(2, further={"retryThrottling": {"maxTokens": 4, "tokenRatio": 0.1}}),
        [fails("-1", code="INTERNAL")],
        Expect("INTERNAL", 1),
        then=[([UNAVAILABLE, "OK"], Expect(UNAVAILABLE, 1))],
        core_then=[Expect("OK", 2)],
        why="core reads the pushback of retryable statuses alone",
    ),
    Case(
        "throttled calls are still made once",
        A6 + "Throttling Retry Attempts and Hedged RPCs",
        retry(2, further={"retryThrottling": {"maxTokens": 1, "tokenRatio": 0.1}}),
        [UNAVAILABLE],
        Expect(UNAVAILABLE, 1),
        then=[(["OK"], Expect("OK", 1))],
    ),
    Case(
        "without a budget for retries none is made",
        "Finagle, RetryBudget",
        retry(further={"retryBudget": {"ratio": 0, "minPerSecond": 0}}),
        [UNAVAILABLE, "OK"],
        Expect(UNAVAILABLE, 1),
        core=Expect("OK", 2),
        why=NO_BUDGET,
    ),
    Case(
        "all calls of a channel share one budget",
        "Finagle, RetryBudget",
        retry(further={"retryBudget": {"ratio": 0, "minPerSecond": 0.1}}),
        [UNAVAILABLE],
        Expect(UNAVAILABLE, 2),
        then=[([UNAVAILABLE, "OK"], Expect(UNAVAILABLE, 1))],
        core=Expect(UNAVAILABLE, 3),
        core_then=[Expect("OK", 2)],
        why=NO_BUDGET,
    ),
]

COMMIT = [
    Case(
        "a unary call whose headers came is not retried",
        A6 + "When Retries are Valid",
        retry(),
        [fails(initial=(("x-here", "1"),)), "OK"],
        Expect(UNAVAILABLE, 1),
    ),
    Case(
        "a unary call whose headers are empty is not seen to be answered",
        A6 + "When Retries are Valid; grpcio shows empty headers and none alike",
        retry(),
        [fails(initial=()), "OK"],
        Expect("OK", 2),
        core=Expect(UNAVAILABLE, 1),
        why="core sees the frame itself, Python only what is in it",
    ),
    Case(
        "a server stream that fails before its first message is retried",
        A6 + "When Retries are Valid",
        retry(),
        [UNAVAILABLE, Do(messages=3)],
        Expect("OK", 2, messages=3),
        kind="unary_stream",
    ),
    Case(
        "a server stream that failed after a message is not retried",
        A6 + "When Retries are Valid",
        retry(),
        [fails(messages=1), "OK"],
        Expect(UNAVAILABLE, 1, messages=1),
        kind="unary_stream",
    ),
    Case(
        "a server stream whose headers came is not retried",
        A6 + "When Retries are Valid",
        retry(),
        [fails(initial=(("x-here", "1"),), delay=HEARD), "OK"],
        Expect(UNAVAILABLE, 1, messages=0),
        kind="unary_stream",
    ),
    Case(
        "a server stream whose headers came stays with its attempt",
        A6 + "When Retries are Valid",
        retry(),
        [UNAVAILABLE, Do(initial=(("x-here", "1"),), messages=2)],
        Expect("OK", 2, messages=2),
        kind="unary_stream",
    ),
    Case(
        "a server stream without messages is retried like any",
        A6 + "When Retries are Valid",
        retry(),
        [UNAVAILABLE, Do(messages=0)],
        Expect("OK", 2, messages=0),
        kind="unary_stream",
    ),
    Case(
        "a bidirectional stream that failed after a message is not retried",
        A6 + "When Retries are Valid",
        retry(),
        [fails(messages=1), "OK"],
        Expect(UNAVAILABLE, 1, messages=1),
        kind="stream_stream",
        requests=3,
    ),
    Case(
        "a client stream whose headers came is not retried",
        A6 + "When Retries are Valid",
        retry(),
        [fails(initial=(("x-here", "1"),), delay=HEARD), "OK"],
        Expect(UNAVAILABLE, 1),
        kind="stream_unary",
        requests=3,
    ),
    Case(
        "a server stream obeys pushback",
        A6 + "Pushback",
        retry(backoff="30s", most="30s"),
        [fails("60"), "OK"],
        Expect("OK", 2, gaps=[0.06], messages=1),
        kind="unary_stream",
    ),
    Case(
        "a server stream that is told not to retry isn't",
        A6 + "Pushback",
        retry(),
        [fails("-1"), "OK"],
        Expect(UNAVAILABLE, 1),
        kind="unary_stream",
    ),
]

BUFFERING = [
    Case(
        "a request of 200 KiB is kept, and sent again",
        A6 + "Memory Management (Buffering)",
        retry(),
        [UNAVAILABLE, "OK"],
        Expect("OK", 2),
        size=200 * KIB,
    ),
    Case(
        "a request of 300 KiB is more than is kept, so the call isn't retried",
        A6 + "Memory Management (Buffering)",
        retry(),
        [UNAVAILABLE, "OK"],
        Expect(UNAVAILABLE, 1),
        size=300 * KIB,
    ),
    Case(
        "a request of 300 KiB to a server stream isn't retried",
        A6 + "Memory Management (Buffering)",
        retry(),
        [UNAVAILABLE, "OK"],
        Expect(UNAVAILABLE, 1),
        size=300 * KIB,
        kind="unary_stream",
    ),
    Case(
        "a client stream is replayed from its first message",
        A6 + "Memory Management (Buffering)",
        retry(),
        [UNAVAILABLE, UNAVAILABLE, "OK"],
        Expect("OK", 3, requests=[5, 5, 5]),
        kind="stream_unary",
        requests=5,
    ),
    Case(
        "a client stream that failed half-way is replayed from its first message",
        A6 + "Memory Management (Buffering)",
        retry(),
        [fails(reads=2, delay=BRIEF), "OK"],
        Expect("OK", 2, requests=[2, 5]),
        kind="stream_unary",
        requests=5,
    ),
    Case(
        "a client stream that failed before it was read is replayed",
        A6 + "Memory Management (Buffering)",
        retry(),
        [fails(reads=0, delay=BRIEF), "OK"],
        Expect("OK", 2, requests=[0, 5]),
        kind="stream_unary",
        requests=5,
    ),
    Case(
        "a bidirectional stream is replayed from its first message",
        A6 + "Memory Management (Buffering)",
        retry(),
        [UNAVAILABLE, Do(messages=2)],
        Expect("OK", 2, requests=[5, 5], messages=2),
        kind="stream_stream",
        requests=5,
    ),
    Case(
        "a bidirectional stream that failed half-way is replayed from its first message",
        A6 + "Memory Management (Buffering)",
        retry(),
        [fails(reads=1, delay=BRIEF), Do(messages=2)],
        Expect("OK", 2, requests=[1, 3], messages=2),
        kind="stream_stream",
        requests=3,
    ),
    Case(
        "a stream without requests is retried",
        A6 + "Memory Management (Buffering)",
        retry(),
        [UNAVAILABLE, "OK"],
        Expect("OK", 2, requests=[0, 0]),
        kind="stream_unary",
        requests=0,
    ),
    Case(
        "a client stream of 200 KiB in all is replayed",
        A6 + "Memory Management (Buffering)",
        retry(),
        [UNAVAILABLE, "OK"],
        Expect("OK", 2, requests=[20, 20]),
        kind="stream_unary",
        requests=20,
        size=10 * KIB,
    ),
    Case(
        "a client stream of more than 256 KiB in all isn't retried",
        A6 + "Memory Management (Buffering)",
        retry(),
        [UNAVAILABLE, "OK"],
        Expect(UNAVAILABLE, 1, requests=[30]),
        kind="stream_unary",
        requests=30,
        size=10 * KIB,
    ),
    Case(
        "a bidirectional stream of more than 256 KiB in all isn't retried",
        A6 + "Memory Management (Buffering)",
        retry(),
        [UNAVAILABLE, "OK"],
        Expect(UNAVAILABLE, 1, requests=[30]),
        kind="stream_stream",
        requests=30,
        size=10 * KIB,
    ),
]

DEADLINES = [
    Case(
        "one deadline holds over all attempts",
        "docs/correctness.md, D1; gRFC A6, Retry Policy",
        retry(),
        [UNAVAILABLE, HANGS],
        Expect("DEADLINE_EXCEEDED", 2),
        timeout=0.25,
    ),
    Case(
        "each attempt is told what is left of the deadline",
        "docs/correctness.md, D1",
        retry(),
        [fails("50"), fails("50"), "OK"],
        Expect("OK", 3, gaps=[0.05, 0.05], shrinks=0.03),  # HTTP/2 carries it in steps of 10 ms
        timeout=2.0,
    ),
    Case(
        "the call's own deadline is not retried, though its status is listed",
        "docs/correctness.md, D1",
        retry(codes=["DEADLINE_EXCEEDED"]),
        [HANGS],
        Expect("DEADLINE_EXCEEDED", 1),
        timeout=0.15,
    ),
    Case(
        "a backoff that ends after the deadline is not waited for",
        "linkerd#2369",
        retry(backoff="30s", most="30s"),
        [UNAVAILABLE, "OK"],
        Expect(UNAVAILABLE, 1),
        timeout=0.2,
        core=Expect("DEADLINE_EXCEEDED", 1),
        why=SLEEPS,
    ),
    Case(
        "a pushback that ends after the deadline is not waited for",
        "linkerd#2369",
        retry(),
        [fails("30000"), "OK"],
        Expect(UNAVAILABLE, 1),
        timeout=0.2,
        core=Expect("DEADLINE_EXCEEDED", 1),
        why=SLEEPS,
    ),
    Case(
        "a call that has expired is never sent",
        "docs/correctness.md, D1",
        retry(),
        ["OK"],
        Expect("DEADLINE_EXCEEDED", 0),
        timeout=-1.0,
    ),
    Case(
        "the config's timeout caps the call's",
        "gRPC service config, MethodConfig.timeout",
        retry(method={"timeout": "0.15s"}),
        [HANGS],
        Expect("DEADLINE_EXCEEDED", 1),
        mesh_only=True,
        why="core ends some calls with a timeout of its config's before they are sent",
    ),
    Case(
        "a config's timeout of 0 is none",
        "gRPC core, client_channel",
        config({"timeout": "0s"}),
        [LATE],
        Expect("OK", 1),
    ),
    Case(
        "an attempt that its own timeout ended is followed by another",
        "Envoy, per_try_timeout",
        retry(method={"attemptTimeout": "0.05s"}),
        [LATE, "OK"],
        Expect("OK", 2, cancelled=1),
        core=Expect("OK", 1, cancelled=0),
        why=NO_ATTEMPT_TIMEOUT,
    ),
    Case(
        "an attempt without a response for perAttemptRecvTimeout is followed by another",
        "gRPC core, retry_service_config",
        RECEIVES_SOON,
        [LATE, "OK"],
        Expect("OK", 2, cancelled=1),
        core=Expect("OK", 1, cancelled=0),
        why="core ignores perAttemptRecvTimeout unless its experiment is on",
    ),
    Case(
        "of attemptTimeout and perAttemptRecvTimeout the shorter holds",
        "gRPC core, retry_service_config; Envoy, per_try_timeout",
        config({"retryPolicy": {**policy(), "perAttemptRecvTimeout": "0.05s"}, "attemptTimeout": "5s"}),
        [LATE, "OK"],
        Expect("OK", 2, cancelled=1),
        core=Expect("OK", 1, cancelled=0),
        why="core ignores perAttemptRecvTimeout unless its experiment is on",
    ),
    Case(
        "a stream that doesn't begin within perAttemptRecvTimeout is followed by another attempt",
        "gRPC core, retry_service_config",
        RECEIVES_SOON,
        [HANGS, Do(messages=3)],
        Expect("OK", 2, messages=3, cancelled=1),
        kind="unary_stream",
        mesh_only=True,
        why="core ignores perAttemptRecvTimeout unless its experiment is on",
    ),
    Case(
        "a stream in both directions that doesn't begin within perAttemptRecvTimeout is sent again whole",
        "gRPC core, retry_service_config",
        RECEIVES_SOON,
        [HANGS, Do(messages=3)],
        Expect("OK", 2, requests=[5, 5], messages=3, cancelled=1),
        kind="stream_stream",
        requests=5,
        mesh_only=True,
        why="core ignores perAttemptRecvTimeout unless its experiment is on",
    ),
    Case(
        "of streams that don't begin within perAttemptRecvTimeout the last one's end is the call's",
        "gRPC core, retry_service_config",
        RECEIVES_SOON,
        [HANGS],
        Expect("DEADLINE_EXCEEDED", 3, cancelled=3),
        kind="unary_stream",
        mesh_only=True,
        why="core ignores perAttemptRecvTimeout unless its experiment is on",
    ),
    Case(
        "a stream that has begun to answer is not cut by perAttemptRecvTimeout",
        "gRPC core, retry_service_config",
        config({"retryPolicy": {**policy(), "perAttemptRecvTimeout": "0.1s"}}),
        [Do(initial=(("x-here", "1"),), delay=2 * SLOW)],
        Expect("OK", 1, messages=1),
        kind="unary_stream",
    ),
    Case(
        "an attempt's timeout leaves a call without retries DEADLINE_EXCEEDED",
        "Envoy, per_try_timeout",
        config({"attemptTimeout": "0.05s"}),
        [LATE],
        Expect("DEADLINE_EXCEEDED", 1),
        core=Expect("OK", 1),
        why=NO_ATTEMPT_TIMEOUT,
    ),
    Case(
        "a call that brings no timeout has the default",
        "Linkerd and Envoy, timeouts of routes",
        config({"defaultTimeout": "0.1s"}),
        [LATE],
        Expect("DEADLINE_EXCEEDED", 1),
        timeout=None,
        core=Expect("OK", 1),
        why="core doesn't know the key",
    ),
    Case(
        "a server stream's retries share its deadline",
        "docs/correctness.md, D1",
        retry(),
        [UNAVAILABLE, HANGS],
        Expect("DEADLINE_EXCEEDED", 2, messages=0),
        kind="unary_stream",
        timeout=0.25,
    ),
]

TRANSPARENT = [
    Case(
        "an address that nobody listens at costs no attempt",
        A6 + "Transparent Retries",
        config(),
        ["OK"],
        Expect("OK", 1, previous=[None]),
        dead=2,
    ),
    Case(
        "attempts that never left aren't told to the server",
        A6 + "Transparent Retries",
        retry(2),
        [UNAVAILABLE, "OK"],
        Expect("OK", 2, previous=[None, "1"]),
        dead=2,
    ),
    Case(
        "attempts that never left take nothing from the budget",
        A6 + "Transparent Retries",
        config(retryBudget={"ratio": 0, "minPerSecond": 0}),
        ["OK"],
        Expect("OK", 1),
        dead=2,
        kind="unary_stream",
    ),
]

HEDGING = [
    Case(
        "a second attempt is sent beside one that is slow, and the first answer wins",
        A6 + "Hedging Policy",
        hedge(2),
        [LATE, "OK"],
        Expect("OK", 2, previous=[None, "1"], cancelled=1),
        core=Expect("OK", 1, cancelled=0),
    ),
    Case(
        "hedges are told how many attempts came before",
        A6 + "Exposed Retry Metadata",
        hedge(3),
        [LATE, LATE, "OK"],
        Expect("OK", 3, previous=[None, "1", "2"], cancelled=2),
        core=Expect("OK", 1, cancelled=0),
    ),
    Case(
        "a call that answers before the hedging delay is one attempt",
        A6 + "Hedging Policy",
        hedge(3, delay="10s"),
        ["OK"],
        Expect("OK", 1),
    ),
    Case(
        "hedges follow one another while none is answered",
        A6 + "Hedging Policy",
        hedge(3, delay="0.04s"),
        [LATE, LATE, "OK"],
        Expect("OK", 3),
        core=Expect("OK", 1),
    ),
    Case(
        "with a delay of 0 all attempts are sent at once",
        A6 + "Hedging Policy",
        hedge(4, delay="0s"),
        [LATE],
        Expect("OK", 4),
        core=Expect("OK", 1),
    ),
    Case(
        "more than five hedged attempts are taken as five",
        A6 + "Validation of hedgingPolicy",
        hedge(10),
        [LATE],
        Expect("OK", 5),
        core=Expect("OK", 1),
    ),
    Case(
        "a non-fatal status sends the next hedge at once",
        A6 + "Hedging Policy",
        hedge(3, delay="30s"),
        [UNAVAILABLE, "OK"],
        Expect("OK", 2),
        core=Expect(UNAVAILABLE, 1),
    ),
    Case(
        "when all hedges fail, the caller sees a failure",
        A6 + "Hedging Policy",
        hedge(3, delay="30s"),
        [UNAVAILABLE],
        Expect(UNAVAILABLE, 3),
        core=Expect(UNAVAILABLE, 1),
    ),
    Case(
        "a fatal status ends the call",
        A6 + "Hedging Policy",
        hedge(3, delay="30s"),
        ["INVALID_ARGUMENT", "OK"],
        Expect("INVALID_ARGUMENT", 1),
    ),
    Case(
        "a fatal status cancels the attempts that still run",
        A6 + "Hedging Policy",
        hedge(2),
        [LATE, "PERMISSION_DENIED"],
        Expect("PERMISSION_DENIED", 2, cancelled=1),
        core=Expect("OK", 1),
    ),
    Case(
        "a non-fatal status leaves the attempts that still run",
        A6 + "Hedging Policy",
        hedge(2),
        [LATE, UNAVAILABLE],
        Expect("OK", 2, cancelled=0),
        core=Expect("OK", 1),
    ),
    Case(
        "pushback delays the next hedge",
        A6 + "Pushback",
        hedge(2, delay="30s"),
        [fails("60"), "OK"],
        Expect("OK", 2, gaps=[0.06]),
        core=Expect(UNAVAILABLE, 1),
    ),
    Case(
        "a negative pushback means no more hedges",
        A6 + "Pushback",
        hedge(3, delay="30s"),
        [fails("-1"), "OK"],
        Expect(UNAVAILABLE, 1),
    ),
    Case(
        "a negative pushback leaves the attempts that still run",
        A6 + "Pushback",
        hedge(4, delay="0.1s"),  # long enough for the second attempt to fail before a third one
        [LATE, fails("-1"), "OK"],
        Expect("OK", 2, cancelled=0),
        core=Expect("OK", 1),
    ),
    Case(
        "hedges go to other servers first",
        "Envoy, previous_hosts",
        hedge(2),
        [LATE, "OK"],
        Expect("OK", 2, elsewhere=True),
        core=Expect("OK", 1),
    ),
    Case(
        "throttling stops hedges",
        A6 + "Throttling Retry Attempts and Hedged RPCs",
        hedge(3, delay="30s", further={"retryThrottling": {"maxTokens": 4, "tokenRatio": 0.1}}),
        [UNAVAILABLE],
        Expect(UNAVAILABLE, 2),
        then=[([UNAVAILABLE, "OK"], Expect(UNAVAILABLE, 1))],
        core=Expect(UNAVAILABLE, 1),
    ),
    Case(
        "hedges come out of the budget that retries come out of",
        "Finagle, BackupRequestFilter",
        hedge(3, further={"retryBudget": {"ratio": 0, "minPerSecond": 0}}),
        [LATE],
        Expect("OK", 1),
    ),
    Case(
        "hedges end with the call's deadline",
        "docs/correctness.md, D1",
        hedge(2),
        [HANGS],
        Expect("DEADLINE_EXCEEDED", 2),
        timeout=0.25,
        core=Expect("DEADLINE_EXCEEDED", 1),
    ),
    Case(
        "until a percentile is known the fixed delay holds",
        "Finagle, BackupRequestFilter",
        hedge(2, delayPercentile=95),
        [LATE, "OK"],
        Expect("OK", 2),
        core=Expect("OK", 1),
    ),
    Case(
        "a request of 300 KiB is not hedged",
        A6 + "Memory Management (Buffering)",
        hedge(2),
        [LATE],
        Expect("OK", 1),
        size=300 * KIB,
    ),
    Case(
        "a server stream is hedged until the first answer",
        A6 + "Hedging Policy",
        hedge(2),
        [LATE, Do(messages=3)],
        Expect("OK", 2, messages=3, cancelled=1),
        kind="unary_stream",
        core=Expect("OK", 1, messages=1),
    ),
    Case(
        "a server stream that has begun to answer isn't hedged",
        A6 + "When Retries are Valid",
        hedge(2, delay="0.05s"),
        [Do(initial=(("x-here", "1"),), delay=SLOW)],
        Expect("OK", 1, messages=1),
        kind="unary_stream",
    ),
    Case(
        "a client stream is sent to each hedge whole",
        A6 + "Memory Management (Buffering)",
        hedge(2),
        [LATE, "OK"],
        Expect("OK", 2, requests=[5, 5], cancelled=1),
        kind="stream_unary",
        requests=5,
        core=Expect("OK", 1),
    ),
    Case(
        "a bidirectional stream is sent to each hedge whole",
        A6 + "Memory Management (Buffering)",
        hedge(2),
        [Do(messages=0, delay=SLOW), Do(messages=3)],
        Expect("OK", 2, requests=[5, 5], messages=3, cancelled=1),
        kind="stream_stream",
        requests=5,
        core=Expect("OK", 1, messages=0),
    ),
]

CASES = [
    *RETRIES,
    *PUSHBACK,
    *THROTTLING,
    *COMMIT,
    *BUFFERING,
    *DEADLINES,
    *TRANSPARENT,
    *(replace(case, why=ACCEPTED_SILENTLY) if case.core else case for case in HEDGING),
]
