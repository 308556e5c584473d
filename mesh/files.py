"""Files that outlive a process: locking a folder, replacing a file atomically, reading one with a size limit."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from pathlib import Path
from typing import IO

LOCK = "lock"
"""The file in a folder that the process using the folder has locked. It contains the process's id."""


class InUseError(Exception):
    """Another process uses the folder. ``holder``: its process id, if that can be read."""

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(f"{folder} is in use by another process (pid {holder or 'unknown'})")
        self.holder = holder


def lock(folder: Path) -> IO[str]:
    """Lock ``folder`` for this process, until the returned file is closed or the process ends in any way. Creates the
    folder if necessary, accessible to this user only.

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
    """Replace a file atomically and durably: after a crash it has either its old or its new content. It is accessible
    to this user only. Raises OSError."""
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
        os.fsync(folder)  # makes the new name durable, too
    finally:
        os.close(folder)


class RefusedError(OSError):
    """A file or folder is not used because of its state; ``strerror`` says why and what to do."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EPERM, why)


def read(path: Path, max_bytes: int, *, private: bool = False) -> tuple[bytes, float]:
    """The content of a regular file of at most ``max_bytes``, and its modification time in seconds since the epoch.
    With ``private``, the file must belong to this user or root, and not be world-writable.

    Never blocks, as a FIFO without a writer would. Raises RefusedError, or another OSError.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise RefusedError("not a regular file")
        if private:
            check_private(status)
        if status.st_size > max_bytes:
            raise RefusedError(f"{status.st_size} bytes; the limit is {max_bytes}")
        with open(number, "rb", closefd=False) as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:  # it grew, or the system doesn't report its size
            raise RefusedError(f"more than {max_bytes} bytes, which is the limit")
        return data, status.st_mtime
    finally:
        os.close(number)


def check_private(status: os.stat_result) -> None:
    """Raise RefusedError unless a file or folder belongs to this user or root and is not world-writable."""
    if status.st_uid not in (os.geteuid(), 0):
        raise RefusedError(f"owned by user {status.st_uid}; expected user {os.geteuid()}")
    if status.st_mode & stat.S_IWOTH:
        raise RefusedError(f"writable by everybody (mode {stat.S_IMODE(status.st_mode):04o}); run chmod o-w on it")
