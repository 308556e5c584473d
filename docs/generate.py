"""Writes the pages of docs/ that come from sources: ``make docs``.

Two are made here: service-config.md, from the comments of service_config.proto, and limits.md, from the constants that
LIMITS names and their docstrings. The others have a module each, beside this one.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from google.protobuf import descriptor_pb2

from docs import diagrams, statuses
from docs import variables as variables_page
from mesh import variables
from mesh.server.settings import ServerSettings

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "weft/mesh/v1/service_config.proto"
HEAD = """\
<!-- Written by docs/generate.py from {source}. -->
# Service config reference

{intro}

```python
mesh.insecure_channel("mesh:///weft.user.v1.UserService", options=[("grpc.service_config", json.dumps({{
    "methodConfig": [{{
        "name": [{{"service": "weft.user.v1.UserService", "method": "GetUser"}}],
        "timeout": "2s",
        "hedgingPolicy": {{"maxAttempts": 2, "hedgingDelay": "0.05s", "delayPercentile": 95}},
    }}],
}}))])
```
"""


def service_config_page() -> str:
    """The text of docs/service-config.md."""
    file = _described()
    comments = {tuple(at.path): at.leading_comments for at in file.source_code_info.location}
    lines = []
    for index, message in enumerate(file.message_type):
        about = " ".join(comments[4, index].split())
        if index == 0:
            lines.append(HEAD.format(source=f"protos/{SOURCE}", intro=about))
        else:
            lines.append(f"\n## {message.name}\n{about}\n")
        if message.field:
            lines.append("| key | what it is | default | when to change it | source |\n|---|---|---|---|---|")
        lines.extend(
            f"| `{field.json_name}` | {' | '.join(_cells(comments[4, index, 2, number]))} |"
            for number, field in enumerate(message.field)
        )
    return "\n".join(lines) + "\n"


def _cells(comment: str) -> Iterator[str]:
    about, _, facts = comment.partition("\n\n")
    yield " ".join(about.split())
    said = " ".join(facts.split())
    default, _, rest = said.removeprefix("Default: ").partition(" Source: ")
    source, _, change = rest.partition(" Change: ")
    if not (default and source and change):
        raise ValueError(f"a key's comment must have Default, Source and Change, in this order: {comment!r}")
    yield from (default, change, source)


def _described() -> descriptor_pb2.FileDescriptorProto:
    buf = Path(sys.executable).with_name("buf")
    built = subprocess.run([buf, "build", "protos", "-o", "-"], cwd=ROOT, capture_output=True, check=True)
    files = descriptor_pb2.FileDescriptorSet.FromString(built.stdout).file
    return next(file for file in files if file.name == SOURCE)


class Limit(NamedTuple):
    """A line of docs/limits.md: a constant of a module, with a docstring, or a field of ServerSettings (which has its
    variable's description). ``beyond``: what happens when it is exceeded. ``change``: the setting that changes it, if
    any."""

    module: str
    name: str
    unit: str
    beyond: str
    change: str = ""


SETTINGS = "mesh.server.settings.ServerSettings"

# Every constant named MAX_... or MIN_... must be listed: a test checks that.
LIMITS: dict[str, tuple[Limit, ...]] = {
    "Service configs": (
        Limit("mesh.config.reader", "MAX_SIZE", "bytes", "The config is rejected; the previous one stays."),
        Limit("mesh.config.reader", "MAX_DEPTH", "levels", "The config is rejected."),
        Limit("mesh.config.reader", "MAX_NUMBER", "characters", "The config is rejected."),
        Limit("mesh.config.reader", "MIN_TIMEOUT", "seconds", "Below it the config is rejected."),
        Limit("mesh.config.reader", "MIN_PERIOD", "seconds", "Below it the config is rejected."),
        Limit(
            "mesh.config.reader",
            "MAX_ATTEMPTS",
            "attempts",
            "More count as this many.",
            "`maxAttempts`, to lower it",
        ),
        Limit("mesh.config.reader", "MAX_RING", "points", "More count as this many.", "`maxRingSize`, to lower it"),
        Limit("mesh.config.reader", "MAX_WARNINGS", "warnings", "The last one says how many more there are."),
        Limit("mesh.config.sources", "MAX_FILE", "bytes", "The file is rejected; the previous configs stay."),
    ),
    "Calls": (
        Limit("mesh.channel.replay", "LIMIT", "bytes", "The call isn't retried or hedged any more."),
        Limit("mesh.channel.outcome", "LONGEST_PUSHBACK", "characters", "The call isn't retried."),
        Limit("mesh.policy.call.flow", "MAX_UNREACHABLE_DELAYS", "delays", "The call fails, UNAVAILABLE."),
        Limit("mesh.policy.cluster.weights", "REPORTED_WEIGHT_CAP", "times", "The weight is capped."),
        Limit(
            "mesh.policy.cluster.connecting",
            "CONNECTS_PER_PERIOD",
            "endpoints",
            "Others wait for their turn, 0.25 s at most for each 16.",
        ),
        Limit("mesh.policy.cluster.cluster", "MAX_METHODS", "methods", "The oldest is forgotten."),
    ),
    "Discovery": (
        Limit("mesh.discovery.cache", "MAX_SIZE", "bytes", "The file is neither used nor written; one warning."),
        Limit("mesh.discovery.cache", "MAX_AGE", "seconds", "The file isn't used."),
        Limit("mesh.discovery.cache", "MAX_SKEW", "seconds", "The file isn't used; one warning."),
        Limit("mesh.discovery.dns", "MIN_RESOLUTION_INTERVAL", "seconds", "A lookup that is asked for sooner waits."),
        Limit("mesh.discovery.srv", "SRV_TIMEOUT", "seconds", "The lookup fails; the previous result stays."),
        Limit("mesh.discovery.registry", "MIN_BACKOFF", "seconds", "Delays start with this."),
        Limit("mesh.discovery.registry", "MAX_BACKOFF", "seconds", "Delays don't get longer."),
    ),
    "Servers": (
        Limit("mesh.listening", "MAX_SOCKET_PATH", "bytes", "The server doesn't start; the error names the length."),
        Limit(SETTINGS, "max_concurrency", "calls", "Further calls are queued."),
        Limit(SETTINGS, "queue_size", "calls", "The call is refused, RESOURCE_EXHAUSTED."),
        Limit(SETTINGS, "max_streams", "streams", "The stream is refused, RESOURCE_EXHAUSTED."),
        Limit(SETTINGS, "max_connection_streams", "streams", "Further calls wait in the client."),
        Limit(SETTINGS, "max_workers", "threads", "Handlers wait for a thread."),
        Limit(SETTINGS, "max_receive_bytes", "bytes", "The call fails, RESOURCE_EXHAUSTED."),
        Limit(SETTINGS, "max_send_bytes", "bytes", "The call fails, RESOURCE_EXHAUSTED."),
        Limit(SETTINGS, "max_metadata_bytes", "bytes", "The call fails, RESOURCE_EXHAUSTED."),
        Limit(SETTINGS, "connection_age", "seconds", "The connection accepts no new calls; clients open another."),
        Limit(SETTINGS, "connection_age_grace", "seconds", "The calls on it end, UNAVAILABLE."),
        Limit(SETTINGS, "keepalive_timeout", "seconds", "The client counts as gone; its calls are cancelled."),
        Limit(SETTINGS, "min_ping_interval", "seconds", "Connections of clients that ping more often are closed."),
        Limit(SETTINGS, "grace", "seconds", "When draining: remaining calls are cancelled."),
        Limit(SETTINGS, "stream_grace", "seconds", "When draining: remaining streams end, UNAVAILABLE."),
        Limit(SETTINGS, "deregister_timeout", "seconds", "The drain continues without it."),
        Limit("mesh.server.thread_pool", "SPARE_THREADS", "threads", "Further calls wait for a thread."),
        Limit("mesh.server.handlers.scope", "MAX_DIGITS", "digits", "The metadata is ignored."),
        Limit("mesh.server.handlers.registrar", "CACHE_SIZE", "methods", "The oldest is forgotten."),
        Limit("mesh.server.load_report", "MIN_INTERVAL", "seconds", "Shorter ones are raised to this."),
        Limit("mesh.server.load_report", "MAX_INTERVAL", "seconds", "Longer ones are lowered to this."),
        Limit("mesh.server.settings", "LONGEST_NUMBER", "characters", "The server doesn't start; the error names it."),
    ),
    "The registry": (
        Limit(
            "mesh.model",
            "MAX_WEIGHT",
            "times",
            "The registration fails, INVALID_ARGUMENT; a client counts more as this.",
        ),
        Limit("mesh.registry.limits", "MAX_TEXT", "characters", "The registration fails, INVALID_ARGUMENT."),
        Limit("mesh.registry.limits", "MAX_METADATA", "labels", "The registration fails, INVALID_ARGUMENT."),
        Limit("mesh.registry.limits", "MAX_INSTANCE_BYTES", "bytes", "The registration fails, INVALID_ARGUMENT."),
        Limit("mesh.registry.limits", "MAX_SERVICE_BYTES", "bytes", "The registration fails, RESOURCE_EXHAUSTED."),
        Limit("mesh.registry.limits", "MAX_INSTANCES", "instances", "The registration fails, RESOURCE_EXHAUSTED."),
        Limit("mesh.registry.limits", "MAX_TOTAL_BYTES", "bytes", "The registration fails, RESOURCE_EXHAUSTED."),
        Limit("mesh.registry.limits", "MAX_CONFIG", "bytes", "The config is rejected, INVALID_ARGUMENT."),
        Limit("mesh.registry.limits", "MAX_CONFIGS", "services", "The config is rejected, RESOURCE_EXHAUSTED."),
        Limit("mesh.registry.limits", "MAX_CONFIGS_BYTES", "bytes", "The config is rejected, RESOURCE_EXHAUSTED."),
        Limit("mesh.registry.limits", "MAX_CONFIGS_IN_PROGRESS", "configs", "Rejected, RESOURCE_EXHAUSTED."),
        Limit("mesh.registry.limits", "WATCH_MESSAGE_BYTES", "bytes", "The rest comes in further messages."),
        Limit("mesh.registry.limits", "SEND_TIMEOUT", "seconds", "The watch ends, RESOURCE_EXHAUSTED."),
        Limit("mesh.registry.limits", "MAX_PARTS", "parts", "They are encoded again."),
        Limit("mesh.registry.limits", "MAX_MESSAGE_BYTES", "bytes", "The call fails, RESOURCE_EXHAUSTED."),
        Limit("mesh.registry.limits", "MAX_LEASE_IDS", "ids", "The stream ends, INVALID_ARGUMENT."),
        Limit("mesh.registry.limits", "MAX_STREAMS", "streams", "Further calls wait in the client."),
        Limit("mesh.registry.limits", "HANDSHAKE_TIMEOUT", "seconds", "The connection is closed."),
        Limit("mesh.registry.limits", "MAX_PAGE", "instances", "The rest is on further pages."),
        Limit("mesh.registry.limits", "PAGE_BYTES", "bytes", "The rest is on further pages."),
        Limit("mesh.registry.paging", "MAX_TOKEN", "characters", "The call fails, INVALID_ARGUMENT."),
        Limit("mesh.discovery.roster", "MAX_KNOWN", "instances", "A client ignores the rest, with one warning."),
        Limit("mesh.registry.service", "MIN_TTL", "seconds", "Shorter ones are raised to this."),
        Limit("mesh.registry.service", "MAX_TTL", "seconds", "Longer ones are lowered to this."),
        Limit("mesh.registry.state", "MAX_FILE", "bytes", "The registry doesn't start; the error names the file."),
        Limit("mesh.registry.book", "LOG_SIZE", "changes", "Watchers that are further behind get a new snapshot."),
    ),
    "The shop": (
        Limit("services.common.settings", "MAX_FILE", "bytes", "The service doesn't start; the error names the file."),
        Limit("services.user.domain", "MAX_NAME", "characters", "The request fails, INVALID_ARGUMENT."),
        Limit("services.events", "MAX_ATTEMPTS", "attempts", "The event goes to the dead letters."),
    ),
}

LIMITS_HEAD = """\
<!-- Written by docs/generate.py from the constants and settings that it lists. -->
# Limits

What one peer, file or variable can make a process do is limited; this page lists the limits. Those without a setting
are fixed.
"""


def limits_page() -> str:
    """The text of docs/limits.md."""
    lines = [LIMITS_HEAD.rstrip()]
    for title, limits in LIMITS.items():
        lines.append(f"\n## {title}\n\n| name | limit | what it is | when exceeded | setting |\n|---|---|---|---|---|")
        lines.extend(_row(limit) for limit in limits)
    return "\n".join(lines) + "\n"


def _row(limit: Limit) -> str:
    if limit.module == SETTINGS:
        field = next(each for each in dataclasses.fields(ServerSettings) if each.name == limit.name)
        variable = field.metadata["variable"]
        name, about = f"ServerSettings.{limit.name}", variables.SERVERS[variable]
        value: float = getattr(ServerSettings(), limit.name)
        about = f"{about[0].upper()}{about[1:].partition(', in ')[0]}."
        change = f"`{variable}`"
    else:
        module = importlib.import_module(limit.module)
        name, value, change = f"{limit.module}.{limit.name}", getattr(module, limit.name), limit.change
        about = _docstrings(inspect.getsource(module)).get(limit.name, "")
        if not about:
            raise ValueError(f"{name} has no docstring")
        about = about.removesuffix(f" {limit.unit.capitalize()}.").replace("``", "`")
    return f"| `{name}` | {_amount(value, limit.unit)} | {about} | {limit.beyond} | {change} |"


def _docstrings(source: str) -> dict[str, str]:
    """The docstrings of a module's constants: the string after one, or after several in a row."""
    found, run = {}, list[str]()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            run += [target.id for target in targets if isinstance(target, ast.Name)]
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.update(dict.fromkeys(run, " ".join(node.value.value.split())))
        run.clear()
    return found


def _amount(value: float, unit: str) -> str:
    if value in (-1, 0):
        return "none" if value == -1 or unit != "seconds" else "0 s"
    if unit == "bytes":
        for size, name in ((2**20, "MiB"), (2**10, "KiB")):
            if value % size == 0:
                return f"{value // size:,.0f} {name}"
    return f"{value:,.10g} {'s' if unit == 'seconds' else unit}"


PAGES = {
    ROOT / "docs" / "service-config.md": service_config_page,
    ROOT / "docs" / "limits.md": limits_page,
    ROOT / "docs" / "statuses.md": statuses.page,
    ROOT / "docs" / "variables.md": variables_page.page,
    ROOT / "docs" / "diagrams.md": diagrams.page,
}

if __name__ == "__main__":
    for path, page in PAGES.items():
        path.write_text(page())
