"""The disk cache: a client whose registry is away when it starts begins with what an earlier one knew.

Off unless ``MESH_CACHE`` names a folder. There is one file for each registry and service, a ``Snapshot`` of
``registry.proto``, replaced as a whole, so that processes of one user may share the folder. What a file says decides
where calls go: one that another user owns or may write is not used. What can't be used or written is logged once and
done without.
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
"""The environment variable that names the folder. It is made when it is needed, for this user alone."""

MAX_AGE = 24 * 3600.0
"""How long ago the registry may have confirmed what is used: addresses are given to others in time. Seconds."""

MAX_SIZE = 16 * 1024 * 1024
"""The largest file of the disk cache: ten thousand instances and more. Bytes."""

MAX_SKEW = 60.0
"""How much newer than the clock a file of the disk cache may be: clocks of two machines differ. Seconds."""

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
            files.check_private(self._path.parent.stat())
            content, changed = files.read(self._path, MAX_SIZE, private=True)
            age = time.time() - changed
            if age > self._max_age:
                return None
            if age < -MAX_SKEW:
                raise files.RefusedError(f"last changed {-age:.0f} s in the future; check the clock, or remove it")
            snapshot = pb.Snapshot.FromString(content)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._complain("can't be read", error.strerror)
            return None
        except DecodeError as error:
            self._complain("can't be read", str(error))
            return None
        age = max(age, 0.0)
        _LOG.warning("%s: using %d instances that were known %.0f s ago", self._path, len(snapshot.instances), age)
        return snapshot

    def save(self, snapshot: pb.Snapshot) -> None:
        """Replace what was saved."""
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
            self._complain("can't be written", error.strerror)

    def _complain(self, what: str, why: str | None) -> None:
        if not self._complained:
            self._complained = True
            _LOG.warning("%s %s: %s", self._path, what, why)

    def __repr__(self) -> str:
        return f"<Cache {self._path}>"
