"""A service's settings, from the environment and then from a file. ``mesh.server.settings`` has those of its server."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import pydantic
import sqlalchemy as sa
from pydantic_settings import BaseSettings, SettingsConfigDict

from mesh import files, variables
from mesh.server.settings import ServerSettings

SERVER_DEFAULTS: Mapping[str, str] = {"MESH_REFLECTION": "1"}
"""Where the shop's services differ from the defaults of ``ServerSettings``: reflection is on, for tools like
grpcurl."""

FILE = "MESH_CONFIG"
"""The variable with the file's path."""

MAX_FILE = 1024 * 1024
"""The file that ``MESH_CONFIG`` names. Bytes."""

_PREFIXES = ("MESH_", "OTEL_", "GRPC_")
_WIDTH = 28


class Settings(BaseSettings):
    """A service's own settings, each from the variable ``MESH_`` and its name. An empty variable counts as unset.

    Settings of one service are in a subclass.
    """

    model_config = SettingsConfigDict(env_prefix="MESH_", env_ignore_empty=True)

    data: Path = pydantic.Field(
        default=Path("data"), description="the folder for the service's data; created if necessary"
    )
    database_url: str = pydantic.Field(
        default="",
        description="the database, sqlite:///path or postgresql://user:password@host/name; if empty, SQLite in the "
        "data folder",
    )
    log_level: Literal["debug", "info", "warning", "error"] = pydantic.Field(
        default="info", description="the least severe level that is logged: debug, info, warning or error"
    )

    @classmethod
    def from_env(cls) -> Self:
        """The settings in the environment. Raises ValueError, naming each invalid variable."""
        try:
            return cls()
        except pydantic.ValidationError as error:
            invalid = (f"MESH_{str(e['loc'][0]).upper()}={e['input']!r}: {e['msg']}" for e in error.errors())
            raise ValueError("; ".join(invalid)) from None

    def database(self, service: str) -> sa.URL:
        """The URL of ``service``'s database. Raises ValueError if it is malformed."""
        if not self.database_url:
            return sa.URL.create("sqlite", database=str(self.data / f"{service}.db"))
        try:
            return sa.make_url(self.database_url)
        except sa.exc.ArgumentError:
            raise ValueError(
                "MESH_DATABASE_URL: expected a SQLAlchemy URL, dialect://user:password@host/name"
            ) from None


def read_file() -> None:
    """Add the variables in the file ``MESH_CONFIG`` to the environment, where they are not set yet.

    The file is TOML, with the variables' names as keys: ``MESH_LOG_LEVEL = "warning"``. Raises ValueError, saying what
    is wrong with it.
    """
    name = os.environ.get(FILE, "")
    if not name:
        return
    try:
        text = files.read(Path(name), MAX_FILE)[0].decode()
    except OSError as error:
        raise ValueError(f"{FILE}={name!r}: can't read it: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{FILE}={name!r}: invalid TOML: {error}") from None
    try:
        found = tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{FILE}={name!r}: invalid TOML: {error}") from None
    for key, value in found.items():
        if not key.startswith(_PREFIXES):
            raise ValueError(
                f"{FILE}={name!r}: unknown variable {key}; expected a name that begins with {', '.join(_PREFIXES)}"
            )
        if isinstance(value, bool):
            value = int(value)
        if not isinstance(value, str | int | float):
            raise ValueError(f"{FILE}={name!r}: {key} must be a string, a number, true or false")
        try:
            os.environ.setdefault(key, str(value))
        except ValueError as error:  # U+0000, or a number of more digits than Python writes
            raise ValueError(f"{FILE}={name!r}: {key} can't be set: {error}") from None


def server_settings() -> ServerSettings:
    """The settings of the service's server, from the environment. Raises ValueError, naming the invalid variable."""
    return ServerSettings.from_env({**SERVER_DEFAULTS, **os.environ})


def describe(settings: type[Settings] = Settings) -> str:
    """Every variable that a service with ``settings`` reads, with its meaning and default."""
    lines = [
        "The service:",
        f"  {FILE:<{_WIDTH}}a TOML file with further variables; those in the environment take precedence",
    ]
    for name, field in settings.model_fields.items():
        default = f" (default: {field.default})" if str(field.default) else ""
        lines.append(f"  {'MESH_' + name.upper():<{_WIDTH}}{field.description}{default}")
    lines += ["", "Its server:"]
    for setting in dataclasses.fields(ServerSettings):
        variable = setting.metadata.get("variable", "")
        if variable:
            value = "" if setting.default is dataclasses.MISSING else SERVER_DEFAULTS.get(variable, setting.default)
            default = f" (default: {_as_written(value)})" if value not in ("", ()) else ""
            lines.append(f"  {variable:<{_WIDTH}}{variables.SERVERS.get(variable, variables.KNOWN[variable])}{default}")
    return "\n".join([*lines, "", (inspect.getdoc(ServerSettings) or "").replace("``", "")])


def _as_written(value: object) -> str:
    """A default, as it is written in the environment."""
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value.value if isinstance(value, enum.Enum) else value)
