"""All environment variables of the mesh and its shop, and a warning for unknown ones.

A misspelt variable would be ignored silently. So the first channel or server of a process logs a warning for each
variable that starts with ``MESH_`` and isn't known. All processes know all of them, as environments are often shared.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping

from mesh.config.reader import did_you_mean

_LOG = logging.getLogger("mesh.config")

PREFIX = "MESH_"

CHANNELS = {
    "MESH_CACHE": "the directory of the disk cache, which clients use while the registry is unavailable",
    "MESH_REGION": "the region that this process runs in",
    "MESH_REGISTRY": "the registry: where servers register, and where mesh:/// targets are looked up",
    "MESH_SERVICE_CONFIG": "the file with service configs",
    "MESH_SUB_ZONE": "the part of the zone that this process runs in",
    "MESH_ZONE": "the zone that this process runs in",
}
"""For channels. Servers use the registry and the locality, too."""

SERVERS = {
    "MESH_ADVERTISE": "the address that clients are given",
    "MESH_CHANNELZ": "whether the server serves channelz",
    "MESH_CONNECTION_AGE": "how long a connection takes new calls, in seconds; 0 for as long as it lasts",
    "MESH_CONNECTION_AGE_GRACE": "how long calls may go on after that, in seconds",
    "MESH_DEREGISTER_TIMEOUT": "how long deregistering may take, in seconds",
    "MESH_DRAIN_WAIT": "how long clients get to notice a drain, in seconds",
    "MESH_GRACE": "how long calls get to finish in a drain, in seconds",
    "MESH_INSTANCE_ID": "this replica's name in its services",
    "MESH_KEEPALIVE_TIME": "how often a quiet connection is pinged, in seconds",
    "MESH_KEEPALIVE_TIMEOUT": "how long the answer to a ping may take, in seconds",
    "MESH_LATE": "whether calls that can't finish in time are refused: on, dry-run or off",
    "MESH_LEASE_TTL": "how long the registry keeps the server without a sign of life, in seconds",
    "MESH_LISTEN": "where the server listens",
    "MESH_LOAD_REPORTS": "whether answers carry the server's load",
    "MESH_MAX_CONCURRENCY": "how many handlers run at once at most",
    "MESH_MAX_CONNECTION_STREAMS": "how many calls and streams one connection may have at once",
    "MESH_MAX_METADATA_BYTES": "the largest metadata, in bytes",
    "MESH_MAX_RECEIVE_BYTES": "the largest message received, in bytes; -1 for no limit",
    "MESH_MAX_SEND_BYTES": "the largest message sent, in bytes; -1 for no limit",
    "MESH_MAX_STREAMS": "how many streams may be open at once",
    "MESH_MAX_WORKERS": "how many threads run handlers",
    "MESH_METADATA": "the replica's labels",
    "MESH_MIN_CONCURRENCY": "the lowest limit that an overloaded method gets",
    "MESH_MIN_PING_INTERVAL": "how often clients may ping, in seconds",
    "MESH_OVERLOAD": "whether calls are refused in an overload: on, dry-run or off",
    "MESH_OVERLOAD_AFTER": "how long calls must miss their deadlines before a method is limited, in seconds",
    "MESH_QUEUE_SIZE": "how many calls may wait",
    "MESH_REFLECTION": "whether the server serves reflection",
    "MESH_STREAM_GRACE": "how long streams get to finish in a drain, in seconds",
    "MESH_WEIGHT": "the replica's share of the load",
}
"""For servers: the fields of ``ServerSettings``."""

REGISTRIES = {
    "MESH_REGISTRY_LISTEN": "where the registry listens",
    "MESH_REGISTRY_STATE": "the folder in which the registry keeps service configs across restarts",
}
"""For ``python -m mesh.registry``."""

SHOP = {
    "MESH_CONFIG": "a TOML file that sets variables which the environment doesn't",
    "MESH_DATA": "the folder of a service's data",
    "MESH_DATABASE_URL": "a service's database",
    "MESH_LOG_LEVEL": "what a service logs",
    "MESH_NATS_URL": "the broker of the events",
    "MESH_USER_AWAY": "what becomes of orders while the user service is away",
    "MESH_USER_SERVICE": "the user service, as a target",
    "MESH_USER_TIMEOUT": "how long the user service may take to answer, in seconds",
    "MESH_WATCH_INTERVAL": "how often watches look for changes, in seconds",
}
"""For the shop's services."""

KNOWN: Mapping[str, str] = {**CHANNELS, **SERVERS, **REGISTRIES, **SHOP}

# Kubernetes gives every pod such variables for a service named "mesh-registry", say.
_KUBERNETES = re.compile(r"MESH_\w*?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")

_warned = False


def unknown(names: Iterable[str]) -> list[str]:
    """A line for each unknown variable."""
    strange = sorted(
        name for name in names if name.startswith(PREFIX) and name not in KNOWN and not _KUBERNETES.fullmatch(name)
    )
    known = [name.removeprefix(PREFIX) for name in KNOWN]  # without it, as a common prefix makes all names similar
    hints = {
        name: did_you_mean(name.removeprefix(PREFIX), known).replace("mean '", f"mean '{PREFIX}") for name in strange
    }
    return [f"{name}: unknown environment variable, ignored{hint}" for name, hint in hints.items()]


def warn_once() -> None:
    """Log a warning for each unknown variable in this process's environment, on the first call only."""
    global _warned
    if not _warned:
        _warned = True
        for line in unknown(os.environ):
            _LOG.warning("%s", line)
