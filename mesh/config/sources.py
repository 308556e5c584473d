"""The sources of a channel's service config: the channel's option, a hot-reloaded file, the registry.

Rule 1: the first source that has a config is used; configs aren't merged.
Rule 2: a config is applied whole or not at all. An invalid one is logged once, with the field's path, and the source's
previous config stays (A21).
Rule 3: when a source can't be read, its previous config stays.
"""

from __future__ import annotations

import enum
import json
import logging
import os
from pathlib import Path

from mesh import files, lines
from mesh.config.descriptors import unknown_names
from mesh.config.parse import parse
from mesh.config.reader import read_json
from mesh.config.settings import ServiceConfig

FILE_VARIABLE = "MESH_SERVICE_CONFIG"
"""The environment variable with the file's path. The file has one service config, or
``{"services": {"weft.user.v1.UserService": {...}, "dns:///search:50051": {...}, "*": {...}}}``: a config for each
service of a ``mesh:///`` target, for each other target, and a default."""

FILE_POLL_PERIOD = 1.0
"""How often the file is checked for changes. Seconds."""

MAX_FILE = 1024 * 1024
"""The file with service configs. Kubernetes has the same limit for a ConfigMap. Bytes."""

_LOG = logging.getLogger("mesh.config")


_MAX_WARNED = 100
"""How many configs are remembered as warned about, so that a program that keeps creating channels doesn't repeat the
warnings."""


class Source(enum.IntEnum):
    """The source of a config; the lowest number has precedence."""

    OPTION = 0
    FILE = 1
    REGISTRY = 2


_warned: set[tuple[str, Source, int]] = set()


class ConfigSources:
    """The configs of one channel by source, and the ``current`` one.

    ``channel``: its name in log lines. ``service``: the one that it calls, if known. ``balanced_by_core``: the
    balancing policy is left to gRPC core.
    """

    def __init__(self, channel: str, *, service: str = "", balanced_by_core: bool = False) -> None:
        self.current = ServiceConfig()
        self._channel = channel
        self._service = service
        self._balanced_by_core = balanced_by_core
        self._parsed: dict[Source, ServiceConfig] = {}
        self._rejected: dict[Source, str] = {}

    def update(self, source: Source, text: str) -> bool:
        """Apply a source's config; empty when it has none. Returns whether ``current`` has changed.

        Raises:
            ValueError: the channel's option is invalid, which its caller can fix; other sources' errors are logged.
        """
        try:
            parsed = parse(text, balanced_by_core=self._balanced_by_core) if text else None
        except ValueError as error:
            if source is Source.OPTION:
                raise
            self.reject(source, str(error))
            return False
        self._rejected.pop(source, None)
        if parsed is None:
            self._parsed.pop(source, None)
        else:
            self._parsed[source] = parsed
            self._warn(source, text, parsed)
        before, self.current = self.current, self._parsed[min(self._parsed)] if self._parsed else ServiceConfig()
        changed = self.current != before
        if changed and source is not Source.OPTION:
            now = (
                f"from the {min(self._parsed).name.lower()} applied" if self._parsed else "removed; the defaults apply"
            )
            lines.info(_LOG, "config", "%s: service config %s", self._channel, now)
        return changed

    def _warn(self, source: Source, text: str, parsed: ServiceConfig) -> None:
        key = (self._channel, source, hash(text))
        if key not in _warned:
            if len(_warned) >= _MAX_WARNED:
                _warned.clear()
            _warned.add(key)
            for warning in (*parsed.warnings, *unknown_names(parsed, [self._service] if self._service else ())):
                _LOG.warning("%s: service config from the %s: %s", self._channel, source.name.lower(), warning)

    def reject(self, source: Source, why: str) -> None:
        """Log that a source's config was rejected, once per reason."""
        if self._rejected.get(source) != why:
            self._rejected[source] = why
            if source in self._parsed:
                kept = "keeping the previous one"
            else:
                kept = f"keeping the {min(self._parsed).name.lower()}'s" if self._parsed else "none is in use"
            _LOG.error("%s: service config from the %s rejected; %s: %s", self._channel, source.name.lower(), kept, why)

    def __repr__(self) -> str:
        return (
            f"<ConfigSources {self._channel} from {'+'.join(source.name.lower() for source in sorted(self._parsed))}>"
        )


class ConfigFile:
    """The file's config for one channel, polled for changes. ``names``: the channel's keys in the file, in order."""

    def __init__(self, path: str, *names: str) -> None:
        self._path = Path(path)
        self._names = (*names, "*")
        self._seen: object = None

    @classmethod
    def from_environment(cls, *names: str) -> ConfigFile | None:
        """The file that ``MESH_SERVICE_CONFIG`` names, if it names one."""
        path = os.environ.get(FILE_VARIABLE)
        return cls(path, *names) if path else None

    def poll(self) -> str | None:
        """The JSON of the channel's config if the file has changed since the last poll, empty when it has none for this
        channel; None if the file hasn't changed.

        Raises:
            ValueError: the file can't be read or is invalid; raised once per change of the file.
        """
        seen = self._stamp()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            text = files.read(self._path, MAX_FILE)[0].decode("utf-8-sig")
            root = read_json(text)
        except OSError as error:
            raise ValueError(f"{self._path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from None
        services = root.get("services") if isinstance(root, dict) else None
        if services is None:
            return json.dumps(root)
        if not isinstance(services, dict):
            raise ValueError(f"{self._path}: services: expected an object of configs by service")
        return next((json.dumps(services[name]) for name in self._names if name in services), "")

    def _stamp(self) -> object:
        """A value that changes when the file does. With the inode: a file that was renamed into place may have the same
        time and size as the previous one."""
        try:
            stat = self._path.stat()
        except OSError as error:
            return error.errno
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def __repr__(self) -> str:
        return f"<ConfigFile {self._path} for {self._names[0]}>"
