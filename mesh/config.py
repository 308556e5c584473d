"""The service config: gRPC's own JSON and the mesh's further keys, parsed into frozen, validated policy settings.

``protos/weft/mesh/v1/service_config.proto`` defines every key. A config is taken whole or not at all: the first thing
wrong raises ``ValueError`` with the path of the field. Keys that aren't known are ignored, as gRPC does (a newer
config must not stop an older client), and named in ``ServiceConfig.warnings``. Spans are seconds; math.inf stands for
"no limit".
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from mesh.model import Code, Idempotency

T = TypeVar("T")

MAX_ATTEMPTS = 5
"""Attempts of a call. "Clients MUST treat values greater than 5 as 5" - A6."""

MAX_SIZE = 256 * 1024
"""The JSON of a service config, in UTF-8. Each channel reads it on the thread that its calls need."""

MAX_DEPTH = 64
"""Objects and lists inside each other in a service config."""

MIN_TIMEOUT = 0.001
"""Timeouts and backoffs in a service config. Shorter ones are slips of the unit: every call would fail, or be retried
without a pause."""

MIN_PERIOD = 0.01
"""Periods in a service config: between reports, between comparisons of endpoints."""

MAX_NUMBER = 40
"""Characters of a number that a service config writes as a string."""

MAX_RING = 4096
"""Points on a hash ring. "A cap on the ring size", gRPC's own - A42."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try a call again (A6). ``max_attempts`` counts the first one; 1 means never. ``receive_timeout`` is for
    each attempt's response."""

    max_attempts: int
    initial_backoff: float = 0.025
    max_backoff: float = 0.25
    multiplier: float = 2.0
    codes: frozenset[int] = frozenset({Code.UNAVAILABLE})
    receive_timeout: float = math.inf


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
    attempt, ``receive_timeout`` for what comes before the first response of a stream. ``wait_for_ready`` None: as the
    call says, else false. ``retry`` None: what the method's descriptor allows.
    """

    timeout: float = math.inf
    default_timeout: float = math.inf
    attempt_timeout: float = math.inf
    receive_timeout: float = math.inf
    wait_for_ready: bool | None = None
    retry: RetryPolicy | None = None
    hedge: HedgingPolicy = NEVER_HEDGE


@dataclass(frozen=True, slots=True)
class ReportsConfig:
    """How endpoints' load reports become weights (A58). ``enabled``: whether they are read at all.

    ``out_of_band`` is the seconds between the reports that are asked of ORCA's service; 0: they come with the answers.
    """

    enabled: bool = False
    out_of_band: float = 0.0
    blackout: float = 10.0
    expiration: float = 180.0
    update_period: float = 1.0
    error_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class BalancerConfig:
    """Which balancing policy, with its settings; those of the other policies mean nothing.

    ``decay_time``, ``failure_penalty`` and ``starvation`` (seconds without an answer after which an idle endpoint is
    tried) are peak_ewma's, ``starvation`` and ``choices`` least_request's, the ring's and ``load_factor`` (0: not
    bounded) ring_hash's. ``subset``: how many endpoints a client uses; 0: all. ``levels``: the policies of the
    endpoints' priorities, in their order; none: this one for all.
    """

    name: str = "peak_ewma"
    decay_time: float = 1.0
    failure_penalty: float = 5.0
    starvation: float = 10.0
    choices: int = 2
    reports: ReportsConfig = ReportsConfig()
    hash_header: str = ""
    min_ring: int = 1024
    max_ring: int = 4096
    load_factor: float = 0.0
    shuffle: bool = False
    subset: int = 100
    levels: tuple[BalancerConfig, ...] = ()


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
class EjectionConfig:
    """When an endpoint is left out for how it answers (A50), and for how long (seconds).

    ``consecutive``: failures of any kind in a row; ``gateway``: UNAVAILABLE or DEADLINE_EXCEEDED in a row;
    ``timeouts``: DEADLINE_EXCEEDED in a row; 0 turns each off. ``panic``: below this percentage of ready endpoints that
    aren't ejected, ejections are ignored. ``dry_run``: count what would be ejected, and eject nothing.
    """

    interval: float = 10.0
    base_time: float = 30.0
    max_time: float = 300.0
    max_percent: float = 10.0
    success_rate: SuccessRateConfig | None = SuccessRateConfig()
    failure_percentage: FailurePercentageConfig | None = FailurePercentageConfig()
    consecutive: int = 5
    gateway: int = 0
    timeouts: int = 3
    panic: float = 50.0
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class SlowStartConfig:
    """How an endpoint's weight grows once it is ready: max(``least``, (age / ``window``) ^ (1 / ``aggression``)).
    A ``window`` of 0 is no slow start."""

    window: float = 0.0
    aggression: float = 1.0
    least: float = 0.1


@dataclass(frozen=True, slots=True)
class ZoneConfig:
    """When calls stay in the client's own zone: ``enabled``, with at least ``min_cluster`` endpoints in all, and
    ``min_endpoints`` of the zone's own to be called."""

    enabled: bool = False
    min_cluster: int = 6
    min_endpoints: int = 2


@dataclass(frozen=True, slots=True)
class AdaptiveConfig:
    """Google SRE's adaptive throttle: refuse with p = (requests - ``k`` × accepts) / (requests + 1), over ``window``
    seconds, and never more than ``max_refused`` of calls."""

    k: float = 2.0
    window: float = 120.0
    max_refused: float = 0.9


@dataclass(frozen=True, slots=True)
class OverloadConfig:
    """What a client refuses to send: calls beyond ``max_outstanding`` (A32), and by the adaptive throttle.
    ``dry_run``: count what would be refused, and refuse nothing."""

    max_outstanding: float = math.inf
    adaptive: AdaptiveConfig | None = None
    dry_run: bool = False


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
    """A whole service config. ``health_service`` None: endpoints' health isn't watched. ``warnings``: the keys that
    were ignored because nobody knows them, each with its path."""

    methods: Mapping[tuple[str, str], MethodPolicy] = field(default_factory=dict)
    balancer: BalancerConfig | None = None
    budget: BudgetConfig = BudgetConfig()
    throttle: ThrottleConfig | None = None
    health_service: str | None = None
    ejection: EjectionConfig = EjectionConfig()
    slow_start: SlowStartConfig = SlowStartConfig()
    zone: ZoneConfig = ZoneConfig()
    overload: OverloadConfig = OverloadConfig()
    warnings: tuple[str, ...] = field(default=(), compare=False)

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
    if balanced_by_core:
        root.known.update(("loadBalancingConfig", "loadBalancingPolicy"))
    balancer, ejection = (None, None) if balanced_by_core else _balancer(root)
    return ServiceConfig(
        methods=_methods(root),
        balancer=balancer,
        budget=_budget(root.get("retryBudget", _Field.object)),
        throttle=_throttle(root.get("retryThrottling", _Field.object)),
        health_service=None if health is None else health.get("serviceName", _Field.string),
        ejection=ejection or EjectionConfig(),
        slow_start=root.get_or("slowStart", _slow_start, SlowStartConfig()),
        zone=root.get_or("zoneAwareness", _zone, ZoneConfig()),
        overload=root.get_or("overload", _overload, OverloadConfig()),
        warnings=root.read.warnings(),  # last: by now every part has asked for its keys
    )


def for_core(text: str) -> str:
    """What of a service config is left to gRPC core, where core resolves and balances: all but calls' retries and
    timeouts, which are the mesh's."""
    ours = ("methodConfig", "retryThrottling", "retryBudget", "slowStart", "zoneAwareness", "overload")
    return json.dumps({key: value for key, value in _read(text).items.items() if key not in ours})


def _read(text: str) -> _Object:
    if not isinstance(text, str):
        raise ValueError(f"service config: not JSON: expected text, got {type(text).__name__}")
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_SIZE:
        raise ValueError(f"service config: {size} bytes; the limit is {MAX_SIZE}")
    try:
        value = read_json(text)
    except ValueError as error:
        raise ValueError(f"service config: {error}") from None
    return _Field("", value, _Read()).object()


class _Repeating(dict[str, object]):
    """An object of which JSON has one key more than once: ``repeated``."""

    repeated = ""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    items = dict(pairs)
    if len(items) == len(pairs):
        return items
    found = _Repeating(items)
    seen: set[str] = set()
    found.repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return found


def _whole(text: str) -> float:
    return int(text) if len(text) <= MAX_NUMBER else float(text)


def read_json(text: str) -> object:
    """JSON's value, without what different readers read differently: keys given twice, and text that isn't UTF-8.

    Raises:
        ValueError: says what is wrong, and the path of it: "methodConfig[0].timeout: given twice".
    """
    try:
        root: object = json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} objects and lists inside each other") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    _check(root, None)
    level: list[tuple[object, _Link]] = [(root, None)]
    for _ in range(MAX_DEPTH):
        below: list[tuple[object, _Link]] = []
        for value, link in level:
            if isinstance(value, _Repeating):
                raise ValueError(f"{_path((link, value.repeated))}: given twice")
            if isinstance(value, dict):
                for key in value:
                    _check(key, link)
            for key, item in value.items() if isinstance(value, dict) else enumerate(_list(value)):
                if isinstance(item, str):
                    _check(item, (link, key))
                elif isinstance(item, dict | list):
                    below.append((item, (link, key)))
        if not below:
            return root
        level = below
    raise ValueError(f"{_path(level[0][1])[:200]}: more than {MAX_DEPTH} objects and lists inside each other")


_Link = tuple[Any, str | int] | None
"""Where a value stands: its parent's link, and its key there. Paths are made of it only where they are needed."""


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _check(value: object, link: _Link) -> None:
    """Raise ValueError when ``value`` is text that UTF-8 can't express."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{_path(link)}: not valid UTF-8 text, got {_short(value)}") from None


def _path(link: _Link) -> str:
    keys: list[str] = []
    while link is not None:
        link, key = link
        keys.append(f"[{key}]" if isinstance(key, int) else f".{_key(key)}")
    return "".join(reversed(keys)).lstrip(".") or "the whole"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """ "; did you mean 'x'?" for a name that is likely a slip of ``known``'s x; else empty. ``cutoff``: how much they
    must be alike, as ``difflib`` counts it."""
    by_lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name[:100].lower(), by_lower, n=1, cutoff=cutoff)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""


# -- reading JSON with the path at hand

_DURATION = re.compile(r"-?[0-9]{1,12}(\.[0-9]{1,9})?s")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")


MAX_WARNINGS = 20
"""Warnings about unknown keys and names in one service config."""


class _Read:
    """The objects of a config and the keys that the parser asked for: the others are unknown."""

    def __init__(self) -> None:
        self.objects: dict[str, _Object] = {}  # by path
        self.policies: list[str] = []

    def warnings(self) -> tuple[str, ...]:
        unknown = [(each, key) for each in self.objects.values() for key in each.items if key not in each.known]
        more = len(unknown) + len(self.policies) - MAX_WARNINGS
        found = [
            f"{each.path}.{_key(key)}".lstrip(".") + f": unknown key, ignored{_hint(key, each.known)}"
            for each, key in unknown[:MAX_WARNINGS]  # what is meant takes a while to find
        ]
        found = [*found, *self.policies][:MAX_WARNINGS]
        return (*found, f"{more} more") if more > 0 else tuple(found)


def _hint(key: str, known: Iterable[str]) -> str:
    return nearest(key, known) or f"; known: {', '.join(sorted(known)) or 'none'}"


def _key(key: str) -> str:
    return key if key.isidentifier() and len(key) <= 60 else _short(key)


class _Field:
    """A JSON value and where it stands. Each reader returns the value as asked for, or fails with the path."""

    __slots__ = ("path", "read", "value")

    def __init__(self, path: str, value: object, read: _Read) -> None:
        self.path = path
        self.value = value
        self.read = read

    def fail(self, why: str) -> ValueError:
        return ValueError(f"service config: {self.path or 'the whole'}: {why}, got {_short(self.value)}")

    def object(self) -> _Object:
        if not isinstance(self.value, dict):
            raise self.fail("expected an object")
        return self.read.objects.setdefault(self.path, _Object(self.path, self.value, self.read))

    def list(self) -> list[_Field]:
        if not isinstance(self.value, list):
            raise self.fail("expected a list")
        return [_Field(f"{self.path}[{index}]", item, self.read) for index, item in enumerate(self.value)]

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
        if isinstance(value, str) and len(value) <= MAX_NUMBER and _NUMBER.fullmatch(value):
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

    def timeout(self) -> float:
        return self._at_least(MIN_TIMEOUT)

    def timeout_or_none(self) -> float:
        """A timeout, of which 0 is none at all, as in core."""
        return self.timeout() if self.duration() else math.inf

    def period(self) -> float:
        return self._at_least(MIN_PERIOD)

    def _at_least(self, least: float) -> float:
        seconds = self.duration()
        if seconds < least:
            raise self.fail(f"expected a duration of {least:g}s or more")
        return seconds

    def whole(self) -> int:
        number = self.not_negative()
        if not number.is_integer() or number > 2**32:
            raise self.fail("expected a whole number of 0 or more")
        return int(number)

    def positive_whole(self) -> int:
        number = self.whole()
        if number < 1:
            raise self.fail("expected a whole number of 1 or more")
        return number

    def percentage(self) -> float:
        number = self.number()
        if not 0 <= number <= 100:
            raise self.fail("expected a number from 0 to 100")
        return number

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
    """A JSON object and where it stands. ``known``: the keys that were asked for."""

    __slots__ = ("items", "known", "path", "read")

    def __init__(self, path: str, items: dict[str, object], read: _Read) -> None:
        self.path = path
        self.items = items
        self.read = read
        self.known: set[str] = set()

    def field(self, key: str) -> _Field:
        self.known.add(key)
        return _Field(f"{self.path}.{key}" if self.path else key, self.items.get(key), self.read)

    def get(self, key: str, read: Callable[[_Field], T]) -> T | None:
        field = self.field(key)
        return None if field.value is None else read(field)

    def get_or(self, key: str, read: Callable[[_Field], T], default: T) -> T:
        field = self.field(key)
        return default if field.value is None else read(field)

    def list(self, key: str) -> list[_Field]:
        return self.get(key, _Field.list) or []

    def need(self, key: str, read: Callable[[_Field], T]) -> T:
        field = self.field(key)
        if field.value is None:
            raise field.fail("required")
        return read(field)


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
        timeout=config.get_or("timeout", _Field.timeout_or_none, math.inf),
        default_timeout=config.get_or("defaultTimeout", _Field.timeout, math.inf),
        attempt_timeout=config.get_or("attemptTimeout", _Field.timeout, math.inf),
        wait_for_ready=config.get("waitForReady", _Field.boolean),
        retry=retry,
        hedge=hedge or NEVER_HEDGE,
    )


def _retry(field: _Field) -> RetryPolicy:
    retry = field.object()
    receive_timeout = retry.get_or("perAttemptRecvTimeout", _Field.timeout, math.inf)
    if receive_timeout < math.inf:  # then a timeout is reason enough, as in core
        codes: frozenset[int] = retry.get_or("retryableStatusCodes", _Field.codes, frozenset())
    else:
        codes = retry.need("retryableStatusCodes", _Field.codes)
        if not codes:
            raise retry.field("retryableStatusCodes").fail("expected at least one status code")
    return RetryPolicy(
        receive_timeout=receive_timeout,
        max_attempts=retry.need("maxAttempts", _Field.attempts),
        initial_backoff=retry.need("initialBackoff", _Field.timeout),
        max_backoff=retry.need("maxBackoff", _Field.timeout),
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


_Balancing = tuple[BalancerConfig, EjectionConfig | None]
"""A balancing policy, and the outlier detection around it if there is one."""


def _balancer(root: _Object) -> tuple[BalancerConfig | None, EjectionConfig | None]:
    return _policy(root, "loadBalancingConfig") if root.list("loadBalancingConfig") else (None, None)


def _policy(parent: _Object, key: str) -> _Balancing:
    """The first policy of a list that is known (A24). Names may end in gRPC's "_experimental"."""
    for entry in parent.list(key):
        policies = entry.object()
        if len(policies.items) != 1:
            raise entry.fail("expected one policy's name with its settings")
        (name,) = policies.items
        settings = policies.field(name)
        read = _POLICIES.get(name.removesuffix("_experimental"))
        if read is not None:
            return read(settings.object())
        # Other clients' policies may stand in the list (A24): only what looks like one of ours is a slip.
        if len(parent.read.policies) < MAX_WARNINGS and (hint := nearest(name, _POLICIES)):
            parent.read.policies.append(f"{entry.path}: unknown policy {_key(name)}, skipped{hint}")
    known = ", ".join(sorted(_POLICIES))
    raise parent.field(key).fail(f"none of these policies is known; known: {known}")


def _child(settings: _Object) -> _Balancing:
    """The policy below one that takes another's endpoints from it; peak_ewma when it names none."""
    return _policy(settings, "childPolicy") if settings.list("childPolicy") else (BalancerConfig(), None)


def _pick_first(settings: _Object) -> _Balancing:
    return BalancerConfig("pick_first", shuffle=settings.get_or("shuffleAddressList", _Field.boolean, False)), None


def _round_robin(_: _Object) -> _Balancing:
    return BalancerConfig("round_robin"), None


def _weighted_round_robin(settings: _Object) -> _Balancing:
    return BalancerConfig("weighted_round_robin", reports=_reports(settings)), None


def _least_request(settings: _Object) -> _Balancing:
    return BalancerConfig(
        "least_request",
        starvation=math.inf,
        choices=min(10, max(2, settings.get_or("choiceCount", _Field.whole, 2))),  # "2..10, more are 10" - A48
        reports=settings.get_or("loadReports", lambda field: _reports(field.object()), ReportsConfig()),
    ), None


def _peak_ewma(settings: _Object) -> _Balancing:
    return BalancerConfig(
        "peak_ewma",
        decay_time=settings.get_or("decayTime", _Field.timeout, 1.0),
        failure_penalty=settings.get_or("failurePenalty", _Field.timeout, 5.0),
        starvation=settings.get_or("starvationGuard", _Field.duration, 10.0) or math.inf,
        reports=settings.get_or("loadReports", lambda field: _reports(field.object()), ReportsConfig()),
    ), None


def _ring_hash(settings: _Object) -> _Balancing:
    least = settings.get_or("minRingSize", _Field.positive_whole, 1024)
    most = settings.get_or("maxRingSize", _Field.positive_whole, 4096)
    if most < least:
        raise settings.field("maxRingSize").fail("expected no less than minRingSize")
    factor = settings.get_or("boundedLoadFactor", _Field.not_negative, 0.0)
    if 0 < factor < 1:
        raise settings.field("boundedLoadFactor").fail("expected 0, or a number of 1 or more")
    return BalancerConfig(
        "ring_hash",
        hash_header=settings.get_or("requestHashHeader", _Field.string, "").lower(),
        min_ring=min(least, MAX_RING),
        max_ring=min(most, MAX_RING),
        load_factor=factor,
        subset=0,  # every client must see the same ring
    ), None


def _random_subsetting(settings: _Object) -> _Balancing:
    balancer, ejection = _child(settings)
    return replace(balancer, subset=settings.need("subsetSize", _Field.positive_whole)), ejection


def _priority(settings: _Object) -> _Balancing:
    children = settings.need("children", _Field.object)
    children.known.update(children.items)  # names that the config makes up itself
    levels = []
    for name in settings.need("priorities", _Field.list):
        child = children.need(name.string(), _Field.object)
        levels.append(_policy(child, "config"))
    if not levels:
        raise settings.field("priorities").fail("expected at least one name")
    ejection = next((each for _, each in levels if each is not None), None)
    return replace(levels[0][0], levels=tuple(balancer for balancer, _ in levels)), ejection


def _outlier_detection(settings: _Object) -> _Balancing:
    balancer, _ = _child(settings)
    default = EjectionConfig()
    return balancer, EjectionConfig(
        interval=settings.get_or("interval", _Field.period, default.interval),
        base_time=settings.get_or("baseEjectionTime", _Field.period, default.base_time),
        max_time=settings.get_or("maxEjectionTime", _Field.period, default.max_time),
        max_percent=settings.get_or("maxEjectionPercent", _Field.percentage, default.max_percent),
        success_rate=settings.get("successRateEjection", _success_rate),
        failure_percentage=settings.get("failurePercentageEjection", _failure_percentage),
        consecutive=settings.get_or("consecutiveFailures", _Field.whole, default.consecutive),
        gateway=settings.get_or("consecutiveGatewayErrors", _Field.whole, default.gateway),
        timeouts=settings.get_or("consecutiveTimeouts", _Field.whole, default.timeouts),
        panic=settings.get_or("panicThreshold", _Field.percentage, default.panic),
        dry_run=settings.get_or("dryRun", _Field.boolean, False),
    )


def _success_rate(field: _Field) -> SuccessRateConfig:
    settings, default = field.object(), SuccessRateConfig()
    return SuccessRateConfig(
        stdev_factor=settings.get_or("stdevFactor", _Field.whole, 1900) / 1000,
        enforcement=settings.get_or("enforcementPercentage", _Field.percentage, default.enforcement),
        minimum_hosts=settings.get_or("minimumHosts", _Field.whole, default.minimum_hosts),
        request_volume=settings.get_or("requestVolume", _Field.whole, default.request_volume),
    )


def _failure_percentage(field: _Field) -> FailurePercentageConfig:
    settings, default = field.object(), FailurePercentageConfig()
    return FailurePercentageConfig(
        threshold=settings.get_or("threshold", _Field.percentage, default.threshold),
        enforcement=settings.get_or("enforcementPercentage", _Field.percentage, default.enforcement),
        minimum_hosts=settings.get_or("minimumHosts", _Field.whole, default.minimum_hosts),
        request_volume=settings.get_or("requestVolume", _Field.whole, default.request_volume),
    )


def _reports(settings: _Object) -> ReportsConfig:
    default = ReportsConfig()
    out_of_band = settings.get_or("enableOobLoadReport", _Field.boolean, False)
    period = settings.get_or("oobReportingPeriod", _Field.period, 10.0)
    return ReportsConfig(
        enabled=True,
        out_of_band=period if out_of_band else 0.0,
        blackout=settings.get_or("blackoutPeriod", _Field.duration, default.blackout),
        expiration=settings.get_or("weightExpirationPeriod", _Field.timeout, default.expiration),
        update_period=max(0.1, settings.get_or("weightUpdatePeriod", _Field.duration, default.update_period)),
        error_penalty=settings.get_or("errorUtilizationPenalty", _Field.not_negative, default.error_penalty),
    )


# A policy is a line here, one in policy/balancers.py, and one in the proto.
_POLICIES: dict[str, Callable[[_Object], _Balancing]] = {
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


def _slow_start(field: _Field) -> SlowStartConfig:
    settings, default = field.object(), SlowStartConfig()
    return SlowStartConfig(
        window=settings.need("window", _Field.duration),
        aggression=settings.get_or("aggression", _Field.positive, default.aggression),
        least=settings.get_or("minWeightPercent", _Field.percentage, 100 * default.least) / 100,
    )


def _zone(field: _Field) -> ZoneConfig:
    settings, default = field.object(), ZoneConfig()
    return ZoneConfig(
        enabled=True,
        min_cluster=settings.get_or("minClusterSize", _Field.whole, default.min_cluster),
        min_endpoints=settings.get_or("minEndpoints", _Field.positive_whole, default.min_endpoints),
    )


def _overload(field: _Field) -> OverloadConfig:
    settings = field.object()
    return OverloadConfig(
        max_outstanding=settings.get_or("maxOutstanding", lambda most: most.whole() or math.inf, math.inf),
        adaptive=settings.get("adaptiveThrottle", _adaptive),
        dry_run=settings.get_or("dryRun", _Field.boolean, False),
    )


def _adaptive(field: _Field) -> AdaptiveConfig:
    settings, default = field.object(), AdaptiveConfig()
    k = settings.get_or("k", _Field.number, default.k)
    if k < 1:
        raise settings.field("k").fail("expected a number of 1 or more")
    return AdaptiveConfig(
        k=k,
        window=settings.get_or("window", _Field.period, default.window),
        max_refused=min(0.99, settings.get_or("maxRefusedPercent", _Field.percentage, 90.0) / 100),
    )


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
