"""How busy an endpoint is: its node remembers what is in flight and how slow it has been.

Rule 1: a node's memory is keyed by its address and survives updates of the endpoint set.
Rule 2: in flight is +1 at the pick and -1 exactly once, however the attempt ends.
Rule 3: a failure that speaks of the endpoint counts as slow, so that failing fast doesn't look like answering fast
(envoy#20907, Linkerd's load biaser); one that speaks of the request, a cancel or a local refusal counts as nothing.
"""

from __future__ import annotations

from math import exp

from mesh.model import Code, Endpoint, Lock, Outcome

SLOW_CODES = frozenset(
    {
        Code.UNAVAILABLE,
        Code.DEADLINE_EXCEEDED,
        Code.RESOURCE_EXHAUSTED,
        Code.INTERNAL,
        Code.UNKNOWN,
        Code.DATA_LOSS,
    }
)

# Latencies closer than this are noise to the peak EWMA: a difference of one in flight then decides, and else chance
# does.
NOISE_FACTOR = 2.0
NOISE_FLOOR = 0.005  # seconds


class Node:
    """One endpoint's memory: attempts in flight, and a peak-sensitive average of its latency (Finagle's Peak EWMA).

    A latency above the average replaces it at once; one below pulls it down with a weight of 1 - e^(-dt/decay).
    Unobserved, the average decays towards 0 in the same way, so an endpoint that was slow is tried again in time.
    """

    __slots__ = ("_lock", "cost", "decay", "endpoint", "in_flight", "penalty", "stamp")

    def __init__(self, endpoint: Endpoint, lock: Lock, decay: float = 10.0, penalty: float = 5.0) -> None:
        self.endpoint = endpoint
        self.decay = decay
        self.penalty = penalty
        self.in_flight = 0
        self.cost = 0.0
        self.stamp = 0.0
        self._lock = lock

    def start(self) -> None:
        """An attempt goes out."""
        with self._lock:
            self.in_flight += 1

    def end(self, now: float, seconds: float, outcome: Outcome) -> None:
        """An attempt has ended after ``seconds``."""
        if outcome.code:
            if outcome.never_sent or outcome.cancelled:
                self.ignore()
                return
            if outcome.code in SLOW_CODES and seconds < self.penalty:
                seconds = self.penalty
        with self._lock:
            self.in_flight -= 1
            weight = 1.0
            if now > self.stamp:  # else: threads may come in another order than their instants
                weight = exp((self.stamp - now) / self.decay)
                self.stamp = now
            decayed = self.cost * weight
            self.cost = seconds if seconds > decayed else decayed + (1 - weight) * seconds

    def ignore(self) -> None:
        """An attempt was cancelled or never left: neither success nor failure."""
        with self._lock:
            self.in_flight -= 1

    def __repr__(self) -> str:
        return f"<Node {self.endpoint.address} in_flight={self.in_flight} cost={self.cost * 1000:.1f}ms>"


def busier(a: Node, b: Node) -> bool:
    """Whether ``a`` is busier than ``b`` by peak EWMA: latency × (in flight + 1), latencies alike taken as equal.

    Without the allowance for noise one unlucky answer would starve an endpoint for as long as ``decay``. The older of
    the two averages is decayed to the instant of the younger one, which under load is the present.
    """
    cost_a, cost_b = a.cost, b.cost
    if a.stamp < b.stamp:
        cost_a *= exp((a.stamp - b.stamp) / a.decay)
    else:
        cost_b *= exp((b.stamp - a.stamp) / b.decay)
    cost_a += NOISE_FLOOR
    cost_b += NOISE_FLOOR
    if cost_a > cost_b * NOISE_FACTOR or cost_b > cost_a * NOISE_FACTOR:
        return cost_a * (a.in_flight + 1) > cost_b * (b.in_flight + 1)
    return a.in_flight > b.in_flight
