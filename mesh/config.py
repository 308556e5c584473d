"""The service config: gRPC's own JSON and the mesh's further keys, parsed into frozen, validated policy settings.

``protos/weft/mesh/v1/service_config.proto`` defines every key. A config is taken whole or not at all: the first thing
wrong raises ``ValueError`` with the path of the field. Keys that aren't known are ignored, as gRPC does (a newer
config must not stop an older client). Spans are seconds; math.inf stands for "no limit".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from mesh.model import Code, Idempotency

T = TypeVar("T")

MAX_ATTEMPTS = 5  # "Clients MUST treat values greater than 5 as 5" - A6


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try a call again (A6). ``max_attempts`` counts the first one; 1 means never."""

    max_attempts: int
    initial_backoff: float = 0.025
    max_backoff: float = 0.25
    multiplier: float = 2.0
    codes: frozenset[int] = frozenset({Code.UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class HedgingPolicy:
    """When to send a second attempt beside a running one (A6). ``max_attempts`` counts the first one; 1 means never.

    ``percentile``, when not 0, is the share of the method's latencies to wait out (0 < p < 100); ``delay`` holds
    until enough of them have been seen.
    """

    max_attempts: int
    delay: float = 0.0
    non_fatal: frozenset[int] = frozenset()
    percentile: float = 0.0


NEVER_RETRY = RetryPolicy(1, codes=frozenset())
NEVER_HEDGE = HedgingPolicy(1)

# What a method may have without a config, by its descriptor; 25 ms and 250 ms are A44's.
DEFAULT_RETRY = {
    Idempotency.UNKNOWN: NEVER_RETRY,
    Idempotency.IDEMPOTENT: RetryPolicy(3),
    Idempotency.NO_SIDE_EFFECTS: RetryPolicy(3),
}


@dataclass(frozen=True, slots=True)
class MethodPolicy:
    """What holds for the calls of one method.

    ``timeout`` caps a call's own; ``default_timeout`` is for calls that bring none; ``attempt_timeout`` is for one
    attempt. ``wait_for_ready`` None: as the call says, else false. ``retry`` None: what the method's descriptor
    allows.
    """

    timeout: float = math.inf
    default_timeout: float = math.inf
    attempt_timeout: float = math.inf
    wait_for_ready: bool | None = None
    retry: RetryPolicy | None = None
    hedge: HedgingPolicy = NEVER_HEDGE


@dataclass(frozen=True, slots=True)
class BalancerConfig:
    """Which balancing policy, with its settings."""

    name: str = "peak_ewma"
    decay_time: float = 10.0
    failure_penalty: float = 5.0


@dataclass(frozen=True, slots=True)
class BudgetConfig:
    """How many retries and hedges there may be beside the calls: a share of them, and a number each second."""

    ratio: float = 0.1
    min_per_second: float = 10.0


@dataclass(frozen=True, slots=True)
class ThrottleConfig:
    """A6's retry throttling: at most ``max_tokens``, ``token_ratio`` back for each success."""

    max_tokens: float
    token_ratio: float


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """A whole service config. ``health_service`` None: endpoints' health isn't watched."""

    methods: Mapping[tuple[str, str], MethodPolicy] = field(default_factory=dict)
    balancer: BalancerConfig | None = None
    budget: BudgetConfig = BudgetConfig()
    throttle: ThrottleConfig | None = None
    health_service: str | None = None

    def method(self, path: str, idempotency: Idempotency) -> MethodPolicy:
        """The policy of ``/package.Service/Method``: the most specific name wins, and the descriptor fills what it
        leaves."""
        service, _, name = path.removeprefix("/").rpartition("/")
        found = self.methods
        policy = found.get((service, name)) or found.get((service, "")) or found.get(("", "")) or MethodPolicy()
        if policy.retry is not None:
            return policy
        hedged = policy.hedge.max_attempts > 1
        return replace(policy, retry=NEVER_RETRY if hedged else DEFAULT_RETRY[idempotency])


def parse(text: str, *, balanced_by_core: bool = False) -> ServiceConfig:
    """Parse a service config's JSON. ``balanced_by_core``: the balancing policy is for gRPC core to read.

    Raises:
        ValueError: names the path of what is wrong, "service config: methodConfig[0].timeout: ...".
    """
    root = _read(text)
    health = root.get("healthCheckConfig", _Field.object)
    return ServiceConfig(
        methods=_methods(root),
        balancer=None if balanced_by_core else _balancer(root),
        budget=_budget(root.get("retryBudget", _Field.object)),
        throttle=_throttle(root.get("retryThrottling", _Field.object)),
        health_service=None if health is None else health.get("serviceName", _Field.string),
    )


def for_core(text: str) -> str:
    """What of a service config is left to gRPC core, where core resolves and balances: all but calls' retries and
    timeouts, which are the mesh's."""
    ours = ("methodConfig", "retryThrottling", "retryBudget")
    return json.dumps({key: value for key, value in _read(text).items.items() if key not in ours})


def _read(text: str) -> _Object:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"service config: not JSON: {error}") from None
    return _Field("", value).object()


# -- reading JSON with the path at hand

_DURATION = re.compile(r"-?[0-9]{1,12}(\.[0-9]{1,9})?s")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")


class _Field:
    """A JSON value and where it stands. Each reader returns the value as asked for, or fails with the path."""

    __slots__ = ("path", "value")

    def __init__(self, path: str, value: object) -> None:
        self.path = path
        self.value = value

    def fail(self, why: str) -> ValueError:
        return ValueError(f"service config: {self.path or 'the whole'}: {why}, got {_short(self.value)}")

    def object(self) -> _Object:
        if not isinstance(self.value, dict):
            raise self.fail("expected an object")
        return _Object(self.path, self.value)

    def list(self) -> list[_Field]:
        if not isinstance(self.value, list):
            raise self.fail("expected a list")
        return [_Field(f"{self.path}[{index}]", item) for index, item in enumerate(self.value)]

    def string(self) -> str:
        if not isinstance(self.value, str):
            raise self.fail("expected a string")
        return self.value

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.fail("expected true or false")
        return self.value

    def number(self) -> float:
        # JSON as Python reads it also has NaN and Infinity; proto3 JSON lets numbers be strings.
        value = self.value
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(_as_float(value)):
            raise self.fail("expected a number")
        return float(value)

    def positive(self) -> float:
        number = self.number()
        if number <= 0:
            raise self.fail("expected a number above 0")
        return number

    def not_negative(self) -> float:
        number = self.number()
        if number < 0:
            raise self.fail("expected a number of 0 or more")
        return number

    def attempts(self) -> int:
        number = self.number()
        if number < 2 or not number.is_integer():
            raise self.fail("expected a whole number of 2 or more")
        return int(min(number, MAX_ATTEMPTS))

    def tokens(self) -> float:
        number = self.number()
        if not 1 <= number <= 1000 or not number.is_integer():
            raise self.fail("expected a whole number from 1 to 1000")
        return number

    def token_ratio(self) -> float:
        # "if token_ratio is specified with more than three decimals, the rest is ignored" - A6. Rounded first, or
        # 1.001 × 1000 would be a little less than 1001.
        ratio = math.floor(round(min(self.number(), 1000.0) * 1000, 6)) / 1000
        if ratio <= 0:
            raise self.fail("expected a number of 0.001 or more")
        return ratio

    def duration(self) -> float:
        if not isinstance(self.value, str) or not _DURATION.fullmatch(self.value):
            raise self.fail('expected a duration such as "1.5s"')
        seconds = float(self.value[:-1])
        if seconds < 0:
            raise self.fail("expected a duration of 0 or more")
        return seconds

    def positive_duration(self) -> float:
        seconds = self.duration()
        if seconds == 0:
            raise self.fail("expected a duration above 0")
        return seconds

    def percentile(self) -> float:
        number = self.number()
        if not 0 < number < 100:
            raise self.fail("expected a number between 0 and 100, both exclusive")
        return number

    def codes(self) -> frozenset[int]:
        return frozenset(item.code() for item in self.list())

    def code(self) -> int:
        """A status code by name, in any case, or by number."""
        value = self.value
        if isinstance(value, str) and value.upper() in Code.__members__:
            return Code[value.upper()]
        if isinstance(value, int | float) and not isinstance(value, bool) and value in Code.__members__.values():
            return Code(int(value))
        raise self.fail("expected a status code's name or number")


class _Object:
    """A JSON object and where it stands."""

    __slots__ = ("items", "path")

    def __init__(self, path: str, items: dict[str, object]) -> None:
        self.path = path
        self.items = items

    def field(self, key: str) -> _Field:
        return _Field(f"{self.path}.{key}" if self.path else key, self.items.get(key))

    def get(self, key: str, read: Callable[[_Field], T]) -> T | None:
        return None if self.items.get(key) is None else read(self.field(key))

    def get_or(self, key: str, read: Callable[[_Field], T], default: T) -> T:
        return default if self.items.get(key) is None else read(self.field(key))

    def list(self, key: str) -> list[_Field]:
        return self.get(key, _Field.list) or []

    def need(self, key: str, read: Callable[[_Field], T]) -> T:
        if self.items.get(key) is None:
            raise self.field(key).fail("required")
        return read(self.field(key))


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond a float's range
        return math.inf


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- the parts of a config


def _methods(root: _Object) -> dict[tuple[str, str], MethodPolicy]:
    methods: dict[tuple[str, str], MethodPolicy] = {}
    for item in root.list("methodConfig"):
        config = item.object()
        policy = _method(config)
        for name_field in config.list("name"):
            name = name_field.object()
            key = name.get_or("service", _Field.string, ""), name.get_or("method", _Field.string, "")
            if key[1] and not key[0]:
                raise name.field("service").fail("required beside a method")
            if key in methods:
                raise name_field.fail("named twice")
            methods[key] = policy
    return methods


def _method(config: _Object) -> MethodPolicy:
    retry = config.get("retryPolicy", _retry)
    hedge = config.get("hedgingPolicy", _hedge)
    if retry and hedge:
        raise config.field("hedgingPolicy").fail("excludes retryPolicy")
    return MethodPolicy(
        timeout=config.get_or("timeout", _Field.duration, math.inf),
        default_timeout=config.get_or("defaultTimeout", _Field.duration, math.inf),
        attempt_timeout=config.get_or("attemptTimeout", _Field.positive_duration, math.inf),
        wait_for_ready=config.get("waitForReady", _Field.boolean),
        retry=retry,
        hedge=hedge or NEVER_HEDGE,
    )


def _retry(field: _Field) -> RetryPolicy:
    retry = field.object()
    codes = retry.need("retryableStatusCodes", _Field.codes)
    if not codes:
        raise retry.field("retryableStatusCodes").fail("expected at least one status code")
    return RetryPolicy(
        max_attempts=retry.need("maxAttempts", _Field.attempts),
        initial_backoff=retry.need("initialBackoff", _Field.positive_duration),
        max_backoff=retry.need("maxBackoff", _Field.positive_duration),
        multiplier=retry.need("backoffMultiplier", _Field.positive),
        codes=codes,
    )


def _hedge(field: _Field) -> HedgingPolicy:
    hedge = field.object()
    return HedgingPolicy(
        max_attempts=hedge.need("maxAttempts", _Field.attempts),
        delay=hedge.get_or("hedgingDelay", _Field.duration, 0.0),
        non_fatal=hedge.get_or("nonFatalStatusCodes", _Field.codes, frozenset()),
        percentile=hedge.get_or("delayPercentile", _Field.percentile, 0.0),
    )


def _balancer(root: _Object) -> BalancerConfig | None:
    entries = root.list("loadBalancingConfig")
    for entry in entries:
        policies = entry.object()
        if len(policies.items) != 1:
            raise entry.fail("expected one policy's name with its settings")
        (name,) = policies.items
        settings = policies.field(name).object()
        if name == "round_robin":
            return BalancerConfig(name)
        if name == "peak_ewma":
            return BalancerConfig(
                name,
                decay_time=settings.get_or("decayTime", _Field.positive_duration, 10.0),
                failure_penalty=settings.get_or("failurePenalty", _Field.positive_duration, 5.0),
            )
    if entries:
        raise root.field("loadBalancingConfig").fail("none of these policies is known; known: round_robin, peak_ewma")
    return None


def _budget(budget: _Object | None) -> BudgetConfig:
    if budget is None:
        return BudgetConfig()
    return BudgetConfig(
        ratio=budget.get_or("ratio", _Field.not_negative, BudgetConfig().ratio),
        min_per_second=budget.get_or("minPerSecond", _Field.not_negative, BudgetConfig().min_per_second),
    )


def _throttle(throttle: _Object | None) -> ThrottleConfig | None:
    if throttle is None:
        return None
    return ThrottleConfig(
        max_tokens=throttle.need("maxTokens", _Field.tokens),
        token_ratio=throttle.need("tokenRatio", _Field.token_ratio),
    )
