"""How many attempts there are for each call while everything fails: the budget's promise, in virtual time.

1,000 calls/s, each with 3 attempts allowed, and every attempt fails after 5 ms. With the default budget (10 % of calls
and 10/s) there are at most 1 + 0.1 + 10/1,000 = 1.11 attempts per call, once the reserve of 100 retries is spent:
within 1.15. Over two layers each hop has a budget of its own, so without more it might be 1.11² = 1.24; that a retry's
own calls don't retry, and that who has retried in vain says so, holds it within 1.21.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
from collections.abc import Callable
from math import inf

import pytest

from mesh.codes import Code
from mesh.config.settings import MethodPolicy, RetryPolicy, ServiceConfig
from mesh.model import Attempt, CallSpec, Connectivity, Elapsed, Ended, Endpoint, Outcome, Verdict, Wait, Wake
from mesh.policy.call.flow import call_flow
from mesh.policy.cluster.cluster import Cluster

RATE = 1000  # calls a second
SETTLED = 2.0  # seconds, within which the reserve is spent: 1,000 calls/s want 2,000 retries each second
END = 8.0
LATENCY = 0.005
POLICY = MethodPolicy(retry=RetryPolicy(3))

Answer = Callable[[Outcome], None]
Send = Callable[[Attempt, Answer], None]


class Time:
    """Virtual time: what is to happen, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def run(self) -> None:
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()


class Hop:
    """A client of three replicas, which ``send`` reaches."""

    def __init__(self, time: Time, send: Send) -> None:
        self._time = time
        self._send = send
        self._rng = random.Random(1)
        self._cluster = Cluster("test", ServiceConfig(), self._rng, 0.0, contextlib.nullcontext)
        self._cluster.update(Endpoint(f"replica{index}") for index in range(3))
        self._cluster.update_states([(address, Connectivity.READY) for address in self._cluster.nodes])

    def call(self, done: Callable[[CallSpec, Verdict], None], *, may_retry: bool = True) -> None:
        time = self._time
        call = CallSpec("/test.Test/Do", POLICY, inf, may_retry=may_retry)
        flow = call_flow(call, self._cluster, self._rng, time.now)

        def advance(wake: Wake | None) -> None:
            try:
                step = flow.send(wake)  # type: ignore[arg-type]
            except StopIteration as stop:
                done(call, stop.value)
                return
            if isinstance(step, Attempt):
                number = step.number
                self._send(step, lambda outcome: advance(Ended(time.now, number, outcome)))
            else:
                assert isinstance(step, Wait)
                assert step.until is not None
                time.at(step.until, lambda: advance(Elapsed(time.now)))

        advance(None)


class Leaf:
    """Fails every attempt, and counts those of settled times."""

    def __init__(self, time: Time) -> None:
        self._time = time
        self.attempts = 0

    def send(self, _: Attempt, answer: Answer) -> None:
        if SETTLED <= self._time.now < END:
            self.attempts += 1
        self._time.at(self._time.now + LATENCY, lambda: answer(Outcome(Code.UNAVAILABLE, "always")))


def attempts_per_call(time: Time, leaf: Leaf, hop: Hop) -> float:
    for index in range(int(RATE * END)):
        time.at(index / RATE, lambda: hop.call(lambda call, verdict: None))
    time.run()
    return leaf.attempts / (RATE * (END - SETTLED))


@pytest.mark.slow
def test_attempts_per_call_while_every_replica_fails() -> None:
    time = Time()
    leaf = Leaf(time)
    assert 1.05 < attempts_per_call(time, leaf, Hop(time, leaf.send)) <= 1.15


@pytest.mark.slow
def test_attempts_per_call_over_two_layers() -> None:
    time = Time()
    leaf = Leaf(time)
    below = Hop(time, leaf.send)

    def handle(attempt: Attempt, answer: Answer) -> None:
        """The service between: as the server's half of the mesh has it (chain stop, pushback)."""

        def fail(call: CallSpec, verdict: Verdict) -> None:
            answer(Outcome(verdict.outcome.code, "below", pushback=-1.0 if call.may_retry else None))

        below.call(fail, may_retry=not attempt.previous)

    assert 1.05 < attempts_per_call(time, leaf, Hop(time, handle)) <= 1.21
