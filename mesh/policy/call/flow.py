"""The life of one call: the only sequence of decisions in the system.

``call_flow`` yields steps and is sent wake-ups (``mesh/model.py``); whoever drives it does the IO. There are drivers
for blocking calls, futures, streams and asyncio (``mesh/channel/driver.py``), and one in virtual time, for tests.

Rule 1: one deadline holds over all attempts, backoffs and hedges; nothing waits past it.
Rule 2: an attempt that the driver didn't start costs nothing: neither budget, nor an attempt of the policy's. What was
started counts as sent; A6's transparent retries are core's own (docs/correctness.md, R3).
Rule 3: once the server has begun to answer an attempt, that attempt is the call (docs/correctness.md, R1).
Rule 4: what is in flight is given back exactly once, also when the driver closes the flow half-way.
Rule 5: what the client itself refuses (``policy/call/overload.py``) is final, and reaches no endpoint's memory.
Rule 6: any wake-up may come at any time, also for attempts that are over; the flow then only looks again.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from math import inf

from mesh.codes import Code
from mesh.config.settings import NEVER_RETRY
from mesh.model import Attempt, CallSpec, Cancel, Commit, Ended, Headers, Outcome, Step, Verdict, Wait, Wake
from mesh.policy.call.hedge import Hedges
from mesh.policy.call.retry import Retries
from mesh.policy.cluster.cluster import Cluster
from mesh.policy.cluster.node import Node

Flow = Generator[Step, Wake, Verdict]

ALL_UNREACHABLE_DELAY = 0.01
"""No endpoint could send it, though the picker says that each is READY: the first pause, in seconds. Each is twice as
long as the one before."""

MAX_UNREACHABLE_DELAYS = 8
"""Pauses of a call that no ready endpoint could be sent, before that is a failure like another."""


def call_flow(call: CallSpec, cluster: Cluster, rng: random.Random, now: float) -> Flow:
    """Decide everything about ``call``, from ``now`` until its verdict. Closing the generator abandons the call."""
    deadline = call.deadline
    policy = call.policy
    hedges: Hedges | None = None
    if policy.hedge.max_attempts > 1 and call.may_retry:
        hedges = Hedges(policy.hedge, cluster.budget, cluster.throttle, cluster.latencies(call.method))
    retries: Retries | None = None  # made at the first failure
    running: dict[int, Attempt] = {}
    tried: list[Node] = []  # the node of each attempt
    sent = 0  # attempts that left, or may have
    next_attempt_at = now  # when the next attempt is to start; inf: none is planned
    budget_taken = True  # whether that attempt is budget_taken for; the first is free
    last: Verdict | None = None  # the latest failure, in case nothing better comes
    unreachable_delays = 0  # how often every endpoint had been tried, and none could send it
    committed = False
    committing = 0  # the attempt to hand over next
    answer_by = inf  # when the attempt that runs is to have begun to answer
    cancelled_late = 0  # the attempt that hadn't
    step: Step
    call.started = call.started or now  # it may have waited for its policy before
    admission = cluster.admission
    if len(admission.outstanding) >= admission.unchecked_below:
        refused = admission.refusal_of(call, now, rng)
        if refused is not None:
            return Verdict(refused)
    admission.outstanding.append(None)
    cluster.budget.call()
    try:
        while True:
            # What to do now.
            if next_attempt_at <= now:
                if now >= deadline:
                    if running:  # woken late: the attempts end by their own timeouts, and one may have succeeded
                        next_attempt_at = inf
                        continue
                    return last or expired(call, cluster, now)
                if not (budget_taken or (hedges and hedges.withdraw(now))):
                    next_attempt_at = inf
                    continue
                budget_taken = True
                picker = cluster.picker
                node = picker.pick(call, now, rng, tried)
                if node is not None:
                    number = len(call.attempts) + 1
                    left = deadline - now
                    timeout = min(left, policy.attempt_timeout)
                    next_attempt_at = inf if hedges is None else now + hedges.delay()
                    budget_taken = False
                    answer_by = now + policy.receive_timeout
                    until = min(next_attempt_at, answer_by)
                    attempt = Attempt(
                        number,
                        node.endpoint,
                        None if timeout == inf else timeout,
                        call.metadata,
                        until if until < deadline else None,
                        sent,
                        now,
                    )
                    if picker.note:
                        attempt.note = picker.note
                    call.attempts.append(attempt)
                    tried.append(node)
                    running[number] = attempt
                    node.start()
                    sent += 1
                    step = attempt
                elif running:  # a hedge that nobody can take
                    next_attempt_at = inf
                    continue
                elif picker.queue or call.wait_for_ready:
                    step = Wait(deadline if deadline < inf else None, picker)
                else:
                    return last or Verdict(Outcome(Code.UNAVAILABLE, cluster.explain_no_endpoint(picker, now)))
            elif committing:
                step, committing = Commit(committing), 0
            elif running and now >= answer_by:
                cancelled_late, answer_by = max(running), inf
                step = Cancel(cancelled_late)
            elif running:
                until = min(next_attempt_at, answer_by)
                step = Wait(until if until < deadline else None)
            elif next_attempt_at < deadline:
                step = Wait(next_attempt_at)
            else:
                return last or expired(call, cluster, now)

            # What came of it.
            wake = yield step
            now = wake.now
            if isinstance(wake, Ended):
                number, outcome = wake.number, wake.outcome
                if number not in running:
                    continue
                attempt = running.pop(number)
                receive_timed_out = number == cancelled_late and outcome.code == Code.CANCELLED
                if receive_timed_out:
                    details = f"no response within perAttemptRecvTimeout, {policy.receive_timeout:g} s"
                    outcome = Outcome(Code.DEADLINE_EXCEEDED, details, committed=outcome.committed)
                attempt.ended = now
                attempt.outcome = outcome
                if committed and outcome.code == Code.DEADLINE_EXCEEDED:
                    tried[number - 1].ignore(attempt.started)  # a stream under way: how long it lasts is the caller's
                else:
                    tried[number - 1].end(now, attempt.started, outcome)
                verdict = Verdict(outcome, attempt)
                if outcome.code == 0:
                    cluster.throttle.record_success()
                    # The first attempt's time is the method's, also when another won by then: leaving out what was
                    # too slow would teach ever shorter delays.
                    if policy.hedge.percentile and (number == 1 or 1 in running):
                        cluster.latencies(call.method).record(now - call.attempts[0].started)
                    return verdict
                if outcome.cancelled:
                    _abandon(running, tried, CANCELLED, now)
                    return verdict
                if outcome.never_sent:
                    sent -= 1
                    if unreachable_delays < MAX_UNREACHABLE_DELAYS and not committed:
                        next_attempt_at, budget_taken = now, True
                        nodes = cluster.picker.nodes
                        if nodes and all(node in tried for node in nodes):
                            next_attempt_at += ALL_UNREACHABLE_DELAY * 2**unreachable_delays
                            unreachable_delays += 1
                        continue
                last = verdict
                # An attempt that its own timeout ended left the call time for another.
                timed_out = outcome.code == Code.DEADLINE_EXCEEDED and now >= attempt.started + policy.attempt_timeout
                if receive_timed_out:
                    timed_out = True
                elif timed_out:  # core says no more than "Deadline Exceeded"
                    details = f"no answer within the attempt timeout of {policy.attempt_timeout:g} s"
                    attempt.outcome = outcome = Outcome(
                        outcome.code, details, committed=outcome.committed, result=outcome.result
                    )
                    last = Verdict(outcome, attempt)
                if hedges:
                    delay = hedges.after(outcome, timed_out=timed_out, final=committed)
                else:
                    if retries is None:
                        retries = Retries(policy.retry or NEVER_RETRY, cluster.budget, cluster.throttle)
                    final = committed or not call.may_retry
                    delay = retries.after(outcome, now, deadline, rng, timed_out=timed_out, final=final)
                    budget_taken = True
                if delay is None or (delay == inf and not running):
                    return last
                next_attempt_at = now + delay
            elif (
                isinstance(wake, Headers) and wake.number in running and not committed and wake.number != cancelled_late
            ):
                committed, committing, next_attempt_at, answer_by = True, wake.number, inf, inf
                attempt = running.pop(committing)
                _abandon(running, tried, SUPERSEDED, now)
                running[committing] = attempt
    except GeneratorExit:
        _abandon(running, tried, CANCELLED, None)  # when, only the driver knows
        raise
    finally:
        if running:
            _abandon(running, tried, SUPERSEDED, now)
        admission.outstanding.pop()
        if admission.adaptive:
            admission.call_ended(call, now)


def expired(call: CallSpec, cluster: Cluster, now: float) -> Verdict:
    """The deadline came while nothing was running."""
    picker, waited = cluster.picker, now - call.started
    if picker.unresolved:
        return Verdict(Outcome(Code.UNAVAILABLE, picker.error))
    why = cluster.explain_no_endpoint(picker, now, waited)
    if not why and call.deadline <= call.started:
        why = "the deadline had passed before the call was sent"
    elif not why:
        why = f"{cluster.name}: not sent within {waited:.1f} s; ready endpoints: {len(picker.nodes)}"
    return Verdict(Outcome(Code.DEADLINE_EXCEEDED, why))


def _abandon(running: dict[int, Attempt], tried: list[Node], outcome: Outcome, now: float | None) -> None:
    """What runs is no longer wanted; the driver cancels it."""
    while running:
        number, attempt = running.popitem()
        attempt.ended, attempt.outcome = now, outcome
        node = tried[number - 1]
        if outcome is SUPERSEDED and now is not None:
            node.end_superseded(now, attempt.started)
        else:
            node.ignore(attempt.started)


SUPERSEDED = Outcome(Code.CANCELLED, "another attempt answered first", cancelled=True)
CANCELLED = Outcome(Code.CANCELLED, "the call was cancelled", cancelled=True)
