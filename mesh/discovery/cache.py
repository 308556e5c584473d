"""The disk cache: a client that starts while its registry is unavailable uses the instances that an earlier one saved.

Off unless ``MESH_CACHE`` names a folder. It has one file per registry and service, a ``Snapshot`` of
``registry.proto`` that is replaced atomically, so processes of one user can share the folder. The file decides where
calls go, so one that another user owns or can write to is not used. Files that can't be used or written are logged
once, and ignored.
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

from mesh import files
from weft.mesh.v1 import registry_pb2 as pb

VARIABLE = "MESH_CACHE"
"""The environment variable that names the folder. It is created if missing, for this user only."""

MAX_AGE = 24 * 3600.0
"""How old a file may be: after some time, addresses are reused by other services. Seconds."""

MAX_SIZE = 16 * 1024 * 1024
"""The largest file of the disk cache, enough for more than ten thousand instances. Bytes."""

MAX_SKEW = 60.0
"""How far in the future a file's time may be: clocks of two machines differ. Seconds."""

_LOG = logging.getLogger("mesh.discovery")


class Cache:
    """The last known instances of one service of one registry."""

    def __init__(self, folder: Path, registry: str, service: str, max_age: float = MAX_AGE) -> None:
        # Readable and unique, whatever characters the names have.
        name = f"{service}@{registry}"
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        self._path = folder / f"{quote(name, safe='@')[:160]}-{digest}.binpb"
        self._max_age = max_age
        self._warned = False

    @classmethod
    def from_environment(cls, registry: str, service: str) -> Cache | None:
        """The cache in the folder that ``MESH_CACHE`` names, if it is set."""
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder), registry, service) if folder else None

    def read(self) -> pb.Snapshot | None:
        """The last snapshot; None when there is none, or it is too old or invalid."""
        try:
            files.check_private(self._path.parent.stat())
            content, changed = files.read(self._path, MAX_SIZE, private=True)
            age = time.time() - changed
            if age > self._max_age:
                return None
            if age < -MAX_SKEW:
                raise files.RefusedError(f"dated {-age:.0f} s in the future; check the clock, or remove the file")
            snapshot = pb.Snapshot.FromString(content)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn_once("can't be read", error.strerror)
            return None
        except DecodeError as error:
            self._warn_once("can't be read", str(error))
            return None
        age = max(age, 0.0)
        _LOG.warning("%s: using %d cached instances, saved %.0f s ago", self._path, len(snapshot.instances), age)
        return snapshot

    def write(self, snapshot: pb.Snapshot) -> None:
        """Replace the saved snapshot."""
        content = snapshot.SerializeToString()
        try:
            if len(content) > MAX_SIZE:
                raise files.RefusedError(f"{len(content)} bytes; the limit is {MAX_SIZE}")
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.check_private(self._path.parent.stat())
            with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=".", delete=False) as file:
                try:
                    file.write(content)
                    file.close()
                    Path(file.name).replace(self._path)
                except BaseException:
                    Path(file.name).unlink()
                    raise
        except OSError as error:
            self._warn_once("can't be written", error.strerror)

    def _warn_once(self, what: str, why: str | None) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning("%s %s: %s", self._path, what, why)

    def __repr__(self) -> str:
        return f"<Cache {self._path}>"
