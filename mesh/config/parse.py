"""The service config: gRPC's own JSON and the mesh's further keys, parsed into settings.

``protos/weft/mesh/v1/service_config.proto`` defines every key. A config is accepted whole or not at all: the first
error raises ``ValueError`` with the field's path. Unknown keys are ignored, as in gRPC (a newer config must not break
an older client), and listed in ``ServiceConfig.warnings``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

from mesh.config.reader import (
    MAX_RING,
    MAX_SIZE,
    MAX_WARNINGS,
    Field,
    Object,
    ParseState,
    abbreviated_key,
    did_you_mean,
    read_json,
)
from mesh.config.settings import (
    NEVER_HEDGE,
    AdaptiveThrottleConfig,
    BalancerConfig,
    BudgetConfig,
    FailurePercentageConfig,
    HedgingPolicy,
    LoadReportsConfig,
    MethodPolicy,
    OutlierDetectionConfig,
    OverloadConfig,
    RetryPolicy,
    ServiceConfig,
    SlowStartConfig,
    SuccessRateConfig,
    ThrottleConfig,
    ZoneConfig,
)


def parse(text: str, *, balanced_by_core: bool = False) -> ServiceConfig:
    """Parse a service config's JSON. ``balanced_by_core``: the balancing policy is left to gRPC core.

    Raises:
        ValueError: with the path of the invalid field, "service config: methodConfig[0].timeout: ...".
    """
    root = _read(text)
    health = root.get("healthCheckConfig", Field.object)
    if balanced_by_core:
        root.known.update(("loadBalancingConfig", "loadBalancingPolicy"))
    balancer, detection = (None, None) if balanced_by_core else _balancer(root)
    return ServiceConfig(
        methods=_methods(root),
        balancer=balancer,
        budget=_budget(root.get("retryBudget", Field.object)),
        throttle=_throttle(root.get("retryThrottling", Field.object)),
        health_service=None if health is None else health.get("serviceName", Field.string),
        outlier_detection=detection or OutlierDetectionConfig(),
        slow_start=root.get_or("slowStart", _slow_start, SlowStartConfig()),
        zone=root.get_or("zoneAwareness", _zone, ZoneConfig()),
        overload=root.get_or("overload", _overload, OverloadConfig()),
        warnings=root.state.warnings(),  # last: by now every known key has been read
    )


def for_core(text: str) -> str:
    """The part of a service config that is left to gRPC core when core resolves and balances: everything but retries
    and timeouts, which the mesh does."""
    own_keys = ("methodConfig", "retryThrottling", "retryBudget", "slowStart", "zoneAwareness", "overload")
    return json.dumps({key: value for key, value in _read(text).items.items() if key not in own_keys})


def _read(text: str) -> Object:
    if not isinstance(text, str):
        raise ValueError(f"service config: not JSON: expected text, got {type(text).__name__}")
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_SIZE:
        raise ValueError(f"service config: {size} bytes; the limit is {MAX_SIZE}")
    try:
        value = read_json(text)
    except ValueError as error:
        raise ValueError(f"service config: {error}") from None
    return Field("", value, ParseState()).object()


def _methods(root: Object) -> dict[tuple[str, str], MethodPolicy]:
    methods: dict[tuple[str, str], MethodPolicy] = {}
    for item in root.list("methodConfig"):
        config = item.object()
        policy = _method(config)
        for name_field in config.list("name"):
            name = name_field.object()
            key = name.get_or("service", Field.string, ""), name.get_or("method", Field.string, "")
            if key[1] and not key[0]:
                raise name.field("service").fail("required with a method")
            if key in methods:
                raise name_field.fail("duplicate name")
            methods[key] = policy
    return methods


def _method(config: Object) -> MethodPolicy:
    retry = config.get("retryPolicy", _retry)
    hedge = config.get("hedgingPolicy", _hedge)
    if retry and hedge:
        raise config.field("hedgingPolicy").fail("not allowed together with retryPolicy")
    return MethodPolicy(
        timeout=config.get_or("timeout", Field.timeout_or_none, math.inf),
        default_timeout=config.get_or("defaultTimeout", Field.timeout, math.inf),
        attempt_timeout=config.get_or("attemptTimeout", Field.timeout, math.inf),
        wait_for_ready=config.get("waitForReady", Field.boolean),
        retry=retry,
        hedge=hedge or NEVER_HEDGE,
    )


def _retry(field: Field) -> RetryPolicy:
    retry = field.object()
    receive_timeout = retry.get_or("perAttemptRecvTimeout", Field.timeout, math.inf)
    if receive_timeout < math.inf:  # then timeouts alone are retryable, as in core
        codes: frozenset[int] = retry.get_or("retryableStatusCodes", Field.codes, frozenset())
    else:
        codes = retry.required("retryableStatusCodes", Field.codes)
        if not codes:
            raise retry.field("retryableStatusCodes").fail("expected at least one status code")
    return RetryPolicy(
        receive_timeout=receive_timeout,
        max_attempts=retry.required("maxAttempts", Field.attempts),
        initial_backoff=retry.required("initialBackoff", Field.timeout),
        max_backoff=retry.required("maxBackoff", Field.timeout),
        multiplier=retry.required("backoffMultiplier", Field.positive),
        retryable_codes=codes,
    )


def _hedge(field: Field) -> HedgingPolicy:
    hedge = field.object()
    return HedgingPolicy(
        max_attempts=hedge.required("maxAttempts", Field.attempts),
        delay=hedge.get_or("hedgingDelay", Field.duration, 0.0),
        non_fatal_codes=hedge.get_or("nonFatalStatusCodes", Field.codes, frozenset()),
        percentile=hedge.get_or("delayPercentile", Field.percentile, 0.0),
    )


_Balancing = tuple[BalancerConfig, OutlierDetectionConfig | None]
"""A balancing policy, and the outlier detection around it if there is one."""


def _balancer(root: Object) -> tuple[BalancerConfig | None, OutlierDetectionConfig | None]:
    return _policy(root, "loadBalancingConfig") if root.list("loadBalancingConfig") else (None, None)


def _policy(parent: Object, key: str) -> _Balancing:
    """The first known policy of a list (A24). Names may end in gRPC's "_experimental"."""
    for entry in parent.list(key):
        policies = entry.object()
        if len(policies.items) != 1:
            raise entry.fail("expected one policy's name with its settings")
        (name,) = policies.items
        settings = policies.field(name)
        read = _POLICIES.get(name.removesuffix("_experimental"))
        if read is not None:
            return read(settings.object())
        # The list may have other clients' policies (A24): only a name similar to one of own_keys is a typo.
        if len(parent.state.policies) < MAX_WARNINGS and (hint := did_you_mean(name, _POLICIES)):
            parent.state.policies.append(f"{entry.path}: unknown policy {abbreviated_key(name)}, skipped{hint}")
    known = ", ".join(sorted(_POLICIES))
    raise parent.field(key).fail(f"no known policy; known: {known}")


def _child(settings: Object) -> _Balancing:
    """The child policy; peak_ewma when none is set."""
    return _policy(settings, "childPolicy") if settings.list("childPolicy") else (BalancerConfig(), None)


def _pick_first(settings: Object) -> _Balancing:
    return BalancerConfig("pick_first", shuffle=settings.get_or("shuffleAddressList", Field.boolean, False)), None


def _round_robin(_: Object) -> _Balancing:
    return BalancerConfig("round_robin"), None


def _weighted_round_robin(settings: Object) -> _Balancing:
    return BalancerConfig("weighted_round_robin", reports=_reports(settings)), None


def _least_request(settings: Object) -> _Balancing:
    return BalancerConfig(
        "least_request",
        starvation=math.inf,
        choices=min(10, max(2, settings.get_or("choiceCount", Field.whole, 2))),  # "2..10, more are 10" - A48
        reports=settings.get_or("loadReports", lambda field: _reports(field.object()), LoadReportsConfig()),
    ), None


def _peak_ewma(settings: Object) -> _Balancing:
    return BalancerConfig(
        "peak_ewma",
        decay_time=settings.get_or("decayTime", Field.timeout, 1.0),
        failure_penalty=settings.get_or("failurePenalty", Field.timeout, 5.0),
        starvation=settings.get_or("starvationGuard", Field.duration, 10.0) or math.inf,
        reports=settings.get_or("loadReports", lambda field: _reports(field.object()), LoadReportsConfig()),
    ), None


def _ring_hash(settings: Object) -> _Balancing:
    least = settings.get_or("minRingSize", Field.positive_whole, 1024)
    most = settings.get_or("maxRingSize", Field.positive_whole, 4096)
    if most < least:
        raise settings.field("maxRingSize").fail("expected at least minRingSize")
    factor = settings.get_or("boundedLoadFactor", Field.not_negative, 0.0)
    if 0 < factor < 1:
        raise settings.field("boundedLoadFactor").fail("expected 0, or a number of 1 or more")
    return BalancerConfig(
        "ring_hash",
        hash_header=settings.get_or("requestHashHeader", Field.string, "").lower(),
        min_ring=min(least, MAX_RING),
        max_ring=min(most, MAX_RING),
        load_factor=factor,
        subset=0,  # every client must see the same ring
    ), None


def _random_subsetting(settings: Object) -> _Balancing:
    balancer, detection = _child(settings)
    return replace(balancer, subset=settings.required("subsetSize", Field.positive_whole)), detection


def _priority(settings: Object) -> _Balancing:
    children = settings.required("children", Field.object)
    children.known.update(children.items)  # names that the config itself defines
    levels = []
    for name in settings.required("priorities", Field.list):
        child = children.required(name.string(), Field.object)
        levels.append(_policy(child, "config"))
    if not levels:
        raise settings.field("priorities").fail("expected at least one name")
    detection = next((each for _, each in levels if each is not None), None)
    return replace(levels[0][0], priorities=tuple(balancer for balancer, _ in levels)), detection


def _outlier_detection(settings: Object) -> _Balancing:
    balancer, _ = _child(settings)
    default = OutlierDetectionConfig()
    return balancer, OutlierDetectionConfig(
        interval=settings.get_or("interval", Field.period, default.interval),
        base_time=settings.get_or("baseEjectionTime", Field.period, default.base_time),
        max_time=settings.get_or("maxEjectionTime", Field.period, default.max_time),
        max_percent=settings.get_or("maxEjectionPercent", Field.percentage, default.max_percent),
        success_rate=settings.get("successRateEjection", _success_rate),
        failure_percentage=settings.get("failurePercentageEjection", _failure_percentage),
        consecutive_failures=settings.get_or("consecutiveFailures", Field.whole, default.consecutive_failures),
        consecutive_gateway_errors=settings.get_or(
            "consecutiveGatewayErrors", Field.whole, default.consecutive_gateway_errors
        ),
        consecutive_timeouts=settings.get_or("consecutiveTimeouts", Field.whole, default.consecutive_timeouts),
        panic_threshold=settings.get_or("panicThreshold", Field.percentage, default.panic_threshold),
        dry_run=settings.get_or("dryRun", Field.boolean, False),
    )


def _success_rate(field: Field) -> SuccessRateConfig:
    settings, default = field.object(), SuccessRateConfig()
    return SuccessRateConfig(
        stdev_factor=settings.get_or("stdevFactor", Field.whole, 1900) / 1000,
        enforcement=settings.get_or("enforcementPercentage", Field.percentage, default.enforcement),
        minimum_hosts=settings.get_or("minimumHosts", Field.whole, default.minimum_hosts),
        request_volume=settings.get_or("requestVolume", Field.whole, default.request_volume),
    )


def _failure_percentage(field: Field) -> FailurePercentageConfig:
    settings, default = field.object(), FailurePercentageConfig()
    return FailurePercentageConfig(
        threshold=settings.get_or("threshold", Field.percentage, default.threshold),
        enforcement=settings.get_or("enforcementPercentage", Field.percentage, default.enforcement),
        minimum_hosts=settings.get_or("minimumHosts", Field.whole, default.minimum_hosts),
        request_volume=settings.get_or("requestVolume", Field.whole, default.request_volume),
    )


def _reports(settings: Object) -> LoadReportsConfig:
    default = LoadReportsConfig()
    out_of_band = settings.get_or("enableOobLoadReport", Field.boolean, False)
    period = settings.get_or("oobReportingPeriod", Field.period, 10.0)
    return LoadReportsConfig(
        enabled=True,
        out_of_band=period if out_of_band else 0.0,
        blackout=settings.get_or("blackoutPeriod", Field.duration, default.blackout),
        expiration=settings.get_or("weightExpirationPeriod", Field.timeout, default.expiration),
        update_period=max(0.1, settings.get_or("weightUpdatePeriod", Field.duration, default.update_period)),
        error_penalty=settings.get_or("errorUtilizationPenalty", Field.not_negative, default.error_penalty),
    )


# A new policy needs a line here, one in policy/balancing/policies.py, and one in the proto.
_POLICIES: dict[str, Callable[[Object], _Balancing]] = {
    "least_request": _least_request,
    "outlier_detection": _outlier_detection,
    "peak_ewma": _peak_ewma,
    "pick_first": _pick_first,
    "priority": _priority,
    "random_subsetting": _random_subsetting,
    "ring_hash": _ring_hash,
    "round_robin": _round_robin,
    "weighted_round_robin": _weighted_round_robin,
}


def _slow_start(field: Field) -> SlowStartConfig:
    settings, default = field.object(), SlowStartConfig()
    return SlowStartConfig(
        window=settings.required("window", Field.duration),
        aggression=settings.get_or("aggression", Field.positive, default.aggression),
        min_weight=settings.get_or("minWeightPercent", Field.percentage, 100 * default.min_weight) / 100,
    )


def _zone(field: Field) -> ZoneConfig:
    settings, default = field.object(), ZoneConfig()
    return ZoneConfig(
        enabled=True,
        min_cluster=settings.get_or("minClusterSize", Field.whole, default.min_cluster),
        min_endpoints=settings.get_or("minEndpoints", Field.positive_whole, default.min_endpoints),
    )


def _overload(field: Field) -> OverloadConfig:
    settings = field.object()
    return OverloadConfig(
        max_outstanding=settings.get_or("maxOutstanding", lambda most: most.whole() or math.inf, math.inf),
        adaptive=settings.get("adaptiveThrottle", _adaptive),
        dry_run=settings.get_or("dryRun", Field.boolean, False),
    )


def _adaptive(field: Field) -> AdaptiveThrottleConfig:
    settings, default = field.object(), AdaptiveThrottleConfig()
    k = settings.get_or("k", Field.number, default.k)
    if k < 1:
        raise settings.field("k").fail("expected a number of 1 or more")
    return AdaptiveThrottleConfig(
        k=k,
        window=settings.get_or("window", Field.period, default.window),
        max_refused=min(0.99, settings.get_or("maxRefusedPercent", Field.percentage, 90.0) / 100),
    )


def _budget(budget: Object | None) -> BudgetConfig:
    if budget is None:
        return BudgetConfig()
    return BudgetConfig(
        ratio=budget.get_or("ratio", Field.not_negative, BudgetConfig().ratio),
        min_per_second=budget.get_or("minPerSecond", Field.not_negative, BudgetConfig().min_per_second),
    )


def _throttle(throttle: Object | None) -> ThrottleConfig | None:
    if throttle is None:
        return None
    return ThrottleConfig(
        max_tokens=throttle.required("maxTokens", Field.tokens),
        token_ratio=throttle.required("tokenRatio", Field.token_ratio),
    )
