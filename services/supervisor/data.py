"""The folder with the shop's data: locked for one shop, and private to its user."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from mesh import files
from services.supervisor.plan import CannotRunError

FOLDERS = ("logs", "nats", "registry")
"""The folders in the data folder, beside the databases."""


@contextlib.contextmanager
def lock(data: Path) -> Iterator[int]:
    """Lock the folder, as two brokers on one store lose messages; gives the lock's file descriptor.

    Raises ``mesh.files.InUseError`` and CannotRunError.
    """
    try:
        locked = files.lock(data)
    except OSError as error:
        raise _cannot_write(error) from None
    with locked:
        yield locked.fileno()


def prepare(data: Path, logs: Iterable[Path]) -> None:
    """Make the folder private and the logs empty. Raises CannotRunError."""
    try:
        _make_private(data)
        (data / "logs").mkdir(parents=True, exist_ok=True)
        for log in logs:
            log.write_bytes(b"")
    except OSError as error:
        raise _cannot_write(error) from None


def _make_private(data: Path) -> None:
    """Close to others what an earlier release left readable by everybody."""
    if not (data / "order.db").exists() or not data.stat().st_mode & 0o077:
        return
    data.chmod(0o700)
    ours = [*data.glob("*.db*"), *(path for name in FOLDERS for path in [data / name, *(data / name).rglob("*")])]
    for path in ours:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
        elif path.is_file() and not path.is_symlink():
            path.chmod(0o600)


def _cannot_write(error: OSError) -> CannotRunError:
    return CannotRunError(f"can't write to {error.filename}: {(error.strerror or '').lower()}")
