"""Listening: what is in the way is found before core is asked, which says it only in lines of its own on stderr.

A unix socket is bound beside its path and then moved there. So a file that a killed server left is replaced, and the
end of a server removes its own file and no other: core removes whatever is at the path that it bound.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import stat
from pathlib import Path
from typing import Any

from mesh.addresses import is_local, parse

MAX_SOCKET_PATH = 107
"""The longest path of a unix socket on Linux, in bytes (``sun_path`` without its last NUL)."""

_numbers = itertools.count()


def limit_streams(most: int) -> list[tuple[str, int]]:
    """A server's options by which a connection has at most so many calls and streams at once.

    Core's overload protection also counts calls that have ended but are not yet freed, so it refuses calls
    (REFUSED_STREAM) of a client that keeps to the limit. Without it such a client's calls wait, and core closes the
    connection of a client that exceeds the limit.
    """
    return [("grpc.max_concurrent_streams", most), ("grpc.http.overload_protection", 0)]


class Listener:
    """What a server listens on. ``port`` is 0 for a unix socket."""

    def __init__(self, port: int = 0, path: Path | None = None) -> None:
        self.port = port
        self._path = path
        self._file = _identity(path)

    def close(self) -> None:
        """The server has stopped: remove its socket's file, unless another server has that path by now."""
        if self._path is not None and self._file is not None and _identity(self._path) == self._file:
            self._path.unlink(missing_ok=True)

    def __repr__(self) -> str:
        return f"<Listener {self._path or self.port}>"


def bind(server: Any, listen: str, *, share: bool = False) -> Listener:
    """Have ``server`` listen on ``listen``; ``share``: others may, too (``grpc.so_reuseport``).

    Raises OSError, saying what is in the way.
    """
    try:
        if listen.startswith("unix:"):
            return _bind_file(server, Path(listen.removeprefix("unix:").removeprefix("//")))
        _probe(listen, share)
        port = int(server.add_insecure_port(listen))
        return Listener(0 if is_local(listen) else port)
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(getattr(error, "errno", None) or errno.EINVAL, f"can't listen on {listen}: {reason}") from error


def _bind_file(server: Any, path: Path) -> Listener:
    if not os.access(path.parent, os.W_OK):
        raise OSError(errno.EACCES, f"{path.parent} isn't a folder that can be written to")
    if (size := len(os.fsencode(path))) > MAX_SOCKET_PATH:
        raise OSError(errno.ENAMETOOLONG, f"the path has {size} bytes; a socket's has at most {MAX_SOCKET_PATH}")
    _refuse_to_replace(path)
    # As short as can be, for the same reason.
    beside = path.with_name(f".{os.getpid():x}.{next(_numbers):x}")
    server.add_insecure_port(f"unix:{beside}")
    beside.replace(path)
    return Listener(path=path)


def _refuse_to_replace(path: Path) -> None:
    """Raise OSError when a server listens on ``path``, or something else is there."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise OSError(errno.EEXIST, "there is something that is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return  # nobody listens: it was left by a server that was killed
    except BlockingIOError:
        pass  # its queue is full
    raise OSError(errno.EADDRINUSE, "another server listens on it")


def _probe(listen: str, share: bool) -> None:
    """Raise OSError when ``listen`` is taken. (Core takes "localhost" when one of its addresses is free.)"""
    addresses: list[tuple[Any, ...]]
    if listen.startswith("unix-abstract:"):
        addresses = [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", "\0" + listen.removeprefix("unix-abstract:"))]
    elif is_local(listen):
        return  # vsock
    else:
        host, port = parse(listen, min_port=0)
        addresses = list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    refused = []
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                if family != socket.AF_UNIX:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if share:
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                probe.bind(address)
        except OSError as error:
            refused.append(error)
    # A name may have an address of a family that this host lacks: gRPC listens on the others, and so do we.
    if refused and (len(refused) == len(addresses) or any(error.errno == errno.EADDRINUSE for error in refused)):
        raise refused[0]


def _identity(path: Path | None) -> tuple[int, int] | None:
    """What tells a file from another that has its path."""
    try:
        status = path.stat() if path is not None else None
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status else None
