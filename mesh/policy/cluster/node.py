"""How busy an endpoint is: its node remembers what is in flight, how slow it has been, and how it has answered.

Rule 1: a node's memory is keyed by its address and survives updates of the endpoint set (docs/correctness.md, B4).
Rule 2: in flight is +1 at the pick and -1 exactly once, however the attempt ends (docs/correctness.md, B1).
Rule 3: a failure that speaks of the endpoint counts as slow, so that failing fast doesn't look like answering fast
(docs/correctness.md, B3); one that speaks of the request, a cancel or a local refusal counts as nothing.
Rule 4: loads are compared for each unit of weight, so a heavier endpoint may be busier. Between idle endpoints weight
decides nothing: a picker draws them by their weights already.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp

from mesh.codes import Code
from mesh.config.settings import EjectionConfig
from mesh.model import Endpoint, Lock, Outcome
from mesh.policy.cluster.breaker import FAILURE_CODES, Breaker
from mesh.policy.cluster.load_report import Report

SLOW_CODES = FAILURE_CODES | {Code.RESOURCE_EXHAUSTED}

# How much worse than another an endpoint must be before a call leaves the one that the weights give it to. Far enough
# that chance does not decide it: with n calls in flight in all, an endpoint of share p has n p of them and a standard
# deviation below sqrt(n p), and four times an endpoint's mean and 8 more is above 5 of them for any n p.
FAR_IN_FLIGHT = 4.0
FAR_SLACK = 8.0
FAR_COST = 10.0
FAR_FLOOR = 0.05  # seconds, added to both latencies; a failure counts as the penalty, which is far above

# Latencies closer than this are noise to the peak EWMA: a difference of one in flight then decides, and else chance
# does.
NOISE_FACTOR = 2.0
NOISE_FLOOR = 0.005  # seconds


def _nobody(node: Node) -> None:
    """Nobody listens."""


class Node:
    """One endpoint's memory: attempts in flight, and a peak-sensitive average of its latency (Finagle's Peak EWMA).

    A latency above the average replaces it at once; one below pulls it down with a weight of 1 - e^(-dt/decay).
    Unobserved, the average decays towards 0 in the same way, so an endpoint that was slow is tried again in time.
    ``weight`` is its share of the load against others, as the cluster last weighed it. ``ready_at``: when it was last
    found READY. ``listener`` is told, outside the lock, when the breaker has something for the cluster.
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
        "ring",
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
        ejection: EjectionConfig | None = None,
        listener: Callable[[Node], object] = _nobody,
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
        self.breaker = Breaker(ejection or EjectionConfig())
        self.report = Report()
        self.ring: list[int] = []
        self.listener = listener
        self._lock = lock

    def start(self) -> None:
        """An attempt goes out."""
        with self._lock:
            self.in_flight += 1

    def probe(self, now: float) -> bool:
        """Whether the attempt that starts at ``now`` may go here as the one that shows what the endpoint is worth."""
        with self._lock:
            return self.breaker.probe(now)

    def end(self, now: float, started: float, outcome: Outcome) -> None:
        """The attempt that started at ``started`` has ended."""
        code = outcome.code
        seconds = now - started
        news = False
        if code:
            if outcome.never_sent or outcome.cancelled:
                self.ignore(started)
                return
            if code in SLOW_CODES and seconds < self.penalty:
                seconds = self.penalty
        with self._lock:
            self.in_flight -= 1
            weight = 1.0
            if now > self.stamp:  # else: threads may come in another order than their instants
                weight = exp((self.stamp - now) / self.decay)
                self.stamp = now
            decayed = self.cost * weight
            self.cost = seconds if seconds > decayed else decayed + (1 - weight) * seconds
            if code and code in FAILURE_CODES:
                self.failures += 1
                news = self.breaker.failed(started, code)
            else:
                self.successes += 1
                if self.breaker.alert:
                    news = self.breaker.succeeded(started)
        if news:
            self.listener(self)

    def ignore(self, started: float) -> None:
        """An attempt was cancelled or never left: neither success nor failure."""
        with self._lock:
            self.in_flight -= 1
            news = self.breaker.alert and self.breaker.ignored(started)
        if news:
            self.listener(self)

    def outrun(self, now: float, started: float) -> None:
        """Another attempt of the call has won. How long this one would have taken isn't known, but that it took longer
        than it has until now: the average is raised to that, and never lowered, or an endpoint that loses every race
        would look idle for ever."""
        with self._lock:
            seconds = now - started
            if seconds > self.cost * exp(min(0.0, self.stamp - now) / self.decay):
                self.cost = seconds
                self.stamp = max(now, self.stamp)
        self.ignore(started)

    def latency(self, now: float) -> float:
        """The average decayed to ``now``, in seconds."""
        return self.cost * exp(min(0.0, self.stamp - now) / self.decay)

    def counted(self) -> tuple[int, int]:
        """Successes and failures since this was last asked."""
        with self._lock:
            counts = self.successes, self.failures
            self.successes = self.failures = 0
        return counts

    def __repr__(self) -> str:
        ejected = f" {self.breaker.state.value}" if self.breaker.state.value != "closed" else ""
        return f"<Node {self.endpoint.address} in_flight={self.in_flight} cost={self.cost * 1000:.1f}ms{ejected}>"


Busier = Callable[[Node, Node], bool]


def busier(a: Node, b: Node) -> bool:
    """Whether ``a`` is busier than ``b`` by peak EWMA: latency × (in flight / weight + 1), latencies alike taken as
    equal.

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
    weight_a, weight_b = a.weight, b.weight
    if cost_a > cost_b * NOISE_FACTOR or cost_b > cost_a * NOISE_FACTOR:
        return cost_a * (a.in_flight / weight_a + 1) > cost_b * (b.in_flight / weight_b + 1)
    return a.in_flight * weight_b > b.in_flight * weight_a


def fuller(a: Node, b: Node) -> bool:
    """Whether ``a`` has more in flight than ``b``, for each unit of weight (A48; Envoy's weighted least request)."""
    return a.in_flight * b.weight > b.in_flight * a.weight


def far_fuller(a: Node, b: Node) -> bool:
    """Whether ``a`` has far more in flight than its weight gives it, by what ``b`` has."""
    return (a.in_flight - FAR_SLACK) * b.weight > FAR_IN_FLIGHT * (b.in_flight + 1) * a.weight


def far_busier(a: Node, b: Node) -> bool:
    """Whether ``a`` is so much slower than ``b``, or fails, or has so much more in flight, that its weight no longer
    counts."""
    cost_a, cost_b = _costs(a, b)
    return cost_a > FAR_COST * (cost_b + FAR_FLOOR) or far_fuller(a, b)


def _costs(a: Node, b: Node) -> tuple[float, float]:
    """Both averages at one instant: the older is decayed to the instant of the younger, which under load is now."""
    if a.stamp < b.stamp:
        return a.cost * exp((a.stamp - b.stamp) / a.decay), b.cost
    return a.cost, b.cost * exp((b.stamp - a.stamp) / b.decay)
