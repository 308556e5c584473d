"""The service config: what is taken, what is refused and in which words, and which policy a method gets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor

from mesh.codes import Code
from mesh.config.parse import for_core, parse
from mesh.config.settings import (
    NEVER_HEDGE,
    AdaptiveThrottleConfig,
    BalancerConfig,
    BudgetConfig,
    FailurePercentageConfig,
    HedgingPolicy,
    Idempotency,
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
from weft.mesh.v1 import service_config_pb2

RETRY: dict[str, Any] = {
    "maxAttempts": 3,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
HEDGE: dict[str, Any] = {"maxAttempts": 3, "hedgingDelay": "0.05s", "nonFatalStatusCodes": ["UNAVAILABLE"]}
THROTTLE: dict[str, Any] = {"maxTokens": 10, "tokenRatio": 0.1}

REPORTS: dict[str, Any] = {
    "enableOobLoadReport": True,
    "oobReportingPeriod": "5s",
    "blackoutPeriod": "1s",
    "weightExpirationPeriod": "60s",
    "weightUpdatePeriod": "2s",
    "errorUtilizationPenalty": 0.5,
}
EWMA: dict[str, Any] = {"decayTime": "3s", "failurePenalty": "2s", "starvationGuard": "7s", "loadReports": REPORTS}
LEAST: dict[str, Any] = {"choiceCount": 3, "loadReports": {}}
RING: dict[str, Any] = {
    "requestHashHeader": "User",
    "minRingSize": 10,
    "maxRingSize": "100",
    "boundedLoadFactor": 1.25,
}
SUCCESS: dict[str, Any] = {
    "stdevFactor": 1000,
    "enforcementPercentage": 50,
    "minimumHosts": 3,
    "requestVolume": 10,
}
PERCENTAGE: dict[str, Any] = {
    "threshold": 60,
    "enforcementPercentage": 50,
    "minimumHosts": 3,
    "requestVolume": 10,
}
OUTLIERS: dict[str, Any] = {
    "interval": "1s",
    "baseEjectionTime": "2s",
    "maxEjectionTime": "3s",
    "maxEjectionPercent": 40,
    "successRateEjection": SUCCESS,
    "failurePercentageEjection": PERCENTAGE,
    "consecutiveFailures": 7,
    "consecutiveGatewayErrors": 4,
    "consecutiveTimeouts": 4,
    "panicThreshold": 30,
    "dryRun": True,
}
PRIORITY: dict[str, Any] = {
    "children": {
        "near": {
            "config": [{"random_subsetting_experimental": {"subsetSize": 20, "childPolicy": [{"peak_ewma": EWMA}]}}]
        },
        "far": {"config": [{"ring_hash": RING}]},
        "last": {"config": [{"pick_first": {"shuffleAddressList": True}}]},
        "unused": {"config": 1},
    },
    "priorities": ["near", "far", "last"],
}
SLOW: dict[str, Any] = {"window": "30s", "aggression": 2, "minWeightPercent": 5}
ZONES: dict[str, Any] = {"minClusterSize": 4, "minEndpoints": 1}
ADAPTIVE: dict[str, Any] = {"k": 1.5, "window": "60s", "maxRefusedPercent": 80}
OVERLOAD: dict[str, Any] = {"maxOutstanding": 10, "adaptiveThrottle": ADAPTIVE, "dryRun": True}

FULL: dict[str, Any] = {
    "loadBalancingConfig": [
        {"outlier_detection_experimental": {**OUTLIERS, "childPolicy": [{"priority_experimental": PRIORITY}]}},
        {"round_robin": {}},
    ],
    "slowStart": SLOW,
    "zoneAwareness": ZONES,
    "overload": OVERLOAD,
    "methodConfig": [
        {
            "name": [{"service": "a.B", "method": "Get"}],
            "waitForReady": True,
            "timeout": "5s",
            "defaultTimeout": "2s",
            "attemptTimeout": "0.5s",
            "retryPolicy": RETRY,
        },
        {"name": [{"service": "a.B"}, {}], "hedgingPolicy": {**HEDGE, "delayPercentile": 95}},
    ],
    "retryThrottling": THROTTLE,
    "healthCheckConfig": {"serviceName": "a.B"},
    "retryBudget": {"ratio": 0.2, "minPerSecond": 5},
}


NEAR = BalancerConfig(
    decay_time=3.0,
    failure_penalty=2.0,
    starvation=7.0,
    reports=LoadReportsConfig(True, 5.0, 1.0, 60.0, 2.0, 0.5),
    subset=20,
)
FAR = BalancerConfig("ring_hash", hash_header="user", min_ring=10, max_ring=100, load_factor=1.25, subset=0)
LAST = BalancerConfig("pick_first", shuffle=True)


def parsed(value: object) -> ServiceConfig:
    return parse(json.dumps(value))


def of_method(config: dict[str, Any]) -> MethodPolicy:
    return parsed({"methodConfig": [{"name": [{}], **config}]}).methods["", ""]


# -- what is taken


def test_a_config_is_read_whole() -> None:
    hedged = MethodPolicy(hedge=HedgingPolicy(3, 0.05, frozenset({Code.UNAVAILABLE}), 95.0))
    assert parsed(FULL) == ServiceConfig(
        methods={
            ("a.B", "Get"): MethodPolicy(
                timeout=5.0,
                default_timeout=2.0,
                attempt_timeout=0.5,
                wait_for_ready=True,
                retry=RetryPolicy(3, 0.1, 1.0, 2.0, frozenset({Code.UNAVAILABLE})),
            ),
            ("a.B", ""): hedged,
            ("", ""): hedged,
        },
        balancer=replace(NEAR, priorities=(NEAR, FAR, LAST)),
        outlier_detection=OutlierDetectionConfig(
            1.0,
            2.0,
            3.0,
            40.0,
            SuccessRateConfig(1.0, 50.0, 3, 10),
            FailurePercentageConfig(60.0, 50.0, 3, 10),
            consecutive_failures=7,
            consecutive_gateway_errors=4,
            consecutive_timeouts=4,
            panic_threshold=30.0,
            dry_run=True,
        ),
        slow_start=SlowStartConfig(30.0, 2.0, 0.05),
        zone=ZoneConfig(enabled=True, min_cluster=4, min_endpoints=1),
        overload=OverloadConfig(10, AdaptiveThrottleConfig(1.5, 60.0, 0.8), dry_run=True),
        budget=BudgetConfig(0.2, 5.0),
        throttle=ThrottleConfig(10.0, 0.1),
        health_service="a.B",
    )


def test_an_empty_config_is_all_defaults() -> None:
    assert parsed({}) == ServiceConfig()
    assert ServiceConfig().budget == BudgetConfig(ratio=0.1, min_per_second=10.0)


def test_null_is_as_if_not_given() -> None:
    nulls: dict[str, Any] = dict.fromkeys(FULL)
    assert parsed(nulls) == ServiceConfig()
    assert of_method({"timeout": None, "retryPolicy": None, "waitForReady": None}) == MethodPolicy()


def test_an_attempt_timeout_is_reason_enough_to_retry() -> None:
    policy = of_method({"retryPolicy": {**RETRY, RECEIVE_TIMEOUT: "0.5s"}}).retry
    assert policy == RetryPolicy(3, 0.1, 1.0, 2.0, frozenset({Code.UNAVAILABLE}), 0.5)
    missing: list[list[str] | None] = [None, []]
    for codes in missing:
        policy = of_method({"retryPolicy": {**RETRY, "retryableStatusCodes": codes, RECEIVE_TIMEOUT: "0.5s"}}).retry
        assert policy == RetryPolicy(3, 0.1, 1.0, 2.0, frozenset(), 0.5)


def test_keys_that_are_not_known_are_ignored() -> None:
    newer: dict[str, Any] = {**RETRY, "newer": 0}
    assert parsed({"newer": 1}) == ServiceConfig()
    assert of_method({"newer": [], "retryPolicy": newer}) == of_method({"retryPolicy": RETRY})
    assert set(parsed({"methodConfig": [{"name": [{"newer": 2}]}]}).methods) == {("", "")}


def test_health_is_watched_only_where_the_config_names_it() -> None:
    assert parsed({"healthCheckConfig": {}}).health_service is None
    assert parsed({"healthCheckConfig": {"serviceName": ""}}).health_service == ""


def test_a_budget_may_be_given_in_part() -> None:
    assert parsed({"retryBudget": {"ratio": 0}}).budget == BudgetConfig(0.0, 10.0)
    assert parsed({"retryBudget": {"minPerSecond": "2.5"}}).budget == BudgetConfig(0.1, 2.5)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        (["UNAVAILABLE", "aborted", "Data_Loss"], {14, 10, 15}),
        ([14, 10.0], {14, 10}),
        (["unavailable", 14], {14}),
    ],
)
def test_status_codes_are_names_in_any_case_or_numbers(codes: list[object], expected: set[int]) -> None:
    retry = of_method({"retryPolicy": {**RETRY, "retryableStatusCodes": codes}}).retry
    assert retry is not None
    assert retry.retryable_codes == expected
    assert (
        of_method({"hedgingPolicy": {"maxAttempts": 2, "nonFatalStatusCodes": codes}}).hedge.non_fatal_codes == expected
    )


@pytest.mark.parametrize(("given", "taken"), [(2, 2), (5, 5), (6, 5), (1e300, 5), ("4", 4), (3.0, 3)])
def test_more_than_five_attempts_are_five(given: object, taken: int) -> None:
    retry = of_method({"retryPolicy": {**RETRY, "maxAttempts": given}}).retry
    assert retry is not None
    assert retry.max_attempts == taken
    assert of_method({"hedgingPolicy": {"maxAttempts": given}}).hedge.max_attempts == taken


@pytest.mark.parametrize(
    ("given", "taken"),
    [("0.001s", 0.001), ("1.5s", 1.5), ("0.001000001s", 0.001000001), ("315576000000s", 315576000000.0)],
)
def test_durations(given: str, taken: float) -> None:
    assert of_method({"timeout": given}).timeout == taken


@pytest.mark.parametrize("given", ["0s", "0.000s", "-0s"])
def test_a_timeout_of_zero_is_none_at_all_as_in_core(given: str) -> None:
    assert of_method({"timeout": given}).timeout == INFINITE


@pytest.mark.parametrize(
    ("given", "taken"),
    [(0.1, 0.1), (0.1239, 0.123), (1.001, 1.001), ("0.5", 0.5), (1e308, 1000.0), (0.001, 0.001)],
)
def test_three_decimals_of_a_token_ratio_count(given: object, taken: float) -> None:
    throttle = parsed({"retryThrottling": {"maxTokens": 10, "tokenRatio": given}}).throttle
    assert throttle is not None
    assert throttle.token_ratio == taken


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        ([{"round_robin": {}}], "round_robin"),
        ([{"grpclb": {}}, {"round_robin": {}}, {"peak_ewma": {}}], "round_robin"),
        ([{"peak_ewma": {}}, {"round_robin": "not looked at"}], "peak_ewma"),
    ],
)
def test_the_first_known_balancer_wins(entries: list[object], name: str) -> None:
    assert parsed({"loadBalancingConfig": entries}).balancer == BalancerConfig(name)


def test_outlier_detection_that_is_named_has_what_it_names_and_failures_in_a_row() -> None:
    # As in gRPC: an algorithm that isn't named is off.
    named = parsed(policy_of("outlier_detection", {"childPolicy": [{"round_robin": {}}]}))
    assert named.balancer == BalancerConfig("round_robin")
    assert named.outlier_detection == OutlierDetectionConfig(success_rate=None, failure_percentage=None)
    assert parsed(policy_of("round_robin", {})).outlier_detection == OutlierDetectionConfig()


def test_a_policy_over_others_has_peak_ewma_below_it_when_it_names_none() -> None:
    assert parsed(policy_of("outlier_detection", {})).balancer == BalancerConfig()
    assert parsed(policy_of("random_subsetting", {"subsetSize": 3})).balancer == BalancerConfig(subset=3)


@pytest.mark.parametrize(("given", "taken"), [(0, 2), (2, 2), (10, 10), (11, 10)])
def test_two_to_ten_choices(given: int, taken: int) -> None:
    balancer = parsed(policy_of("least_request", {"choiceCount": given})).balancer
    assert balancer is not None
    assert balancer.choices == taken


def test_a_ring_is_capped_as_grpc_caps_it() -> None:
    balancer = parsed(policy_of("ring_hash", {"minRingSize": 5000, "maxRingSize": 8_000_000})).balancer
    assert balancer is not None
    assert (balancer.min_ring, balancer.max_ring) == (4096, 4096)


def test_0_is_no_guard_and_no_limit() -> None:
    assert parsed(policy_of("peak_ewma", {"starvationGuard": "0s"})).balancer == BalancerConfig(starvation=INFINITE)
    assert parsed({"overload": {"maxOutstanding": 0}}).overload.max_outstanding == INFINITE


def test_without_a_balancer_none_is_named() -> None:
    assert parsed({"loadBalancingConfig": []}).balancer is None


def test_where_core_balances_its_policies_are_cores_to_read() -> None:
    text = json.dumps({**FULL, "loadBalancingConfig": [{"xds_only": 1}]})
    assert parse(text, balanced_by_core=True).balancer is None
    assert json.loads(for_core(text)) == {
        "loadBalancingConfig": [{"xds_only": 1}],
        "healthCheckConfig": {"serviceName": "a.B"},
    }


# -- what is refused

NUMBER = "expected a number"
OBJECT = "expected an object"
LIST = "expected a list"
DURATION = 'expected a duration such as "1.5s"'
ATTEMPTS = "expected a whole number of 2 or more"
TOO_SHORT = "expected a duration of 0.001s or more"
TOO_OFTEN = "expected a duration of 0.01s or more"
NANOSECOND = "0.000000001s"
NAN, INFINITE = float("nan"), float("inf")
HUGE = 10**400

WRONG_NUMBERS: list[object] = [True, [], {}, "x", "", "1_0", " 1", "nan", NAN, INFINITE, -INFINITE, HUGE]
WRONG_DURATIONS: list[object] = [
    *(1, 1.5, True, [], {}, "", "1", "1m", "1.s", ".5s", "1e3s", "infs", "1.0000000001s", "1 s"),
    "9" * 13 + "s",
]

Place = Callable[[str, object], tuple[dict[str, Any], str]]
Case = tuple[tuple[dict[str, Any], str], str]


def top(key: str, value: object) -> tuple[dict[str, Any], str]:
    return {key: value}, key


def method(key: str, value: object) -> tuple[dict[str, Any], str]:
    return {"methodConfig": [{"name": [{}]}, {"name": [], key: value}]}, f"methodConfig[1].{key}"


def retry(key: str, value: object) -> tuple[dict[str, Any], str]:
    return {"methodConfig": [{"retryPolicy": {**RETRY, key: value}}]}, f"methodConfig[0].retryPolicy.{key}"


def hedge(key: str, value: object) -> tuple[dict[str, Any], str]:
    return {"methodConfig": [{"hedgingPolicy": {**HEDGE, key: value}}]}, f"methodConfig[0].hedgingPolicy.{key}"


def throttle(key: str, value: object) -> tuple[dict[str, Any], str]:
    return {"retryThrottling": {**THROTTLE, key: value}}, f"retryThrottling.{key}"


def budget(key: str, value: object) -> tuple[dict[str, Any], str]:
    return {"retryBudget": {key: value}}, f"retryBudget.{key}"


def ewma(key: str, value: object) -> tuple[dict[str, Any], str]:
    return (
        {"loadBalancingConfig": [{"other": {}}, {"peak_ewma": {key: value}}]},
        f"loadBalancingConfig[1].peak_ewma.{key}",
    )


def policy_of(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"loadBalancingConfig": [{name: settings}]}


def name(key: str, value: object) -> tuple[dict[str, Any], str]:
    return {"methodConfig": [{"name": [{"service": "a", key: value}]}]}, f"methodConfig[0].name[0].{key}"


def each(place: Place, keys: Iterable[str], why: str, *wrong: object) -> list[Case]:
    """Each of these values is wrong for each of these keys there."""
    return [(place(key, value), why) for key in keys for value in wrong]


def at(path: str, why: str, config: dict[str, Any]) -> Case:
    return (config, path), why


TIMEOUTS = ("timeout", "defaultTimeout", "attemptTimeout")
BACKOFFS = ("initialBackoff", "maxBackoff")
RECEIVE_TIMEOUT = "perAttemptRecvTimeout"

REFUSED: list[Case] = [
    *each(top, ["loadBalancingConfig", "methodConfig"], LIST, 1, "x", {}, True),
    *each(top, ["retryThrottling", "healthCheckConfig", "retryBudget"], OBJECT, 1, "x", [], True),
    at("healthCheckConfig.serviceName", "expected a string", {"healthCheckConfig": {"serviceName": 1}}),
    # names
    at("methodConfig[0]", OBJECT, {"methodConfig": [None]}),
    at("methodConfig[0].name[0]", OBJECT, {"methodConfig": [{"name": ["a.B"]}]}),
    *each(method, ["name"], LIST, {}, "a.B", 1),
    *each(name, ["service", "method"], "expected a string", 1, [], {}, True),
    at("methodConfig[0].name[0].service", "required", {"methodConfig": [{"name": [{"method": "Get"}]}]}),
    at("methodConfig[0].name[1]", "duplicate name", {"methodConfig": [{"name": [{}, {"service": ""}]}]}),
    at("methodConfig[1].name[0]", "duplicate name", {"methodConfig": [{"name": [{"service": "a"}]}] * 2}),
    # methods
    *each(method, ["waitForReady"], "expected true or false", 1, "true", [], {}),
    *each(method, ["retryPolicy", "hedgingPolicy"], OBJECT, 1, "x", [], True),
    at(
        "methodConfig[0].hedgingPolicy",
        "not allowed together with retryPolicy",
        {"methodConfig": [{"retryPolicy": RETRY, "hedgingPolicy": HEDGE}]},
    ),
    *each(method, TIMEOUTS, DURATION, *WRONG_DURATIONS),
    *each(method, TIMEOUTS, "0 or more", "-1s"),
    *each(method, TIMEOUTS, TOO_SHORT, NANOSECOND, "0.000999999s"),
    *each(method, TIMEOUTS[1:], TOO_SHORT, "0s"),
    # retries
    *each(retry, RETRY, "required", None),
    *each(retry, ["maxAttempts"], NUMBER, *WRONG_NUMBERS),
    *each(retry, ["maxAttempts"], ATTEMPTS, 1, 0, -3, 2.5),
    *each(retry, BACKOFFS, DURATION, *WRONG_DURATIONS),
    *each(retry, BACKOFFS, TOO_SHORT, "0s", NANOSECOND),
    *each(retry, BACKOFFS, "0 or more", "-1s"),
    *each(retry, [RECEIVE_TIMEOUT], DURATION, *WRONG_DURATIONS),
    *each(retry, [RECEIVE_TIMEOUT], TOO_SHORT, "0s", NANOSECOND),
    *each(retry, [RECEIVE_TIMEOUT], "0 or more", "-1s"),
    *each(retry, ["backoffMultiplier"], NUMBER, *WRONG_NUMBERS),
    *each(retry, ["backoffMultiplier"], "above 0", 0, -1),
    *each(retry, ["retryableStatusCodes"], "at least one status code", []),
    *each(retry, ["retryableStatusCodes"], LIST, 14, "UNAVAILABLE", {}),
    # hedges
    *each(hedge, ["maxAttempts"], "required", None),
    *each(hedge, ["maxAttempts"], NUMBER, *WRONG_NUMBERS),
    *each(hedge, ["maxAttempts"], ATTEMPTS, 1, 0, -3, 2.5),
    *each(hedge, ["hedgingDelay"], DURATION, *WRONG_DURATIONS),
    *each(hedge, ["hedgingDelay"], "0 or more", "-1s"),
    *each(hedge, ["nonFatalStatusCodes"], LIST, 14, "UNAVAILABLE", {}),
    *each(hedge, ["delayPercentile"], NUMBER, *WRONG_NUMBERS),
    *each(hedge, ["delayPercentile"], "between 0 and 100", 0, 100, -5, 1e9),
    # throttle and budget
    *each(throttle, THROTTLE, "required", None),
    *each(throttle, THROTTLE, NUMBER, *WRONG_NUMBERS),
    *each(throttle, ["maxTokens"], "expected a whole number from 1 to 1000", 0, -1, 1001, 2.5),
    *each(throttle, ["tokenRatio"], "0.001 or more", 0, -1, 0.0009),
    *each(budget, ["ratio", "minPerSecond"], NUMBER, *WRONG_NUMBERS),
    *each(budget, ["ratio", "minPerSecond"], "0 or more", -0.1),
    # balancers
    *each(ewma, ["decayTime", "failurePenalty"], DURATION, *WRONG_DURATIONS),
    *each(ewma, ["decayTime", "failurePenalty"], TOO_SHORT, "0s", NANOSECOND),
    at("loadBalancingConfig[0]", OBJECT, {"loadBalancingConfig": ["round_robin"]}),
    at("loadBalancingConfig[0]", "one policy", {"loadBalancingConfig": [{}]}),
    at("loadBalancingConfig[0]", "one policy", {"loadBalancingConfig": [{"round_robin": {}, "peak_ewma": {}}]}),
    at("loadBalancingConfig[0].round_robin", OBJECT, {"loadBalancingConfig": [{"round_robin": 1}]}),
    at(
        "loadBalancingConfig",
        "no known policy; known: least_request, outlier_detection, peak_ewma, pick_first, priority, ",
        {"loadBalancingConfig": [{"grpclb": {}}]},
    ),
    at(
        "loadBalancingConfig[0].random_subsetting.childPolicy",
        "no known policy",
        policy_of("random_subsetting", {"subsetSize": 1, "childPolicy": [{"grpclb": {}}]}),
    ),
    at("loadBalancingConfig[0].random_subsetting.subsetSize", "required", policy_of("random_subsetting", {})),
    at(
        "loadBalancingConfig[0].ring_hash.maxRingSize",
        "at least minRingSize",
        policy_of("ring_hash", {"minRingSize": 20, "maxRingSize": 10}),
    ),
    at(
        "loadBalancingConfig[0].ring_hash.boundedLoadFactor",
        "1 or more",
        policy_of("ring_hash", {"boundedLoadFactor": 0.5}),
    ),
    at("loadBalancingConfig[0].ring_hash.minRingSize", "1 or more", policy_of("ring_hash", {"minRingSize": 0})),
    at("loadBalancingConfig[0].least_request.choiceCount", "whole", policy_of("least_request", {"choiceCount": 2.5})),
    at("loadBalancingConfig[0].priority.priorities", "required", policy_of("priority", {"children": {}})),
    at(
        "loadBalancingConfig[0].priority.priorities",
        "at least one",
        policy_of("priority", {"children": {}, "priorities": []}),
    ),
    at(
        "loadBalancingConfig[0].priority.children.a",
        "required",
        policy_of("priority", {"children": {}, "priorities": ["a"]}),
    ),
    at(
        "loadBalancingConfig[0].outlier_detection.maxEjectionPercent",
        "from 0 to 100",
        policy_of("outlier_detection", {"maxEjectionPercent": 101}),
    ),
    at(
        "loadBalancingConfig[0].weighted_round_robin.errorUtilizationPenalty",
        "0 or more",
        policy_of("weighted_round_robin", {"errorUtilizationPenalty": -1}),
    ),
    at("slowStart.window", "required", {"slowStart": {}}),
    at("zoneAwareness.minEndpoints", "1 or more", {"zoneAwareness": {"minEndpoints": 0}}),
    at("overload.maxOutstanding", "whole", {"overload": {"maxOutstanding": 2**33}}),
    at("overload.adaptiveThrottle.k", "1 or more", {"overload": {"adaptiveThrottle": {"k": 0.9}}}),
]

WRONG_CODES: list[object] = ["BROKEN", "", 17, -1, 14.5, NAN, HUGE, True, [], {}, None]
for wrong in WRONG_CODES:
    for config, path in (retry("retryableStatusCodes", ["OK", wrong]), hedge("nonFatalStatusCodes", ["OK", wrong])):
        REFUSED.append(((config, f"{path}[1]"), "expected a status code's name or number"))


@pytest.mark.parametrize(
    ("case", "why"), REFUSED, ids=lambda value: value[1][:60] if isinstance(value, tuple) else None
)
def test_what_is_wrong_is_refused_with_its_path(case: tuple[dict[str, Any], str], why: str) -> None:
    config, path = case
    with pytest.raises(ValueError, match="service config") as caught:
        parsed(config)
    text = str(caught.value)
    assert text.startswith(f"service config: {path}: ")
    assert why in text
    assert len(text) < 300


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "[" * 100_000, "1" * 5000, "\ud800"])
def test_what_is_not_json_is_refused(text: str) -> None:
    for read in (parse, for_core):
        with pytest.raises(ValueError, match=r"service config: (not JSON|the config|more than 64 )"):
            read(text)


@pytest.mark.parametrize("value", [[], "x", 1, None, True])
def test_what_is_not_an_object_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="service config: the config: expected an object, got "):
        parsed(value)


@pytest.mark.parametrize("value", [{}, 5, None])
def test_what_is_not_text_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="service config: not JSON"):
        parse(value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"methodConfig": [{"timeout": "1s", "timeout": "2s"}]}', "methodConfig[0].timeout: duplicate key"),
        ('{"x": {"a": 1, "b": 2, "b": 3}}', "x.b: duplicate key"),
        ('{"slowStart": null, "slowStart": {}}', "slowStart: duplicate key"),
        (r'{"healthCheckConfig": {"serviceName": "\ud800"}}', "healthCheckConfig.serviceName: not valid UTF-8 text"),
        (r'{"methodConfig": [{"name": [{"service": "\udfff"}]}]}', "methodConfig[0].name[0].service: not valid UTF-8"),
        (r'{"x": ["a", "\ud83d"]}', "x[1]: not valid UTF-8 text"),
        (r'{"x": {"\ud800": 1}}', "x: not valid UTF-8 text"),
        ('{"healthCheckConfig": {"serviceName": "\ud800"}}', "healthCheckConfig.serviceName: not valid UTF-8 text"),
        ('{"x": ' + "[" * 64 + "]" * 64 + "}", "more than 64 nested objects and lists"),
        ('{"x": "' + "y" * 256 * 1024 + '"}', "262153 bytes; the limit is 262144"),
        ('{"x": "' + "é" * 128 * 1024 + '"}', "262153 bytes; the limit is 262144"),
        (
            '{"retryThrottling": {"maxTokens": ' + "1" * 4301 + "}}",
            "retryThrottling.maxTokens: expected a number",
        ),
        ('{"retryBudget": {"ratio": "' + "1" * 41 + '"}}', "retryBudget.ratio: expected a number"),
    ],
    ids=lambda value: value[:40].encode("ascii", "backslashreplace").decode(),
)
def test_input_that_no_two_readers_read_alike_or_too_much_of_it_is_refused_with_its_path(text: str, why: str) -> None:
    for read in (parse, for_core):
        if why.startswith("retry") and read is for_core:  # gRPC core isn't given it
            continue
        with pytest.raises(ValueError, match=r"^service config: ") as caught:
            read(text)
        assert why in str(caught.value)
        assert len(str(caught.value)) < 300
        str(caught.value).encode()  # can be logged


def test_policies_inside_each_other_without_end_are_refused() -> None:
    policy: dict[str, Any] = {"round_robin": {}}
    for _ in range(200):
        policy = {"random_subsetting": {"subsetSize": 1, "childPolicy": [policy]}}
    with pytest.raises(ValueError, match="more than 64 nested objects and lists"):
        parsed({"loadBalancingConfig": [policy]})


def test_text_beyond_ascii_is_text() -> None:
    health = r'{"healthCheckConfig": {"serviceName": "\u00e9\ud83d\ude00é"}}'
    assert parse(health).health_service == "é😀é"


@pytest.mark.parametrize(
    ("policy", "key"),
    [
        *(("outlier_detection", key) for key in ("interval", "baseEjectionTime", "maxEjectionTime")),
        ("weighted_round_robin", "oobReportingPeriod"),
    ],
)
def test_periods_of_a_nanosecond_are_refused(policy: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"loadBalancingConfig\[0\].{policy}.{key}: {TOO_OFTEN}, got "):
        parsed(policy_of(policy, {key: NANOSECOND}))


# -- which policy a method gets


@pytest.mark.parametrize(
    ("path", "timeout"),
    [
        ("/a.B/Get", 1.0),
        ("a.B/Get", 1.0),
        ("/a.B/List", 2.0),
        ("/a.C/Get", 3.0),
        ("/Get", 3.0),
        ("", 3.0),
    ],
)
def test_the_most_specific_name_wins(path: str, timeout: float) -> None:
    config = parsed(
        {
            "methodConfig": [
                {"name": [{}], "timeout": "3s"},
                {"name": [{"service": "a.B"}], "timeout": "2s"},
                {"name": [{"service": "a.B", "method": "Get"}], "timeout": "1s"},
            ]
        }
    )
    assert config.method(path, Idempotency.UNKNOWN).timeout == timeout


def test_a_method_that_no_name_matches_gets_the_defaults() -> None:
    config = parsed({"methodConfig": [{"name": [{"service": "a.B", "method": "Get"}], "timeout": "1s"}]})
    assert config.method("/a.B/List", Idempotency.UNKNOWN) == MethodPolicy(
        retry=RetryPolicy(1, retryable_codes=frozenset())
    )


THREE = RetryPolicy(3, 0.025, 0.25, 2.0, frozenset({Code.UNAVAILABLE}))
NONE = RetryPolicy(1, retryable_codes=frozenset())


@pytest.mark.parametrize(
    ("idempotency", "retry"),
    [(Idempotency.UNKNOWN, NONE), (Idempotency.IDEMPOTENT, THREE), (Idempotency.NO_SIDE_EFFECTS, THREE)],
)
def test_the_descriptor_says_what_may_be_retried_unless_the_config_does(
    idempotency: Idempotency, retry: RetryPolicy
) -> None:
    assert ServiceConfig().method("/a.B/Get", idempotency).retry == retry
    timed = parsed({"methodConfig": [{"name": [{}], "timeout": "1s"}]})
    assert timed.method("/a.B/Get", idempotency) == MethodPolicy(timeout=1.0, retry=retry)
    four: dict[str, Any] = {**RETRY, "maxAttempts": 4}
    given = parsed({"methodConfig": [{"name": [{}], "retryPolicy": four}]})
    policy = given.method("/a.B/Get", idempotency)
    assert policy.retry is not None
    assert (policy.retry.max_attempts, policy.hedge) == (4, NEVER_HEDGE)


@pytest.mark.parametrize("idempotency", list(Idempotency))
def test_a_method_that_hedges_does_not_retry(idempotency: Idempotency) -> None:
    config = parsed({"methodConfig": [{"name": [{}], "hedgingPolicy": HEDGE}]})
    policy = config.method("/a.B/Get", idempotency)
    assert (policy.retry, policy.hedge.max_attempts) == (NONE, 3)


# -- the proto that documents it


def keys_read(config: dict[str, Any], *path: str | int) -> set[str]:
    """The keys that the reader knows of the object at ``path``, as its warning about another one lists them."""
    config = json.loads(json.dumps(config))
    place: Any = config
    for step in path:
        place = place[step]
    place["qqqq"] = 1
    (listed,) = [found[1] for text in parsed(config).warnings if (found := re.search(r"qqqq: .*; known: (.*)", text))]
    return set(listed.split(", "))


def keys_of(message: Descriptor) -> set[str]:
    return {field.json_name for field in message.fields}


def test_the_proto_and_the_reader_know_the_same_keys() -> None:
    outliers = ("loadBalancingConfig", 0, "outlier_detection_experimental")
    priority = (*outliers, "childPolicy", 0, "priority_experimental")
    near, far, last = ((*priority, "children", name) for name in ("near", "far", "last"))
    subsetting = (*near, "config", 0, "random_subsetting_experimental")
    ewma = (*subsetting, "childPolicy", 0, "peak_ewma")
    least = policy_of("least_request", LEAST)
    places: dict[str, tuple[str | int, ...]] = {
        "ServiceConfig": (),
        "MethodConfig": ("methodConfig", 0),
        "Name": ("methodConfig", 0, "name", 0),
        "RetryPolicy": ("methodConfig", 0, "retryPolicy"),
        "HedgingPolicy": ("methodConfig", 1, "hedgingPolicy"),
        "RetryThrottling": ("retryThrottling",),
        "HealthCheckConfig": ("healthCheckConfig",),
        "RetryBudget": ("retryBudget",),
        "PeakEwma": ewma,
        "PickFirst": (*last, "config", 0, "pick_first"),
        "LoadReports": (*ewma, "loadReports"),
        "RingHash": (*far, "config", 0, "ring_hash"),
        "RandomSubsetting": subsetting,
        "Priority": priority,
        "PriorityChild": near,
        "OutlierDetection": outliers,
        "SuccessRateEjection": (*outliers, "successRateEjection"),
        "FailurePercentageEjection": (*outliers, "failurePercentageEjection"),
        "SlowStart": ("slowStart",),
        "ZoneAwareness": ("zoneAwareness",),
        "Overload": ("overload",),
        "AdaptiveThrottle": ("overload", "adaptiveThrottle"),
    }
    read = {name: keys_read(FULL, *path) for name, path in places.items()}
    read["LeastRequest"] = keys_read(least, "loadBalancingConfig", 0, "least_request")
    messages = service_config_pb2.DESCRIPTOR.message_types_by_name
    assert read == {name: keys_of(messages[name]) for name in read}
    # A balancer's name is itself the key.
    assert set(messages) - set(read) == {"LoadBalancingConfig", "RoundRobin"}
    needed: dict[str, dict[str, Any]] = {
        "random_subsetting": {"subsetSize": 3},
        "priority": {"children": {"a": {"config": [{"round_robin": {}}]}}, "priorities": ["a"]},
    }
    for balancer in keys_of(messages["LoadBalancingConfig"]):
        for suffix in ("", "_experimental"):
            assert parsed(policy_of(balancer + suffix, needed.get(balancer, {}))).balancer is not None
