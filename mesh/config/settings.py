"""The settings of a service config: frozen and validated values. Spans are seconds; math.inf stands for "no limit"."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mesh.codes import Code


class Idempotency(enum.Enum):
    """What a method's descriptor says about its side effects (``idempotency_level``)."""

    UNKNOWN = 0
    NO_SIDE_EFFECTS = 1
    IDEMPOTENT = 2


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to retry a call (A6). ``max_attempts`` includes the first one; 1 means never. ``receive_timeout``: how long
    each attempt waits for its response."""

    max_attempts: int
    initial_backoff: float = 0.025
    max_backoff: float = 0.25
    multiplier: float = 2.0
    retryable_codes: frozenset[int] = frozenset({Code.UNAVAILABLE})
    receive_timeout: float = math.inf


@dataclass(frozen=True, slots=True)
class HedgingPolicy:
    """When to send another attempt while one is running (A6). ``max_attempts`` includes the first one; 1 means never.

    ``percentile``: the percentile of the method's latencies to use as the delay (0 < p < 100; 0: none). ``delay`` is
    used until enough latencies have been recorded.
    """

    max_attempts: int
    delay: float = 0.0
    non_fatal_codes: frozenset[int] = frozenset()
    percentile: float = 0.0


NEVER_RETRY = RetryPolicy(1, retryable_codes=frozenset())
NEVER_HEDGE = HedgingPolicy(1)

# Without a config, by the method's descriptor; 25 ms and 250 ms are A44's.
DEFAULT_RETRY = {
    Idempotency.UNKNOWN: NEVER_RETRY,
    Idempotency.IDEMPOTENT: RetryPolicy(3),
    Idempotency.NO_SIDE_EFFECTS: RetryPolicy(3),
}


@dataclass(frozen=True, slots=True)
class MethodPolicy:
    """The settings of one method's calls.

    ``timeout``: the maximum of a call's own. ``default_timeout``: for calls without one. ``attempt_timeout``: for each
    attempt. ``receive_timeout``: for the first response of a stream. ``wait_for_ready`` None: the call's own, else
    false. ``retry`` None: what the method's descriptor allows.
    """

    timeout: float = math.inf
    default_timeout: float = math.inf
    attempt_timeout: float = math.inf
    receive_timeout: float = math.inf
    wait_for_ready: bool | None = None
    retry: RetryPolicy | None = None
    hedge: HedgingPolicy = NEVER_HEDGE


@dataclass(frozen=True, slots=True)
class LoadReportsConfig:
    """How weights are computed from load reports (A58). ``enabled``: whether load reports are used.

    ``out_of_band``: the period of reports from ORCA's service, in seconds; 0: reports come with responses.
    """

    enabled: bool = False
    out_of_band: float = 0.0
    blackout: float = 10.0
    expiration: float = 180.0
    update_period: float = 1.0
    error_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class BalancerConfig:
    """A balancing policy and its settings; those of other policies are ignored.

    ``decay_time``, ``failure_penalty`` and ``starvation`` (seconds without a response after which an idle endpoint is
    tried) are peak_ewma's; ``starvation`` and ``choices`` least_request's; ``hash_header``, ``min_ring``, ``max_ring``
    and ``load_factor`` (0: unbounded) ring_hash's. ``subset``: how many endpoints a client uses; 0: all.
    ``priorities``: the policy for each priority, in order; empty: this one for all.
    """

    name: str = "peak_ewma"
    decay_time: float = 1.0
    failure_penalty: float = 5.0
    starvation: float = 10.0
    choices: int = 2
    reports: LoadReportsConfig = LoadReportsConfig()
    hash_header: str = ""
    min_ring: int = 1024
    max_ring: int = 4096
    load_factor: float = 0.0
    shuffle: bool = False
    subset: int = 100
    priorities: tuple[BalancerConfig, ...] = ()


@dataclass(frozen=True, slots=True)
class SuccessRateConfig:
    """A50's success rate ejection: below mean - ``stdev_factor`` standard deviations. Percentages from 0 to 100."""

    stdev_factor: float = 1.9
    enforcement: float = 100.0
    minimum_hosts: int = 5
    request_volume: int = 100


@dataclass(frozen=True, slots=True)
class FailurePercentageConfig:
    """A50's failure percentage ejection. Percentages from 0 to 100."""

    threshold: float = 85.0
    enforcement: float = 100.0
    minimum_hosts: int = 5
    request_volume: int = 50


@dataclass(frozen=True, slots=True)
class OutlierDetectionConfig:
    """Outlier detection (A50): when an endpoint is ejected, and for how long (seconds).

    ``consecutive_failures`` of any kind, ``consecutive_gateway_errors`` (UNAVAILABLE or DEADLINE_EXCEEDED) or
    ``consecutive_timeouts`` (DEADLINE_EXCEEDED) eject at once; 0 turns each off. ``panic_threshold``: when a smaller
    percentage of READY endpoints isn't ejected, ejections are ignored. ``dry_run``: count ejections, but don't eject.
    """

    interval: float = 10.0
    base_time: float = 30.0
    max_time: float = 300.0
    max_percent: float = 10.0
    success_rate: SuccessRateConfig | None = SuccessRateConfig()
    failure_percentage: FailurePercentageConfig | None = FailurePercentageConfig()
    consecutive_failures: int = 5
    consecutive_gateway_errors: int = 0
    consecutive_timeouts: int = 3
    panic_threshold: float = 50.0
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class SlowStartConfig:
    """Slow start: an endpoint's weight once it is READY: max(``min_weight``, (age / ``window``) ^ (1 /
    ``aggression``)). A ``window`` of 0 turns it off."""

    window: float = 0.0
    aggression: float = 1.0
    min_weight: float = 0.1


@dataclass(frozen=True, slots=True)
class ZoneConfig:
    """Zone awareness: calls stay in the client's own zone if there are at least ``min_cluster`` endpoints in all and
    ``min_endpoints`` available in the zone."""

    enabled: bool = False
    min_cluster: int = 6
    min_endpoints: int = 2


@dataclass(frozen=True, slots=True)
class AdaptiveThrottleConfig:
    """Google SRE's client-side throttling: refuse with p = (requests - ``k`` × accepts) / (requests + 1), over
    ``window`` seconds, and at most ``max_refused`` of the calls."""

    k: float = 2.0
    window: float = 120.0
    max_refused: float = 0.9


@dataclass(frozen=True, slots=True)
class OverloadConfig:
    """Calls that a client refuses to send: those over ``max_outstanding`` (A32), and by the adaptive throttle.
    ``dry_run``: count refusals, but don't refuse."""

    max_outstanding: float = math.inf
    adaptive: AdaptiveThrottleConfig | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class BudgetConfig:
    """The retry budget: retries and hedges as a share of calls, plus a number per second."""

    ratio: float = 0.1
    min_per_second: float = 10.0


@dataclass(frozen=True, slots=True)
class ThrottleConfig:
    """A6's retry throttling: at most ``max_tokens``; each success adds ``token_ratio``."""

    max_tokens: float
    token_ratio: float


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """A whole service config. ``health_service`` None: no health checks. ``warnings``: the unknown keys that were
    ignored, each with its path."""

    methods: Mapping[tuple[str, str], MethodPolicy] = field(default_factory=dict)
    balancer: BalancerConfig | None = None
    budget: BudgetConfig = BudgetConfig()
    throttle: ThrottleConfig | None = None
    health_service: str | None = None
    outlier_detection: OutlierDetectionConfig = OutlierDetectionConfig()
    slow_start: SlowStartConfig = SlowStartConfig()
    zone: ZoneConfig = ZoneConfig()
    overload: OverloadConfig = OverloadConfig()
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def method(self, path: str, idempotency: Idempotency) -> MethodPolicy:
        """The policy of ``/package.Service/Method``: the most specific name wins, and the descriptor gives what it
        doesn't set."""
        service, _, name = path.removeprefix("/").rpartition("/")
        found = self.methods
        policy = found.get((service, name)) or found.get((service, "")) or found.get(("", "")) or MethodPolicy()
        if policy.retry is not None:
            return policy
        hedged = policy.hedge.max_attempts > 1
        return replace(policy, retry=NEVER_RETRY if hedged else DEFAULT_RETRY[idempotency])
