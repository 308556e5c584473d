"""What a served process is told: where it listens, who it says it is, how long things may take.

Every setting has a default that is safe, and a ``MESH_*`` variable; a wrong value is refused with the variable's name
and what it takes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mesh.addresses import FORMS, check_target, is_local, parse
from mesh.listening import limit_streams
from mesh.model import MAX_WEIGHT
from mesh.observe import ServerObserver
from mesh.policy.server.admission import AdmissionConfig, Mode
from mesh.server.thread_pool import SPARE

Option = tuple[str, str | int]

LONGEST_NUMBER = 40
"""Characters of a variable that is a number."""


class _RefusedError(Exception):
    """What a value should have been."""


def _text(value: str) -> str:
    return value


def _address(value: str) -> str:
    if not is_local(value):
        try:
            parse(value, min_port=0)
        except ValueError as error:
            raise _RefusedError(f"{FORMS}: {error}") from None
    return value


def _advertised(value: str) -> str:
    if not is_local(value):
        try:
            address = parse(value, port=0, min_port=0)
        except ValueError as error:
            accepted = "host:port, or a host alone (the port is then the one listened on), or unix:path"
            raise _RefusedError(f"{accepted}: {error}") from None
        if address.is_wildcard:
            raise _RefusedError("an address that clients can call, not the wildcard that the server listens on")
    return value


def _registry(value: str) -> str:
    try:
        check_target(value)
    except ValueError as error:
        raise _RefusedError(f"host:port, or another target that gRPC takes: {error}") from None
    return value


def _number(parse: Callable[[str], Any], low: float, high: float, accepted: str) -> Callable[[str], Any]:
    def parsed(value: str) -> Any:
        if len(value) > LONGEST_NUMBER:
            raise _RefusedError(accepted)
        try:
            number = parse(value)
        except ValueError:
            raise _RefusedError(accepted) from None
        if not low <= number <= high:  # NaN is refused here, too
            raise _RefusedError(accepted)
        return number

    return parsed


def _seconds(low: float, high: float) -> Callable[[str], Any]:
    return _number(float, low, high, f"seconds from {low:g} to {high:g}")


def _whole(low: int, high: int) -> Callable[[str], Any]:
    return _number(int, low, high, f"a whole number from {low} to {high}")


def _short(value: str) -> str:
    return value if len(value) <= 200 else value[:197] + "..."


def _switch(value: str) -> bool:
    match value.strip().lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off":
            return False
    raise _RefusedError("1, true, yes, on, or 0, false, no, off")


def _mode(value: str) -> Mode:
    try:
        return Mode(value.strip().lower())
    except ValueError:
        raise _RefusedError("on, dry-run or off") from None


def _labels(value: str) -> dict[str, str]:
    labels = {}
    for label in filter(None, (part.strip() for part in value.split(","))):
        key, equals, text = label.partition("=")
        if not (key and equals):
            raise _RefusedError("comma-separated key=value pairs")
        labels[key.strip()] = text.strip()
    return labels


def _setting(default: Any, variable: str, parse: Callable[[str], Any]) -> Any:
    return dataclasses.field(default=default, metadata={"variable": variable, "parse": parse})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How ``mesh.serve`` and ``mesh.aio.serve`` serve. Times are in seconds, sizes in bytes.

    ``listen``: where to listen; port 0 takes a free one.
    ``advertise``: the address that clients are given; empty for the one listened on, or, when that is all interfaces,
    the address of the one that leads to the registry. A host alone gets the port listened on.
    ``registry``: where to register; empty registers nowhere.
    ``instance_id``: this replica's name in its services; empty for the address advertised, so that a replica which was
    killed and started again replaces itself.
    ``region``, ``zone``, ``sub_zone``: where it runs. ``weight``: its share of the load. ``metadata``: its labels.
    ``lease_ttl``: how long the registry keeps it without a sign of life.
    ``drain_wait``: how long, after NOT_SERVING and deregistering, clients get to notice before new calls are refused.
    ``deregister_timeout``: how long deregistering may take before the drain goes on without it.
    ``grace``: how long calls in flight may take to finish. ``stream_grace``: how long streams may; those still open
    then end with UNAVAILABLE, for their clients to resume elsewhere.
    ``ready``: called, when the server listens, until it returns true: whether what the server depends on is there.
    Until then it is NOT_SERVING, unregistered, and refuses calls. It may be async.
    ``reflection``: whether the server describes its services (needs grpcio-reflection). ``channelz``: whether it tells
    of its connections and calls, where grpcio-channelz is installed.
    ``overload``: whether a method's concurrency is limited while its calls miss their deadlines because of load, and
    calls are refused while others are lost in the queue: on, only counted (dry-run), or off. ``late``: the same for
    calls in the queue with less time left than their method takes. ``overload_after``: for how long calls must miss
    their deadlines before that (less for calls that take less).
    ``min_concurrency``: the lowest limit that a method gets. ``max_concurrency``: handlers at work at once, of all
    methods, whether limited or not (a threaded server has as many as ``max_workers``). ``queue_size``: calls that may
    wait. ``max_streams``: streams open at once, of all clients.
    ``load_reports``: whether answers carry the load, for clients that balance by it.
    ``max_receive_bytes``, ``max_send_bytes``: the largest messages; -1 for no limit. ``max_metadata_bytes``: the
    largest metadata.
    ``max_connection_streams``: calls and streams at once on one connection; further ones wait in the client.
    ``connection_age``: how long a connection is used for new calls, give or take a tenth, so that clients which live
    long find new replicas; 0 for as long as it lasts. ``connection_age_grace``: how long its calls may go on then.
    ``keepalive_time``, ``keepalive_timeout``: how often a quiet connection is pinged, and how long the answer may take,
    before its client counts as vanished.
    ``min_ping_interval``: clients that ping more often are told to go away.
    ``max_workers``: threads for handlers that aren't async.
    ``observer``: told of each call of the servicers that was handled or refused.
    ``interceptors``, ``options``: further ones for the ``grpc.Server``; options win over what the settings above make.
    """

    listen: str = _setting("127.0.0.1:50051", "MESH_LISTEN", _address)
    advertise: str = _setting("", "MESH_ADVERTISE", _advertised)
    registry: str = _setting("", "MESH_REGISTRY", _registry)
    instance_id: str = _setting("", "MESH_INSTANCE_ID", _text)
    region: str = _setting("", "MESH_REGION", _text)
    zone: str = _setting("", "MESH_ZONE", _text)
    sub_zone: str = _setting("", "MESH_SUB_ZONE", _text)
    weight: int = _setting(1, "MESH_WEIGHT", _whole(1, MAX_WEIGHT))
    metadata: Mapping[str, str] = dataclasses.field(
        default_factory=dict, metadata={"variable": "MESH_METADATA", "parse": _labels}
    )
    lease_ttl: float = _setting(10.0, "MESH_LEASE_TTL", _seconds(1, 300))
    drain_wait: float = _setting(0.5, "MESH_DRAIN_WAIT", _seconds(0, 300))
    deregister_timeout: float = _setting(1.0, "MESH_DEREGISTER_TIMEOUT", _seconds(0, 60))
    grace: float = _setting(10.0, "MESH_GRACE", _seconds(0, 3600))
    stream_grace: float = _setting(5.0, "MESH_STREAM_GRACE", _seconds(0, 3600))
    ready: Callable[[], Any] | None = None
    reflection: bool = _setting(False, "MESH_REFLECTION", _switch)
    channelz: bool = _setting(True, "MESH_CHANNELZ", _switch)
    overload: Mode = _setting(Mode.ON, "MESH_OVERLOAD", _mode)  # noqa: RUF009 - a field, as the others
    late: Mode = _setting(Mode.ON, "MESH_LATE", _mode)  # noqa: RUF009
    min_concurrency: int = _setting(10, "MESH_MIN_CONCURRENCY", _whole(1, 100_000))
    max_concurrency: int = _setting(10_000, "MESH_MAX_CONCURRENCY", _whole(1, 100_000))
    overload_after: float = _setting(1.0, "MESH_OVERLOAD_AFTER", _seconds(0.1, 60))
    queue_size: int = _setting(1000, "MESH_QUEUE_SIZE", _whole(0, 100_000))
    max_streams: int = _setting(10_000, "MESH_MAX_STREAMS", _whole(1, 100_000))
    load_reports: bool = _setting(True, "MESH_LOAD_REPORTS", _switch)
    max_receive_bytes: int = _setting(4 << 20, "MESH_MAX_RECEIVE_BYTES", _whole(-1, 2**31 - 1))
    max_send_bytes: int = _setting(-1, "MESH_MAX_SEND_BYTES", _whole(-1, 2**31 - 1))
    max_metadata_bytes: int = _setting(16 << 10, "MESH_MAX_METADATA_BYTES", _whole(1024, 2**31 - 1))
    max_connection_streams: int = _setting(1000, "MESH_MAX_CONNECTION_STREAMS", _whole(1, 2**31 - 1))
    connection_age: float = _setting(300.0, "MESH_CONNECTION_AGE", _seconds(0, 86400))
    connection_age_grace: float = _setting(3600.0, "MESH_CONNECTION_AGE_GRACE", _seconds(0, 86400))
    keepalive_time: float = _setting(2.0, "MESH_KEEPALIVE_TIME", _seconds(0.1, 86400))
    keepalive_timeout: float = _setting(2.0, "MESH_KEEPALIVE_TIMEOUT", _seconds(0.1, 86400))
    min_ping_interval: float = _setting(1.0, "MESH_MIN_PING_INTERVAL", _seconds(0, 86400))
    max_workers: int = _setting(32, "MESH_MAX_WORKERS", _whole(1, 10_000))
    observer: ServerObserver | None = None
    interceptors: Sequence[Any] = ()
    options: Sequence[Option] = ()

    def __post_init__(self) -> None:
        for name in ("interceptors", "options"):  # may be iterators, and each server reads them
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> ServerSettings:
        """The settings that ``environ`` (the process's environment, without one) asks for; the rest, and those whose
        variable is empty, have their defaults.

        Raises ValueError, naming the variable, its value and what it takes.
        """
        if environ is None:
            environ = os.environ
        told: dict[str, Any] = {}
        for setting in dataclasses.fields(cls):
            variable = setting.metadata.get("variable", "")
            value = environ.get(variable)
            if not value:
                continue
            try:
                told[setting.name] = setting.metadata["parse"](value)
            except _RefusedError as accepted:
                raise ValueError(f"{variable}={_short(value)!r}: expected {accepted}") from None
        return cls(**told)

    def admission(self, threads: int | None = None) -> AdmissionConfig:
        """What the gate before the handlers is told; ``threads``: how many of them there are for handlers."""
        most, streams = self.max_concurrency, self.max_streams
        if threads is not None:
            # A stream holds a thread for as long as it lasts.
            most, streams = min(most, threads), min(streams, SPARE // 2)
        return AdmissionConfig(
            least=self.min_concurrency,
            most=most,
            after=self.overload_after,
            queue_size=self.queue_size,
            max_streams=streams,
            overload=self.overload,
            late=self.late,
        )

    def server_options(self) -> list[Option]:
        """The options of the ``grpc.Server``."""
        age = [
            # Core spreads it by a tenth up and down.
            ("grpc.max_connection_age_ms", round(self.connection_age * 1000)),
            ("grpc.max_connection_age_grace_ms", round(self.connection_age_grace * 1000)),
        ]
        timeout = round(self.keepalive_timeout * 1000)
        ours: list[Option] = [
            # Without it two processes may share a port, and each gets half of the other's calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self.max_receive_bytes),
            ("grpc.max_send_message_length", self.max_send_bytes),
            # Soft and hard alike: between the two core refuses by chance.
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.max_metadata_bytes),
            *limit_streams(self.max_connection_streams),
            # Beyond 1,000 calls that nobody has accepted yet core cancels others by chance, which their clients can't
            # tell from a cancel of their own: let them come to where they are refused for a reason.
            ("grpc.server.max_pending_requests", 50_000),
            ("grpc.server.max_pending_requests_hard_limit", 50_000),
            *(age if self.connection_age else ()),
            # All three are needed: with the first two alone a black hole goes unnoticed for three quarters of a minute.
            ("grpc.keepalive_time_ms", round(self.keepalive_time * 1000)),
            ("grpc.keepalive_timeout_ms", timeout),
            ("grpc.http2.ping_timeout_ms", timeout),
            # Clients watch their connections in the same way, also while they have no call.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", round(self.min_ping_interval * 1000)),
        ]
        # Each name once: of two with one name core takes the first.
        return list({**dict(ours), **dict(self.options)}.items())
