"""The settings of a server: where it listens, how it is registered, timeouts and limits.

Each setting has a safe default and a ``MESH_*`` variable. An invalid value is rejected with the variable's name and
what it accepts.
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
from mesh.server.thread_pool import SPARE_THREADS

Option = tuple[str, str | int]

LONGEST_NUMBER = 40
"""The longest value of a variable that is a number. Characters."""


class _ExpectedError(Exception):
    """A value is invalid; the text says what is expected."""


def _text(value: str) -> str:
    return value


def _address(value: str) -> str:
    if not is_local(value):
        try:
            parse(value, min_port=0)
        except ValueError as error:
            raise _ExpectedError(f"{FORMS}: {error}") from None
    return value


def _advertised(value: str) -> str:
    if not is_local(value):
        try:
            address = parse(value, port=0, min_port=0)
        except ValueError as error:
            accepted = "host:port, or a host alone (with the port that the server listens on), or unix:path"
            raise _ExpectedError(f"{accepted}: {error}") from None
        if address.is_wildcard:
            raise _ExpectedError("an address that clients can connect to, not a wildcard")
    return value


def _registry(value: str) -> str:
    try:
        check_target(value)
    except ValueError as error:
        raise _ExpectedError(f"host:port, or another target that gRPC accepts: {error}") from None
    return value


def _number(parse: Callable[[str], Any], low: float, high: float, accepted: str) -> Callable[[str], Any]:
    def parsed(value: str) -> Any:
        if len(value) > LONGEST_NUMBER:
            raise _ExpectedError(accepted)
        try:
            number = parse(value)
        except ValueError:
            raise _ExpectedError(accepted) from None
        if not low <= number <= high:  # rejects NaN, too
            raise _ExpectedError(accepted)
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
    raise _ExpectedError("1, true, yes, on, or 0, false, no, off")


def _mode(value: str) -> Mode:
    try:
        return Mode(value.strip().lower())
    except ValueError:
        raise _ExpectedError("on, dry-run or off") from None


def _labels(value: str) -> dict[str, str]:
    labels = {}
    for label in filter(None, (part.strip() for part in value.split(","))):
        key, equals, text = label.partition("=")
        if not (key and equals):
            raise _ExpectedError("comma-separated key=value pairs")
        labels[key.strip()] = text.strip()
    return labels


def _setting(default: Any, variable: str, parse: Callable[[str], Any]) -> Any:
    return dataclasses.field(default=default, metadata={"variable": variable, "parse": parse})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of ``mesh.serve`` and ``mesh.aio.serve``. Times are in seconds, sizes in bytes.

    ``listen``: where to listen; port 0 picks a free one.
    ``advertise``: the address that clients get. By default the one in ``listen`` or, if that is a wildcard, the address
    of the interface that leads to the registry. A host alone gets the port of ``listen``.
    ``registry``: where to register; empty to not register.
    ``instance_id``: this replica's id in its services. By default the advertised address, so that a replica that was
    killed and restarted replaces itself.
    ``region``, ``zone``, ``sub_zone``: where it runs. ``weight``: its share of the load. ``metadata``: its labels.
    ``lease_ttl``: how long the registry keeps it without a keep-alive.
    ``drain_wait``: how long clients get to notice that the server is NOT_SERVING and deregistered, before it refuses
    new calls. ``deregister_timeout``: how long a drain waits for the deregistration.
    ``grace``: how long calls in flight may take to finish. ``stream_grace``: how long streams may; those still open
    then end with UNAVAILABLE, for their clients to resume on another endpoint.
    ``ready``: a hook, async or not, that is called until it returns true, which says that the server's dependencies are
    available. Until then the server is NOT_SERVING, not registered, and refuses calls.
    ``reflection``: whether to serve reflection (needs grpcio-reflection). ``channelz``: whether to serve channelz, if
    grpcio-channelz is installed.
    ``overload``: whether to limit a method's concurrency while its calls miss their deadlines because of load, and to
    refuse calls early while others miss their deadlines in the queue: on, only counted (dry-run), or off. ``late``: the
    same for queued calls with less time left than their method takes. ``overload_after``: for how long calls must miss
    their deadlines before that (less for calls that take less).
    ``min_concurrency``: the lowest limit that a method gets. ``max_concurrency``: handlers that may run at once, of all
    methods, limited or not (on a threaded server at most ``max_workers``). ``queue_size``: calls that may wait.
    ``max_streams``: streams open at once, of all clients.
    ``load_reports``: whether responses carry the load, for clients that balance by it.
    ``max_receive_bytes``, ``max_send_bytes``: the largest messages; -1 for no limit. ``max_metadata_bytes``: the
    largest metadata.
    ``max_connection_streams``: calls and streams at once on one connection; further ones wait in the client.
    ``connection_age``: how long a connection takes new calls (±10 %), so that long-lived clients find new replicas; 0
    for no limit. ``connection_age_grace``: how long its calls may go on after that.
    ``keepalive_time``, ``keepalive_timeout``: how often an idle connection is pinged, and how long the response may
    take before the client counts as gone.
    ``min_ping_interval``: connections of clients that ping more often are closed.
    ``max_workers``: threads for handlers that aren't async.
    ``observer``: gets each call of the servicers, whether handled or refused.
    ``interceptors``, ``options``: passed to the ``grpc.Server``; options override those made from other settings.
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
        for name in ("overload", "late"):
            try:
                object.__setattr__(self, name, Mode(getattr(self, name)))
            except ValueError:
                raise ValueError(f"{name}: expected on, dry-run or off, got {getattr(self, name)!r}") from None
        for name in ("interceptors", "options"):  # may be iterators, which could be read only once
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> ServerSettings:
        """Settings from the ``MESH_*`` variables in ``environ``, by default the process's environment. Variables that
        are empty or not set leave the default.

        Raises ValueError with the variable, its value and what it accepts.
        """
        if environ is None:
            environ = os.environ
        values: dict[str, Any] = {}
        for setting in dataclasses.fields(cls):
            variable = setting.metadata.get("variable", "")
            value = environ.get(variable)
            if not value:
                continue
            try:
                values[setting.name] = setting.metadata["parse"](value)
            except _ExpectedError as expected:
                raise ValueError(f"{variable}={_short(value)!r}: expected {expected}") from None
        return cls(**values)

    def admission(self, threads: int | None = None) -> AdmissionConfig:
        """The settings of admission control. ``threads``: how many there are for handlers, on a threaded server."""
        concurrency, streams = self.max_concurrency, self.max_streams
        if threads is not None:
            # A stream holds a thread for as long as it lasts.
            concurrency, streams = min(concurrency, threads), min(streams, SPARE_THREADS // 2)
        return AdmissionConfig(
            min_concurrency=self.min_concurrency,
            max_concurrency=concurrency,
            overload_after=self.overload_after,
            queue_size=self.queue_size,
            max_streams=streams,
            overload=self.overload,
            late=self.late,
        )

    def server_options(self) -> list[Option]:
        """The options of the ``grpc.Server``."""
        age = [
            # Core adds jitter of ±10 %.
            ("grpc.max_connection_age_ms", round(self.connection_age * 1000)),
            ("grpc.max_connection_age_grace_ms", round(self.connection_age_grace * 1000)),
        ]
        timeout = round(self.keepalive_timeout * 1000)
        ours: list[Option] = [
            # Otherwise two processes could share a port, and each would get half of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self.max_receive_bytes),
            ("grpc.max_send_message_length", self.max_send_bytes),
            # Soft and hard limits are equal: between them core refuses at random.
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.max_metadata_bytes),
            *limit_streams(self.max_connection_streams),
            # With more than 1,000 calls not accepted yet, core cancels some at random, which clients can't tell from
            # their own cancellation. Let all calls reach admission control, which gives a reason.
            ("grpc.server.max_pending_requests", 50_000),
            ("grpc.server.max_pending_requests_hard_limit", 50_000),
            *(age if self.connection_age else ()),
            # All three are needed: with only two, it takes 45 s to detect that packets are dropped.
            ("grpc.keepalive_time_ms", round(self.keepalive_time * 1000)),
            ("grpc.keepalive_timeout_ms", timeout),
            ("grpc.http2.ping_timeout_ms", timeout),
            # Clients send keepalive pings, too, even without calls.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", round(self.min_ping_interval * 1000)),
        ]
        # Each name once: of two options with one name core uses the first.
        return list({**dict(ours), **dict(self.options)}.items())
