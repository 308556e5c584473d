"""Files that outlive a process: a folder that one process has to itself, a file that is replaced as a whole, and one
that is read with a limit."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
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


class RefusedError(OSError):
    """A file or folder that is not used as it is; ``strerror`` says why and what to do."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EPERM, why)


def read(path: Path, most: int, *, private: bool = False) -> tuple[bytes, float]:
    """The content of a regular file of at most ``most`` bytes, and when it was last changed, in seconds since 1970.
    With ``private``, the file must be this user's or root's, and nobody else's to write.

    It does not wait: a FIFO without a writer would hold its reader forever. Raises RefusedError, or another OSError.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        facts = os.fstat(number)
        if not stat.S_ISREG(facts.st_mode):
            raise RefusedError("not a regular file")
        if private:
            check_private(facts)
        if facts.st_size > most:
            raise RefusedError(f"{facts.st_size} bytes; the limit is {most}")
        with open(number, "rb", closefd=False) as file:
            data = file.read(most + 1)
        if len(data) > most:  # it grows, or the system doesn't say how large it is
            raise RefusedError(f"more than {most} bytes, which is the limit")
        return data, facts.st_mtime
    finally:
        os.close(number)


def check_private(facts: os.stat_result) -> None:
    """Raise RefusedError unless a file or folder is this user's or root's, and not everybody's to write."""
    if facts.st_uid not in (os.geteuid(), 0):
        raise RefusedError(f"owned by user {facts.st_uid}; expected user {os.geteuid()}")
    if facts.st_mode & stat.S_IWOTH:
        raise RefusedError(f"writable by everybody (mode {stat.S_IMODE(facts.st_mode):04o}); run chmod o-w on it")
