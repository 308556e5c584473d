"""What a registry keeps across its restarts: the service configs, in a folder of its own.

Instances aren't kept: they register again within seconds, and what is kept of them would be out of date.
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
"""The environment variable that names the folder. Without it configs are kept in memory."""

FILE = "configs.json"

MAX_FILE = 64 * 1024 * 1024
"""The file in which a registry keeps service configs. Bytes."""

_log = logging.getLogger(__name__)


class State:
    """The folder, which is this process's alone from now on.

    Raises files.InUseError when another registry has it, or OSError; also when the folder, or the file in it, belongs
    to another user or is everybody's to write: what it says decides where calls go.
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
        """The services' configs that are valid. What can't be understood is kept aside, and an ERROR says where.

        Raises OSError when it can't be read.
        """
        try:
            data, _ = files.read(self._path, MAX_FILE, private=True)
        except FileNotFoundError:
            return {}
        try:
            told = json.loads(data)["configs"]
            if not isinstance(told, dict):
                raise TypeError("configs is no object")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            _log.error(
                "%s can't be used (%s: %s); starting without service configs. The file is kept as %s: mend it and put "
                "it back, or set the configs again",
                self._path,
                type(error).__name__,
                error,
                self._set_aside(data),
            )
            self._path.unlink()
            return {}
        refused = {service: why for service, text in told.items() if (why := _violation(service, text))}
        valid = {service: text for service, text in told.items() if service not in refused}
        if refused:
            _log.error(
                "%s: not restored: %s. The file is kept as %s; set these configs again",
                self._path,
                "; ".join(f"the config of {service!r}: {why}" for service, why in refused.items()),
                self._set_aside(data),
            )
            self.save(valid)
        return valid

    def _set_aside(self, data: bytes) -> Path:
        names = (self._path.with_name(f"{FILE}.corrupt-{number}") for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        files.replace(aside, data)
        return aside

    def save(self, configs: Mapping[str, str]) -> None:
        """Replace what is kept. On disk when this returns. Raises OSError."""
        files.replace(self._path, json.dumps({"version": 1, "configs": dict(configs)}, indent=1).encode())

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()

    def __repr__(self) -> str:
        return f"<State {self._path}>"


def _violation(service: str, text: object) -> str:
    """What is wrong with a service's config; empty when nothing is."""
    if not service:
        return "it names no service"
    if not isinstance(text, str):
        return "it is no text"
    try:
        parse(text)
    except ValueError as error:
        return str(error)
    return ""
