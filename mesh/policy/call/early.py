"""Calls made before the service config is known: as in gRPC, they wait for the first resolution, because the config
comes with it and decides their timeout, retries, hedging and wait-for-ready.

They wait until their deadline at most. When the resolver fails, they fail, unless they wait for ready.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from mesh.codes import Code
from mesh.config.settings import HedgingPolicy, MethodPolicy
from mesh.model import CallSpec, Outcome, Verdict, Wait
from mesh.policy.call.flow import Flow, call_flow, expired
from mesh.policy.cluster.cluster import Cluster

PENDING = MethodPolicy(hedge=HedgingPolicy(max_attempts=2))
"""Every method's policy until the first resolution; compared by identity. It hedges, so that a blocking call gets a
driver that can do whatever its real policy requires."""


def _stay_pending(call: EarlyCall) -> None:
    """Default: the policy doesn't become known."""


@dataclass(slots=True)
class EarlyCall(CallSpec):
    """A call whose policy is PENDING. ``apply_policy`` sets its policy, and what follows from it, once it is known."""

    apply_policy: Callable[[EarlyCall], None] = _stay_pending


def early_flow(call: EarlyCall, cluster: Cluster, rng: random.Random, now: float) -> Flow:
    """The flow of a call whose policy isn't known yet."""
    call.started = now
    while True:
        # Before the picker is read: the config comes first, then the endpoints, which replace the picker.
        call.apply_policy(call)
        if call.policy is not PENDING:
            return (yield from call_flow(call, cluster, rng, now))
        picker = cluster.picker
        if now >= call.deadline:
            return expired(call, cluster, now)
        if not (picker.queue or call.wait_for_ready):
            return Verdict(Outcome(Code.UNAVAILABLE, picker.error))
        wake = yield Wait(call.deadline if call.deadline < inf else None, picker)
        now = wake.now
