"""docs/variables.md: every MESH_* variable. What they are for is in mesh/variables.py; defaults and accepted values are
those of the settings that read them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args, get_origin

from annotated_types import Gt, Le

from mesh import variables
from mesh.addresses import FORMS
from mesh.registry.__main__ import DEFAULT_LISTEN
from mesh.server.settings import ServerSettings
from services.common.settings import SERVER_DEFAULTS, Settings
from services.events.settings import EventSettings
from services.order.settings import OrderSettings


class Row(NamedTuple):
    default: str
    accepts: str
    read_by: str


HEAD = """\
<!-- Written by docs/generate.py from mesh/variables.py and the settings that read the variables. -->
# Environment variables

An empty variable counts as not set. With an invalid value a server or registry doesn't start: it exits with code 2, and
the message names the variable, its value and what it accepts. A process logs one warning for each variable that starts
with `MESH_` and isn't listed here, with the nearest known name, when it creates its first channel or server.

Servers' variables are also fields of `mesh.ServerSettings`. If a program passes such an object, the environment isn't
read.
There are no variables for retries, timeouts and load balancing: those belong to
[the service config](service-config.md). `GRPC_ENABLE_FORK_SUPPORT` and gRPC core's other variables keep their meaning
([forking.md](forking.md)).
"""

SECTIONS = {
    "Clients": variables.CHANNELS,
    "Servers": variables.SERVERS,
    "The registry": variables.REGISTRIES,
    "The shop": variables.SHOP,
}
"""The groups of mesh/variables.py."""

OTHERS = {
    "MESH_CACHE": Row("none: nothing is cached", "a folder; created if missing", "clients"),
    "MESH_SERVICE_CONFIG": Row("none", "a file", "clients"),
    "MESH_REGISTRY_LISTEN": Row(f"`{DEFAULT_LISTEN}`", FORMS, "the registry (`--listen` wins)"),
    "MESH_REGISTRY_STATE": Row("none: in memory only", "a folder; created if missing", "the registry (`--state` wins)"),
    "MESH_CONFIG": Row("none", "a TOML file", "its services"),
}
"""Variables that no settings class describes."""

NO_DEFAULT = {
    "MESH_ADVERTISE": "the address listened on; for a wildcard, that of the interface that leads to the registry",
    "MESH_INSTANCE_ID": "the advertised address",
    "MESH_REGISTRY": "none: servers don't register, and `mesh://` targets must name the registry",
    "MESH_DATABASE_URL": "SQLite in `MESH_DATA`",
    "MESH_NATS_URL": "none: no events are sent or received",
}
"""What an empty default means, where that isn't "none"."""

ACCEPTS = {
    "MESH_DATABASE_URL": "`sqlite:///path` or `postgresql://user:password@host/name`",
    "MESH_NATS_URL": "`nats://host:port`, or several, separated by commas",
    "MESH_USER_SERVICE": "a target",
    "MESH_DATA": "a folder; created if missing",
}
"""For settings of the shop whose class accepts any text."""


def page() -> str:
    """The text of docs/variables.md."""
    rows = {**OTHERS, **_servers(), **_shop()}
    lines = [HEAD.rstrip()]
    for title, group in SECTIONS.items():
        lines.append(f"\n## {title}\n\n| variable | what it is | default | accepts | read by |\n|---|---|---|---|---|")
        lines.extend(f"| `{name}` | {about} | {' | '.join(rows.pop(name))} |" for name, about in group.items())
    if rows:
        raise ValueError(f"not in mesh/variables.py: {', '.join(rows)}")
    return "\n".join(lines) + "\n"


def _servers() -> Mapping[str, Row]:
    found = {}
    for field in dataclasses.fields(ServerSettings):
        name = field.metadata.get("variable", "")
        if name:
            default = "" if field.default is dataclasses.MISSING else _written(field.default)
            if name in SERVER_DEFAULTS:
                default += f" (the shop: `{SERVER_DEFAULTS[name]}`)"
            readers = "clients, servers" if name in variables.CHANNELS else "servers"
            found[name] = Row(default or NO_DEFAULT.get(name, "none"), _accepted(name), readers)
    return found


def _accepted(name: str) -> str:
    """What a server's variable accepts, according to its error message for an invalid value."""
    try:
        ServerSettings.from_env({name: "\0"})
    except ValueError as error:
        return str(error).partition("expected ")[2].partition(": ")[0]
    return "any text"


def _shop() -> Mapping[str, Row]:
    found = {}
    for key, field in OrderSettings.model_fields.items():
        name = f"{variables.PREFIX}{key.upper()}"
        if get_origin(field.annotation) is Literal:
            accepts = ", ".join(f"`{value}`" for value in get_args(field.annotation))
        elif field.annotation is float:
            (above,) = (each.gt for each in field.metadata if isinstance(each, Gt))
            (most,) = (each.le for each in field.metadata if isinstance(each, Le))
            accepts = f"seconds above {above}, at most {most}"
        else:
            accepts = ACCEPTS[name]
        readers = "its services"
        if key not in Settings.model_fields:
            readers = "order, notification" if key in EventSettings.model_fields else "order"
        found[name] = Row(_written(field.default) or NO_DEFAULT[name], accepts, readers)
    return found


def _written(value: object) -> str:
    """A default as it would be written in the environment."""
    if isinstance(value, bool):
        value = int(value)
    elif isinstance(value, enum.Enum):
        value = value.value
    elif isinstance(value, float):
        value = f"{value:g}"
    return f"`{value}`" if str(value) else ""
