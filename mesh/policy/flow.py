"""The life of one call: the only sequence of decisions in the system.

``call_flow`` yields steps and is sent wake-ups (``mesh/model.py``); whoever drives it does the IO. Four drivers do:
blocking, futures, asyncio and the simulator.

Rule 1: one deadline holds over all attempts, backoffs and hedges; nothing waits past it.
Rule 2: an attempt that never left costs nothing (A6's transparent retry): neither budget, nor an attempt of the
policy's.
Rule 3: once the server has begun to answer an attempt, that attempt is the call (A6's commit).
Rule 4: what is in flight is given back exactly once, also when the driver closes the flow half-way.
Rule 5: any wake-up may come at any time, also for attempts that are over; the flow then only looks again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator

from mesh.config import NEVER_HEDGE, NEVER_RETRY
from mesh.model import Attempt, CallSpec, Code, Commit, Ended, Headers, Outcome, Step, Verdict, Wait, Wake
from mesh.policy.cluster import Cluster
from mesh.policy.deadline import span
from mesh.policy.hedge import Hedges
from mesh.policy.load import Node
from mesh.policy.pick import Picker
from mesh.policy.retry import Retries

Flow = Generator[Step, Wake, Verdict]


def call_flow(call: CallSpec, cluster: Cluster, rng: random.Random, now: float) -> Flow:
    """Decide everything about ``call``, from ``now`` until its verdict. Closing the generator abandons the call."""
    deadline = call.deadline
    policy = call.policy
    retry, hedge = (policy.retry or NEVER_RETRY, policy.hedge) if call.may_retry else (NEVER_RETRY, NEVER_HEDGE)
    budget, throttle = cluster.budget, cluster.throttle
    hedges = Hedges(hedge, budget, throttle, cluster.latencies(call.method)) if hedge.max_attempts > 1 else None
    retries: Retries | None = None  # made at the first failure
    running: dict[int, tuple[Attempt, Node]] = {}
    tried: list[Node] = []
    sent = 0  # attempts that left, or may have
    due = now  # when the next attempt is to start; math.inf: none is planned
    paid = True  # whether that attempt is paid for; the first is free
    last: Verdict | None = None  # the latest failure, in case nothing better comes
    committing = 0  # the attempt to hand over next
    step: Step
    call.started = now
    budget.call()
    try:
        while True:
            # What to do now.
            if committing:
                step, committing = Commit(committing), 0
            elif due <= now:
                if now >= deadline:
                    return last or _expired(cluster.picker)
                if not paid and not (hedges and hedges.withdraw(now)):
                    due = math.inf
                    continue
                paid = True
                picker = cluster.picker
                node = picker.pick(now, rng, tried)
                if node is not None:
                    number = len(call.attempts) + 1
                    timeout = span(now, min(deadline, now + policy.attempt_timeout))
                    due, paid = now + hedges.delay() if hedges else math.inf, False
                    attempt = Attempt(number, node.endpoint, timeout, call.metadata, _before(due, deadline), sent, now)
                    call.attempts.append(attempt)
                    running[number] = attempt, node
                    tried.append(node)
                    node.start()
                    sent += 1
                    step = attempt
                elif running:  # a hedge that nobody can take
                    due = math.inf
                    continue
                elif picker.queue or call.wait_for_ready:
                    step = Wait(_before(deadline, math.inf), picker)
                else:
                    return last or Verdict(Outcome(Code.UNAVAILABLE, picker.error))
            elif running:
                step = Wait(_before(due, deadline))
            elif due < deadline:
                step = Wait(due)
            else:
                return last or _expired(cluster.picker)

            # What came of it.
            wake = yield step
            now = wake.now
            if isinstance(wake, Ended):
                found = running.pop(wake.number, None)
                if found is None:
                    continue
                attempt, node = found
                outcome = wake.outcome
                seconds = now - attempt.started
                attempt.ended, attempt.outcome = now, outcome
                node.end(now, seconds, outcome)
                if outcome.code == Code.OK:
                    throttle.succeeded()
                    if policy.hedge.percentile:
                        cluster.latencies(call.method).record(seconds)
                    return Verdict(outcome, attempt)
                if outcome.cancelled:
                    return Verdict(outcome, attempt)
                if outcome.never_sent:
                    sent -= 1
                    due, paid = now, True
                    continue
                last = Verdict(outcome, attempt)
                if hedges:
                    delay = hedges.after(outcome)
                else:
                    retries = retries or Retries(retry, budget, throttle)
                    # An attempt that its own timeout ended left the call time for another.
                    timed_out = outcome.code == Code.DEADLINE_EXCEEDED and policy.attempt_timeout <= seconds
                    delay = retries.after(outcome, now, deadline, rng, timed_out=timed_out)
                    paid = True
                if delay is None or (delay == math.inf and not running):
                    return last
                due = now + delay
            elif isinstance(wake, Headers) and wake.number in running:
                for number in [number for number in running if number != wake.number]:
                    _abandon(*running.pop(number), now)
                retry, retries, hedges, due, committing = NEVER_RETRY, None, None, math.inf, wake.number
    finally:
        for attempt, node in running.values():
            _abandon(attempt, node, now)


def _before(instant: float, deadline: float) -> float | None:
    """``instant`` as a step's ``until``: None when the deadline comes first, as that ends the attempts that run."""
    return instant if instant < deadline else None


def _expired(picker: Picker) -> Verdict:
    """The deadline came while nothing was running."""
    if picker.unresolved:
        return Verdict(Outcome(Code.UNAVAILABLE, picker.error))
    return Verdict(Outcome(Code.DEADLINE_EXCEEDED, picker.error or "the deadline had passed before the call was sent"))


def _abandon(attempt: Attempt, node: Node, now: float) -> None:
    """The attempt is no longer wanted; the driver cancels it."""
    node.ignore()
    attempt.ended, attempt.outcome = now, ABANDONED


ABANDONED = Outcome(Code.CANCELLED, "another attempt was the call", cancelled=True)
