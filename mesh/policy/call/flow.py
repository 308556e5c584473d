"""The life of one call: every decision about it, in order.

``call_flow`` yields steps and is sent wake-ups (``mesh/model.py``); a driver does the IO. There are drivers for
blocking calls, futures, streams and asyncio (``mesh/channel/driver.py``), and one in virtual time, for tests.

Rule 1: one deadline covers all attempts, backoffs and hedges; nothing waits past it.
Rule 2: an attempt that the driver never started costs nothing: no budget, and none of the policy's attempts. An attempt
that was started counts as sent; A6's transparent retries happen in core (docs/correctness.md, R3).
Rule 3: once the server has begun to respond to an attempt, the call is committed to it (docs/correctness.md, R1).
Rule 4: every in-flight count is released exactly once, also when the driver closes the flow early.
Rule 5: a call that the client itself refuses (``policy/call/overload.py``) has failed: it isn't retried, and no
endpoint's statistics count it.
Rule 6: any wake-up may arrive at any time, also for attempts that have ended; the flow then only decides again.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from math import inf

from mesh.codes import Code
from mesh.config.settings import NEVER_RETRY, MethodPolicy
from mesh.model import Attempt, CallSpec, Cancel, Commit, Ended, Headers, Outcome, Step, Verdict, Wait, Wake
from mesh.policy.call.hedge import Hedges
from mesh.policy.call.retry import Retries
from mesh.policy.cluster.cluster import Cluster
from mesh.policy.cluster.node import Node

Flow = Generator[Step, Wake, Verdict]

ALL_UNREACHABLE_DELAY = 0.01
"""The first delay after every endpoint that the picker has as READY turned out to have no connection. Each delay is
twice as long as the one before. Seconds."""

MAX_UNREACHABLE_DELAYS = 8
"""How often a call waits because no READY endpoint had a connection after all, before it fails."""

SUPERSEDED = Outcome(Code.CANCELLED, "another attempt answered first", cancelled=True)
CANCELLED = Outcome(Code.CANCELLED, "the call was cancelled", cancelled=True)


def call_flow(call: CallSpec, cluster: Cluster, rng: random.Random, now: float) -> Flow:
    """Decide everything about ``call``, from ``now`` until its verdict. Closing the generator abandons the call.

    It alternates between two parts: what to do now, which ends in a step for the driver, and what came of it.
    """
    deadline = call.deadline
    policy = call.policy
    hedges: Hedges | None = None
    if policy.hedge.max_attempts > 1 and call.may_retry:
        hedges = Hedges(policy.hedge, cluster.budget, cluster.throttle, cluster.latencies(call.method))
    retries: Retries | None = None  # made at the first failure
    running: dict[int, Attempt] = {}
    tried: list[Node] = []  # each attempt's node
    sent = 0  # attempts that the server may have seen
    next_attempt_at = now  # inf: none is planned
    budget_taken = True  # for the next attempt; the first needs none
    last: Verdict | None = None  # the latest failure, which is the call's if nothing better comes
    unreachable_delays = 0  # how often all endpoints had been tried, and none had a connection
    committed = False
    to_commit = 0  # the attempt that the next step commits to
    receive_by = inf  # when the running attempt's perAttemptRecvTimeout expires
    timed_out_number = 0  # the attempt that was cancelled because of that
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
                if now >= deadline or not (budget_taken or (hedges and hedges.withdraw(now))):
                    next_attempt_at = inf  # no more attempts; one that is running may still succeed
                    continue
                budget_taken = True
                picker = cluster.picker
                node = picker.pick(call, now, rng, tried)
                if node is not None:
                    number = len(call.attempts) + 1
                    timeout = min(deadline - now, policy.attempt_timeout)
                    next_attempt_at = inf if hedges is None else now + hedges.delay()
                    budget_taken = False
                    receive_by = now + policy.receive_timeout
                    until = min(next_attempt_at, receive_by)
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
                elif running:  # no endpoint can take the hedge
                    next_attempt_at = inf
                    continue
                elif picker.queue or call.wait_for_ready:
                    step = Wait(deadline if deadline < inf else None, picker)
                else:
                    return last or Verdict(Outcome(Code.UNAVAILABLE, cluster.explain_no_endpoint(picker, now)))
            elif to_commit:
                step, to_commit = Commit(to_commit), 0
            elif running and now >= receive_by:
                timed_out_number, receive_by = max(running), inf
                step = Cancel(timed_out_number)
            elif running:
                until = min(next_attempt_at, receive_by)
                step = Wait(until if until < deadline else None)
            elif next_attempt_at < deadline:
                step = Wait(next_attempt_at)
            else:
                return last or expired(call, cluster, now)

            # What came of it.
            wake = yield step
            now = wake.now
            if not isinstance(wake, Ended):
                if (
                    isinstance(wake, Headers)
                    and wake.number in running
                    and not committed
                    and wake.number != timed_out_number
                ):
                    committed, to_commit, next_attempt_at, receive_by = True, wake.number, inf, inf
                    if len(running) > 1:
                        _supersede_others(running, tried, wake.number, now)
                continue
            number, outcome = wake.number, wake.outcome
            ended = running.pop(number, None)
            if ended is None:  # it was superseded, or is reported twice
                continue
            receive_timed_out = number == timed_out_number and outcome.code == Code.CANCELLED
            if receive_timed_out:
                outcome = _receive_timeout(outcome, policy)
            ended.ended = now
            ended.outcome = outcome
            if committed and outcome.code == Code.DEADLINE_EXCEEDED:
                tried[number - 1].ignore(ended.started)  # how long a committed stream lasts is up to the caller
            else:
                tried[number - 1].end(now, ended.started, outcome)
            verdict = Verdict(outcome, ended)
            if outcome.code == 0:
                cluster.throttle.record_success()
                # What counts is the first attempt's time, also when another one won: without the slow ones the learned
                # delay would get ever shorter.
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
                    if _all_tried(cluster, tried):
                        next_attempt_at += ALL_UNREACHABLE_DELAY * 2**unreachable_delays
                        unreachable_delays += 1
                    continue
            last = verdict
            # After an attempt timeout the call still has time for another attempt.
            timed_out = receive_timed_out
            if not timed_out and outcome.code == Code.DEADLINE_EXCEEDED:
                timed_out = now >= ended.started + policy.attempt_timeout
                if timed_out:
                    ended.outcome = outcome = _attempt_timeout(outcome, policy)
                    last = Verdict(outcome, ended)
            if hedges:
                delay = hedges.after(outcome, timed_out=timed_out, final=committed)
            else:
                retries = retries or Retries(policy.retry or NEVER_RETRY, cluster.budget, cluster.throttle)
                final = committed or not call.may_retry
                delay = retries.after(outcome, now, deadline, rng, timed_out=timed_out, final=final)
                budget_taken = True
            if delay is None or (delay == inf and not running):
                return last
            next_attempt_at = now + delay
    except GeneratorExit:
        _abandon(running, tried, CANCELLED, None)  # only the driver knows when
        raise
    finally:
        if running:
            _abandon(running, tried, SUPERSEDED, now)
        admission.outstanding.pop()
        if admission.adaptive:
            admission.call_ended(call, now)


def expired(call: CallSpec, cluster: Cluster, now: float) -> Verdict:
    """The deadline has passed while no attempt was running."""
    picker, waited = cluster.picker, now - call.started
    if picker.unresolved:
        return Verdict(Outcome(Code.UNAVAILABLE, picker.error))
    why = cluster.explain_no_endpoint(picker, now, waited)
    if not why and call.deadline <= call.started:
        why = "the deadline had passed before the call was sent"
    elif not why:
        why = f"{cluster.name}: not sent within {waited:.1f} s; ready endpoints: {len(picker.nodes)}"
    return Verdict(Outcome(Code.DEADLINE_EXCEEDED, why))


# -- what came of it: parts that a call which succeeds at once never needs


def _all_tried(cluster: Cluster, tried: list[Node]) -> bool:
    nodes = cluster.picker.nodes
    return bool(nodes) and all(node in tried for node in nodes)


def _receive_timeout(outcome: Outcome, policy: MethodPolicy) -> Outcome:
    """The outcome of an attempt that was cancelled because no response arrived within ``perAttemptRecvTimeout``."""
    details = f"no response within perAttemptRecvTimeout, {policy.receive_timeout:g} s"
    return Outcome(Code.DEADLINE_EXCEEDED, details, committed=outcome.committed)


def _attempt_timeout(outcome: Outcome, policy: MethodPolicy) -> Outcome:
    """The outcome of an attempt that exceeded its attempt timeout: core's details are only "Deadline Exceeded"."""
    details = f"no response within the attempt timeout of {policy.attempt_timeout:g} s"
    return Outcome(outcome.code, details, committed=outcome.committed, result=outcome.result)


def _supersede_others(running: dict[int, Attempt], tried: list[Node], number: int, now: float) -> None:
    """The call is committed to attempt ``number``: end the others."""
    attempt = running.pop(number)
    _abandon(running, tried, SUPERSEDED, now)
    running[number] = attempt


def _abandon(running: dict[int, Attempt], tried: list[Node], outcome: Outcome, now: float | None) -> None:
    """End what is still running; the driver cancels it."""
    while running:
        number, attempt = running.popitem()
        attempt.ended, attempt.outcome = now, outcome
        node = tried[number - 1]
        if outcome is SUPERSEDED and now is not None:
            node.end_superseded(now, attempt.started)
        else:
            node.ignore(attempt.started)
