"""Where a channel's service config comes from: the channel's option, a file that is read again when it changes, the
registry.

Rule 1: the first of them that has a config gives it, whole; nothing is merged.
Rule 2: a config is taken whole or not at all. One with anything wrong in it is logged once, with the field's path, and
what its source said last stays (A21).
Rule 3: a source that can't be read has not changed its mind.
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
"""The environment variable that names the file. It holds a service config, or
``{"services": {"weft.user.v1.UserService": {...}, "dns:///search:50051": {...}, "*": {...}}}``: a config for each
service of a ``mesh:///`` target and for each other target, and one for all the rest."""

PERIOD = 1.0
"""Between two looks at the file. Seconds."""

MAX_FILE = 1024 * 1024
"""The file with service configs. A ConfigMap of Kubernetes has the same limit. Bytes."""

_LOG = logging.getLogger("mesh.config")


_REMEMBERED = 100
"""Texts that warnings were logged of: a program that makes its channels over and over must not log them as often."""


class Source(enum.IntEnum):
    """Who gave a config; the lower number goes first."""

    OPTION = 0
    FILE = 1
    REGISTRY = 2


_warned: set[tuple[str, Source, int]] = set()


class Configs:
    """What the sources of one channel say, and the ``current`` config that follows from it.

    ``channel`` is what log lines call it. ``service``: the one that it calls, where that is known.
    ``balanced_by_core``: its balancing policy is for gRPC core to read.
    """

    def __init__(self, channel: str, *, service: str = "", balanced_by_core: bool = False) -> None:
        self.current = ServiceConfig()
        self._channel = channel
        self._service = service
        self._balanced_by_core = balanced_by_core
        self._parsed: dict[Source, ServiceConfig] = {}
        self._complaints: dict[Source, str] = {}

    def offer(self, source: Source, text: str) -> bool:
        """Take what a source says now; empty when it has no config. Returns whether ``current`` is another since.

        Raises:
            ValueError: the channel's option is wrong, which its caller can mend; other sources' errors are logged.
        """
        try:
            parsed = parse(text, balanced_by_core=self._balanced_by_core) if text else None
        except ValueError as error:
            if source is Source.OPTION:
                raise
            self.refuse(source, str(error))
            return False
        self._complaints.pop(source, None)
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
            if len(_warned) >= _REMEMBERED:
                _warned.clear()
            _warned.add(key)
            for warning in (*parsed.warnings, *unknown_names(parsed, [self._service] if self._service else ())):
                _LOG.warning("%s: service config from the %s: %s", self._channel, source.name.lower(), warning)

    def refuse(self, source: Source, why: str) -> None:
        """A source said what can't be taken: say so, once for each reason."""
        if self._complaints.get(source) != why:
            self._complaints[source] = why
            if source in self._parsed:
                kept = "keeping the previous one"
            else:
                kept = f"keeping the {min(self._parsed).name.lower()}'s" if self._parsed else "none is in use"
            _LOG.error("%s: service config from the %s rejected; %s: %s", self._channel, source.name.lower(), kept, why)

    def __repr__(self) -> str:
        return f"<Configs {self._channel} from {'+'.join(source.name.lower() for source in sorted(self._parsed))}>"


class ConfigFile:
    """The file's part for one channel, looked at again and again. ``names``: what the file may call the channel."""

    def __init__(self, path: str, *names: str) -> None:
        self._path = Path(path)
        self._names = (*names, "*")
        self._seen: object = None

    @classmethod
    def of_environment(cls, *names: str) -> ConfigFile | None:
        """The file that ``MESH_SERVICE_CONFIG`` names, if it names one."""
        path = os.environ.get(FILE_VARIABLE)
        return cls(path, *names) if path else None

    def news(self) -> str | None:
        """The JSON of the channel's config when the file is another than at the last look, empty when it has none for
        this channel; None when the file is as it was.

        Raises:
            ValueError: the file can't be read or isn't what it should be; told once, until it changes again.
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
        """What changes when the file does; with the inode, because a file renamed into place may be as old and as long
        as the one before."""
        try:
            stat = self._path.stat()
        except OSError as error:
            return error.errno
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def __repr__(self) -> str:
        return f"<ConfigFile {self._path} for {self._names[0]}>"
