"""What a registry keeps across restarts: the service configs, in its own folder.

Instances aren't kept: they register again within seconds, and a stored list would be out of date.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from mesh import files
from mesh.config.parse import parse

VARIABLE = "MESH_REGISTRY_STATE"
"""The environment variable with the folder. Without it configs are kept in memory only."""

FILE = "configs.json"

MAX_FILE = 64 * 1024 * 1024
"""The largest file with a registry's service configs. Bytes."""

_log = logging.getLogger(__name__)


class State:
    """The folder, locked for this process.

    Raises files.InUseError if another registry uses it, or OSError; also if the folder or its file belongs to another
    user or is world-writable: its content decides where calls go.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._lock = files.lock(folder)
        try:
            files.check_private(folder.stat())
        except OSError:
            self._lock.close()
            raise

    def load(self) -> dict[str, str]:
        """The services' valid configs. A file that can't be parsed is moved aside, and an ERROR says where.

        Raises OSError if the file can't be read.
        """
        try:
            data, _ = files.read(self._path, MAX_FILE, private=True)
        except FileNotFoundError:
            return {}
        try:
            configs = json.loads(data)["configs"]
            if not isinstance(configs, dict):
                raise TypeError("configs is not an object")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            _log.error(
                "%s is corrupt (%s: %s); starting without service configs. The file was saved as %s: repair it and put "
                "it back, or set the configs again",
                self._path,
                type(error).__name__,
                error,
                self._set_aside(data),
            )
            self._path.unlink()
            return {}
        refused = {service: why for service, text in configs.items() if (why := _violation(service, text))}
        valid = {service: text for service, text in configs.items() if service not in refused}
        if refused:
            _log.error(
                "%s: not restored: %s. The file was saved as %s; set these configs again",
                self._path,
                "; ".join(f"the config of {service!r}: {why}" for service, why in refused.items()),
                self._set_aside(data),
            )
            self.save(valid)
        return valid

    def _set_aside(self, data: bytes) -> Path:
        names = (self._path.with_name(f"{FILE}.corrupt-{number}") for number in itertools.count(1))
        quarantined = next(name for name in names if not name.exists())
        files.replace(quarantined, data)
        return quarantined

    def save(self, configs: Mapping[str, str]) -> None:
        """Replace the saved configs. They are on disk when this returns. Raises OSError."""
        files.replace(self._path, json.dumps({"version": 1, "configs": dict(configs)}, indent=1).encode())

    def close(self) -> None:
        """Unlock the folder."""
        self._lock.close()

    def __repr__(self) -> str:
        return f"<State {self._path}>"


def _violation(service: str, text: object) -> str:
    """What is wrong with a service's config; empty when nothing is."""
    if not service:
        return "it names no service"
    if not isinstance(text, str):
        return "it is not a string"
    try:
        parse(text)
    except ValueError as error:
        return str(error)
    return ""
