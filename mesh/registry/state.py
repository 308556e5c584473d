"""What a registry keeps across its restarts: the service configs, in a folder of its own.

Instances aren't kept: they register again within seconds, and what is kept of them would be out of date.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from mesh import config, files

VARIABLE = "MESH_REGISTRY_STATE"
"""The environment variable that names the folder. Without it configs are kept in memory."""

FILE = "configs.json"

_log = logging.getLogger(__name__)


class State:
    """The folder, which is this process's alone from now on.

    Raises files.InUseError when another registry has it, or OSError.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._lock = files.lock(folder)

    def load(self) -> dict[str, str]:
        """The services' configs. A file that can't be understood is set aside, and an ERROR says where.

        Raises OSError when it can't be read.
        """
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            configs = json.loads(text)["configs"]
            return {_name(service): _valid(service, told) for service, told in configs.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            names = (self._path.with_name(f"{FILE}.corrupt-{number}") for number in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            self._path.replace(aside)
            _log.error(
                "%s can't be used (%s: %s); starting without service configs. The file is now %s: mend it and put it "
                "back, or set the configs again",
                self._path,
                type(error).__name__,
                error,
                aside,
            )
            return {}

    def save(self, configs: Mapping[str, str]) -> None:
        """Replace what is kept. On disk when this returns. Raises OSError."""
        files.replace(self._path, json.dumps({"version": 1, "configs": dict(configs)}, indent=1).encode())

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()

    def __repr__(self) -> str:
        return f"<State {self._path}>"


def _name(service: object) -> str:
    if not isinstance(service, str) or not service:
        raise ValueError(f"{service!r} is not a service's name")
    return service


def _valid(service: str, told: object) -> str:
    if not isinstance(told, str):
        raise ValueError(f"the config of {service} is no text")
    try:
        config.parse(told)
    except ValueError as error:
        raise ValueError(f"the config of {service}: {error}") from None
    return told
