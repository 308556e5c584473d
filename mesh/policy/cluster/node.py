"""How busy an endpoint is: its attempts in flight, its latency, its successes and failures.

Rule 1: a node's statistics are keyed by its address and survive updates of the endpoint set (docs/correctness.md, B4).
Rule 2: ``in_flight`` is incremented at the pick and decremented exactly once, however the attempt ends
(docs/correctness.md, B1).
Rule 3: a failure of the endpoint counts as slow, so that failing fast doesn't look like responding fast
(docs/correctness.md, B3). Errors caused by the request, cancellations and local refusals don't count.
Rule 4: loads are compared per unit of weight, so a heavier endpoint may be busier. Between idle endpoints the weight
doesn't matter here: the pickers already sample by weight.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp

from mesh.codes import Code
from mesh.config.settings import OutlierDetectionConfig
from mesh.model import Endpoint, Lock, Outcome
from mesh.policy.cluster.breaker import FAILURE_CODES, Breaker
from mesh.policy.cluster.load_report import LoadReport

SLOW_CODES = FAILURE_CODES | {Code.RESOURCE_EXHAUSTED}

# How much busier than another an endpoint must be before a call leaves the one that the weights chose. Far enough that
# it isn't chance: with n calls in flight in all, an endpoint of share p has n p of them with a standard deviation below
# sqrt(n p), and four times the mean plus 8 is more than 5 standard deviations above it for any n p.
FAR_IN_FLIGHT = 4.0
FAR_SLACK = 8.0
FAR_COST = 10.0
FAR_FLOOR = 0.05  # seconds, added to the other's latency; a failure counts as the penalty, which is far above it

# Closer latencies are noise to the peak EWMA: then the in-flight counts decide, and if they are equal, chance.
NOISE_FACTOR = 2.0
NOISE_FLOOR = 0.005  # seconds


def _no_listener(node: Node) -> None:
    """No listener."""


class Node:
    """One endpoint's statistics: attempts in flight, and a peak-sensitive average of its latency (Finagle's Peak EWMA).

    A latency above the average (``cost``) replaces it at once; one below lowers it with a weight of 1 - e^(-dt/decay).
    Without observations the average decays towards 0 in the same way, so an endpoint that was slow is tried again
    eventually. ``stamp``: when it was last observed. ``weight``: its current share of the load relative to others.
    ``ready_at``: when it last became READY. ``listener`` is called, outside the lock, when the breaker's state may have
    to change.
    """

    __slots__ = (
        "_lock",
        "breaker",
        "cost",
        "decay",
        "endpoint",
        "failures",
        "in_flight",
        "listener",
        "penalty",
        "ready_at",
        "report",
        "ring_hashes",
        "stamp",
        "successes",
        "weight",
    )

    def __init__(
        self,
        endpoint: Endpoint,
        lock: Lock,
        decay: float = 1.0,
        penalty: float = 5.0,
        outlier_detection: OutlierDetectionConfig | None = None,
        listener: Callable[[Node], object] = _no_listener,
    ) -> None:
        self.endpoint = endpoint
        self.decay = decay
        self.penalty = penalty
        self.in_flight = 0
        self.cost = 0.0
        self.stamp = 0.0
        self.weight = 1.0
        self.ready_at = 0.0
        self.successes = 0
        self.failures = 0
        self.breaker = Breaker(outlier_detection or OutlierDetectionConfig())
        self.report = LoadReport()
        self.ring_hashes: list[int] = []
        self.listener = listener
        self._lock = lock

    def start(self) -> None:
        """An attempt starts."""
        with self._lock:
            self.in_flight += 1

    def probe(self, now: float) -> bool:
        """Whether the attempt that starts at ``now`` is the probe of an ejected endpoint."""
        with self._lock:
            return self.breaker.probe(now)

    def end(self, now: float, started: float, outcome: Outcome) -> None:
        """The attempt that started at ``started`` has ended."""
        code = outcome.code
        seconds = now - started
        notify = False
        if code:
            if outcome.never_sent or outcome.cancelled:
                self.ignore(started)
                return
            if code in SLOW_CODES and seconds < self.penalty:
                seconds = self.penalty
        with self._lock:
            self.in_flight -= 1
            weight = 1.0
            if now > self.stamp:  # else: another thread with a later instant was here first
                weight = exp((self.stamp - now) / self.decay)
                self.stamp = now
            decayed = self.cost * weight
            self.cost = seconds if seconds > decayed else decayed + (1 - weight) * seconds
            if code and code in FAILURE_CODES:
                self.failures += 1
                notify = self.breaker.record_failure(started, code)
            else:
                self.successes += 1
                if self.breaker.watches_success:
                    notify = self.breaker.record_success(started)
        if notify:
            self.listener(self)

    def ignore(self, started: float) -> None:
        """An attempt was cancelled or never sent: neither success nor failure."""
        with self._lock:
            self.in_flight -= 1
            notify = self.breaker.watches_success and self.breaker.record_ignored(started)
        if notify:
            self.listener(self)

    def end_superseded(self, now: float, started: float) -> None:
        """Another attempt of the call has won. All that is known of this one's latency is that it is longer than the
        time until now. The average is raised to that, and never lowered; otherwise an endpoint that loses every race
        would look idle forever."""
        with self._lock:
            seconds = now - started
            if seconds > self.cost * exp(min(0.0, self.stamp - now) / self.decay):
                self.cost = seconds
                self.stamp = max(now, self.stamp)
        self.ignore(started)

    def latency(self, now: float) -> float:
        """The average decayed to ``now``, in seconds."""
        return self.cost * exp(min(0.0, self.stamp - now) / self.decay)

    def take_counts(self) -> tuple[int, int]:
        """Successes and failures since the last call, for outlier detection."""
        with self._lock:
            counts = self.successes, self.failures
            self.successes = self.failures = 0
        return counts

    def __repr__(self) -> str:
        ejected = f" {self.breaker.state.value}" if self.breaker.state.value != "closed" else ""
        return f"<Node {self.endpoint.address} in_flight={self.in_flight} cost={self.cost * 1000:.1f}ms{ejected}>"


IsBusier = Callable[[Node, Node], bool]


def busier_by_peak_ewma(a: Node, b: Node) -> bool:
    """Whether ``a`` is busier than ``b`` by peak EWMA: latency × (in flight / weight + 1), with similar latencies taken
    as equal.

    Without the allowance for noise one slow response would starve an endpoint for as long as ``decay``. The older of
    the two averages is decayed to the instant of the newer one, which under load is now.
    """
    cost_a, cost_b = a.cost, b.cost
    if a.stamp < b.stamp:
        cost_a *= exp((a.stamp - b.stamp) / a.decay)
    else:
        cost_b *= exp((b.stamp - a.stamp) / b.decay)
    cost_a += NOISE_FLOOR
    cost_b += NOISE_FLOOR
    weight_a, weight_b = a.weight, b.weight
    if cost_a > cost_b * NOISE_FACTOR or cost_b > cost_a * NOISE_FACTOR:
        return cost_a * (a.in_flight / weight_a + 1) > cost_b * (b.in_flight / weight_b + 1)
    return a.in_flight * weight_b > b.in_flight * weight_a


def busier_by_in_flight(a: Node, b: Node) -> bool:
    """Whether ``a`` has more in flight than ``b``, per unit of weight (A48; Envoy's weighted least request)."""
    return a.in_flight * b.weight > b.in_flight * a.weight


def far_busier_by_in_flight(a: Node, b: Node) -> bool:
    """Whether ``a`` has far more in flight than its weight allows, compared to ``b``."""
    return (a.in_flight - FAR_SLACK) * b.weight > FAR_IN_FLIGHT * (b.in_flight + 1) * a.weight


def far_busier_by_peak_ewma(a: Node, b: Node) -> bool:
    """Whether ``a`` fails, or is so much slower or busier than ``b`` that its weight no longer counts."""
    cost_a, cost_b = _costs(a, b)
    return cost_a > FAR_COST * (cost_b + FAR_FLOOR) or far_busier_by_in_flight(a, b)


def _costs(a: Node, b: Node) -> tuple[float, float]:
    """Both averages at one instant: the older is decayed to the instant of the newer, which under load is now."""
    if a.stamp < b.stamp:
        return a.cost * exp((a.stamp - b.stamp) / a.decay), b.cost
    return a.cost, b.cost * exp((b.stamp - a.stamp) / b.decay)
