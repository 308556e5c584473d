"""Files that outlive a process: a folder that one process has to itself, and a file that is replaced as a whole."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

LOCK = "lock"
"""The file in a folder that whoever uses the folder has locked. It holds the process's id."""


class InUseError(Exception):
    """Another process has the folder. ``holder``: its process id, as far as that can be read."""

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(f"{folder} is in use by another process (pid {holder or 'unknown'})")
        self.holder = holder


def lock(folder: Path) -> IO[str]:
    """Have ``folder`` for this process alone, until the file that is returned is closed or the process ends, however it
    does. The folder is made when it isn't there, for this user alone.

    Raises InUseError, or OSError.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            raise InUseError(folder, file.read(20).strip()) from None
    except BaseException:
        file.close()
        raise
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def replace(path: Path, data: bytes) -> None:
    """Write a file such that, whenever the machine stops, it has its old content or its new one. It is for this user
    alone. Raises OSError."""
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)
