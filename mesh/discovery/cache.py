"""The disk cache: a client whose registry is away when it starts begins with what an earlier one knew.

Off unless ``MESH_CACHE`` names a directory. There is one file for each registry and service, a ``Snapshot`` of
``registry.proto``, replaced as a whole, so that processes may share the directory. What can't be read or written is
logged and done without.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from google.protobuf.message import DecodeError

from weft.mesh.v1 import registry_pb2 as pb

VARIABLE = "MESH_CACHE"
"""The environment variable that names the directory. It is made when it is needed."""

MAX_AGE = 24 * 3600.0
"""What the registry confirmed longer ago is not used: addresses are given to others in time. Seconds."""

_LOG = logging.getLogger("mesh.discovery")


class Cache:
    """What one registry last said of one service."""

    def __init__(self, folder: Path, registry: str, service: str, max_age: float = MAX_AGE) -> None:
        # Readable, and no two alike, whatever characters they have.
        name = f"{service}@{registry}"
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        self._path = folder / f"{quote(name, safe='@')[:160]}-{digest}.binpb"
        self._max_age = max_age
        self._complained = False

    @classmethod
    def of_environment(cls, registry: str, service: str) -> Cache | None:
        """The cache in the directory that ``MESH_CACHE`` names, if it names one."""
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder), registry, service) if folder else None

    def load(self) -> pb.Snapshot | None:
        """What was saved last; None when there is nothing, or it is too old or broken."""
        try:
            age = time.time() - self._path.stat().st_mtime
            if age > self._max_age:
                return None
            snapshot = pb.Snapshot.FromString(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, DecodeError) as error:
            _LOG.warning("%s can't be read: %s", self._path, error)
            return None
        _LOG.warning("%s: using %d instances that were known %.0f s ago", self._path, len(snapshot.instances), age)
        return snapshot

    def save(self, snapshot: pb.Snapshot) -> None:
        """Replace what was saved."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=".", delete=False) as file:
                try:
                    file.write(snapshot.SerializeToString())
                    file.close()
                    Path(file.name).replace(self._path)
                except BaseException:
                    Path(file.name).unlink()
                    raise
        except OSError as error:
            if not self._complained:
                self._complained = True
                _LOG.warning("%s can't be written: %s", self._path, error)

    def __repr__(self) -> str:
        return f"<Cache {self._path}>"
