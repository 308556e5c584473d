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
    "MESH_CACHE": "the folder of the disk cache, which clients use while the registry is unavailable",
    "MESH_REGION": "the region that this process runs in",
    "MESH_REGISTRY": "the registry: where servers register, and where mesh:/// targets are resolved",
    "MESH_SERVICE_CONFIG": "the file with service configs",
    "MESH_SUB_ZONE": "the sub-zone that this process runs in",
    "MESH_ZONE": "the zone that this process runs in",
}
"""For channels. Servers use the registry and the locality, too."""

SERVERS = {
    "MESH_ADVERTISE": "the address under which the server registers, for clients",
    "MESH_CHANNELZ": "whether the server serves channelz",
    "MESH_CONNECTION_AGE": "the maximum age of a connection, in seconds; 0 for no limit",
    "MESH_CONNECTION_AGE_GRACE": "how long calls may continue after that, in seconds",
    "MESH_DEREGISTER_TIMEOUT": "how long deregistering may take, in seconds",
    "MESH_DRAIN_WAIT": "how long a drain waits for clients to notice it, in seconds",
    "MESH_GRACE": "how long calls may take to finish in a drain, in seconds",
    "MESH_INSTANCE_ID": "the instance id of this replica",
    "MESH_KEEPALIVE_TIME": "how often an idle connection is pinged, in seconds",
    "MESH_KEEPALIVE_TIMEOUT": "how long to wait for the response to a ping, in seconds",
    "MESH_LATE": "whether calls that can't finish before their deadline are refused: on, dry-run or off",
    "MESH_LEASE_TTL": "how long the registry keeps the server without a keep-alive, in seconds",
    "MESH_LISTEN": "the address that the server listens on",
    "MESH_LOAD_REPORTS": "whether responses carry load reports",
    "MESH_MAX_CONCURRENCY": "the maximum number of concurrent handlers",
    "MESH_MAX_CONNECTION_STREAMS": "the maximum number of concurrent calls and streams of one connection",
    "MESH_MAX_METADATA_BYTES": "the maximum size of metadata, in bytes",
    "MESH_MAX_RECEIVE_BYTES": "the maximum size of a received message, in bytes; -1 for no limit",
    "MESH_MAX_SEND_BYTES": "the maximum size of a sent message, in bytes; -1 for no limit",
    "MESH_MAX_STREAMS": "the maximum number of open streams",
    "MESH_MAX_WORKERS": "the maximum number of threads that run handlers",
    "MESH_METADATA": "the replica's labels",
    "MESH_MIN_CONCURRENCY": "the lowest limit of an overloaded method",
    "MESH_MIN_PING_INTERVAL": "how often clients may ping, in seconds",
    "MESH_OVERLOAD": "whether calls are refused when the server is overloaded: on, dry-run or off",
    "MESH_OVERLOAD_AFTER": "how long calls must miss their deadlines before a method is limited, in seconds",
    "MESH_QUEUE_SIZE": "the maximum number of queued calls",
    "MESH_REFLECTION": "whether the server serves reflection",
    "MESH_STREAM_GRACE": "how long streams may take to finish in a drain, in seconds",
    "MESH_WEIGHT": "the replica's share of the load",
}
"""For servers: the fields of ``ServerSettings``."""

REGISTRIES = {
    "MESH_REGISTRY_LISTEN": "the address that the registry listens on",
    "MESH_REGISTRY_STATE": "the folder in which the registry keeps service configs across restarts",
}
"""For ``python -m mesh.registry``."""

SHOP = {
    "MESH_CONFIG": "a TOML file with values for variables that aren't set",
    "MESH_DATA": "the folder of a service's data",
    "MESH_DATABASE_URL": "a service's database",
    "MESH_LOG_LEVEL": "the log level of a service",
    "MESH_NATS_URL": "the event broker",
    "MESH_USER_AWAY": "what happens to orders while the user service is unavailable",
    "MESH_USER_SERVICE": "the user service, as a target",
    "MESH_USER_TIMEOUT": "the timeout of calls to the user service, in seconds",
    "MESH_WATCH_INTERVAL": "how often watches poll for changes, in seconds",
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
