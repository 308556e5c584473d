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

Option = tuple[str, str | int]


class _RefusedError(Exception):
    """What a value should have been."""


def _text(value: str) -> str:
    return value


def _address(value: str) -> str:
    if value.startswith(("unix:", "unix-abstract:")):
        return value
    host, colon, port = value.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 65536):
        raise _RefusedError("host:port, or unix:path")
    return value


def _advertised(value: str) -> str:
    if ":" not in value:
        return value
    try:
        return _address(value)
    except _RefusedError:
        raise _RefusedError("host:port, or a host alone (the port is then the one listened on), or unix:path") from None


def _number(parse: Callable[[str], Any], low: float, high: float, accepted: str) -> Callable[[str], Any]:
    def parsed(value: str) -> Any:
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


def _switch(value: str) -> bool:
    match value.strip().lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off":
            return False
    raise _RefusedError("1, true, yes, on, or 0, false, no, off")


def _labels(value: str) -> dict[str, str]:
    labels = {}
    for label in filter(None, (part.strip() for part in value.split(","))):
        key, equals, text = label.partition("=")
        if not (key and equals):
            raise _RefusedError("key=value, with commas between")
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
    ``grace``: how long calls in flight may take to finish.
    ``reflection``: whether the server describes its services (needs grpcio-reflection).
    ``max_receive_bytes``, ``max_send_bytes``: the largest messages; -1 for no limit.
    ``keepalive_time``, ``keepalive_timeout``: how often a quiet connection is pinged, and how long the answer may take,
    before its client counts as vanished.
    ``min_ping_interval``: clients that ping more often are told to go away.
    ``max_workers``: threads for handlers that aren't async.
    ``interceptors``, ``options``: further ones for the ``grpc.Server``; options win over what the settings above make.
    """

    listen: str = _setting("127.0.0.1:50051", "MESH_LISTEN", _address)
    advertise: str = _setting("", "MESH_ADVERTISE", _advertised)
    registry: str = _setting("", "MESH_REGISTRY", _address)
    instance_id: str = _setting("", "MESH_INSTANCE_ID", _text)
    region: str = _setting("", "MESH_REGION", _text)
    zone: str = _setting("", "MESH_ZONE", _text)
    sub_zone: str = _setting("", "MESH_SUB_ZONE", _text)
    weight: int = _setting(1, "MESH_WEIGHT", _whole(1, 1_000_000))
    metadata: Mapping[str, str] = dataclasses.field(
        default_factory=dict, metadata={"variable": "MESH_METADATA", "parse": _labels}
    )
    lease_ttl: float = _setting(10.0, "MESH_LEASE_TTL", _seconds(1, 300))
    drain_wait: float = _setting(0.5, "MESH_DRAIN_WAIT", _seconds(0, 300))
    deregister_timeout: float = _setting(1.0, "MESH_DEREGISTER_TIMEOUT", _seconds(0, 60))
    grace: float = _setting(10.0, "MESH_GRACE", _seconds(0, 3600))
    reflection: bool = _setting(False, "MESH_REFLECTION", _switch)
    max_receive_bytes: int = _setting(4 << 20, "MESH_MAX_RECEIVE_BYTES", _whole(-1, 2**31 - 1))
    max_send_bytes: int = _setting(-1, "MESH_MAX_SEND_BYTES", _whole(-1, 2**31 - 1))
    keepalive_time: float = _setting(2.0, "MESH_KEEPALIVE_TIME", _seconds(0.1, 86400))
    keepalive_timeout: float = _setting(2.0, "MESH_KEEPALIVE_TIMEOUT", _seconds(0.1, 86400))
    min_ping_interval: float = _setting(1.0, "MESH_MIN_PING_INTERVAL", _seconds(0, 86400))
    max_workers: int = _setting(32, "MESH_MAX_WORKERS", _whole(1, 10_000))
    interceptors: Sequence[Any] = ()
    options: Sequence[Option] = ()

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
                raise ValueError(f"{variable}={value!r}: should be {accepted}") from None
        return cls(**told)

    def server_options(self) -> list[Option]:
        """The options of the ``grpc.Server``."""
        timeout = round(self.keepalive_timeout * 1000)
        return [
            # Without it two processes may share a port, and each gets half of the other's calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self.max_receive_bytes),
            ("grpc.max_send_message_length", self.max_send_bytes),
            # All three are needed: with the first two alone a black hole goes unnoticed for three quarters of a minute.
            ("grpc.keepalive_time_ms", round(self.keepalive_time * 1000)),
            ("grpc.keepalive_timeout_ms", timeout),
            ("grpc.http2.ping_timeout_ms", timeout),
            # Clients watch their connections in the same way, also while they have no call.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", round(self.min_ping_interval * 1000)),
            *self.options,
        ]
