"""Listening: checks that an address is free before core binds it, because core reports failures only on stderr.

A unix socket is bound next to its path and then moved there. So the file of a killed server is replaced, and a server
that stops removes only its own file: core removes whatever is at the path that it bound.
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


def limit_streams(limit: int) -> list[tuple[str, int]]:
    """Server options that limit the calls and streams at once on a connection.

    Core's overload protection is turned off: it also counts calls that have ended but are not freed yet, so it refuses
    calls (REFUSED_STREAM) of clients that respect the limit. Without it, such a client's calls wait, and core closes
    the connection of a client that exceeds the limit.
    """
    return [("grpc.max_concurrent_streams", limit), ("grpc.http.overload_protection", 0)]


class Listener:
    """What a server listens on. ``port`` is 0 for a unix socket."""

    def __init__(self, port: int = 0, path: Path | None = None) -> None:
        self.port = port
        self._path = path
        self._file = _identity(path)

    def close(self) -> None:
        """The server has stopped: remove its socket's file, unless another server has bound the path since."""
        if self._path is not None and self._file is not None and _identity(self._path) == self._file:
            self._path.unlink(missing_ok=True)

    def __repr__(self) -> str:
        return f"<Listener {self._path or self.port}>"


def bind(server: Any, listen: str, *, share: bool = False) -> Listener:
    """Have ``server`` listen on ``listen``. ``share``: other servers may, too (``grpc.so_reuseport``).

    Raises OSError with the reason if it can't.
    """
    try:
        if listen.startswith("unix:"):
            return _bind_file(server, Path(listen.removeprefix("unix:").removeprefix("//")))
        check_free(listen, share=share)
        port = int(server.add_insecure_port(listen))
        return Listener(0 if is_local(listen) else port)
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(getattr(error, "errno", None) or errno.EINVAL, f"can't listen on {listen}: {reason}") from error


def _bind_file(server: Any, path: Path) -> Listener:
    if not os.access(path.parent, os.W_OK):
        raise OSError(errno.EACCES, f"{path.parent} is not a writable folder")
    if (size := len(os.fsencode(path))) > MAX_SOCKET_PATH:
        raise OSError(errno.ENAMETOOLONG, f"the path has {size} bytes; a socket's has at most {MAX_SOCKET_PATH}")
    _refuse_to_replace(path)
    # As short as possible, because of the same limit.
    beside = path.with_name(f".{os.getpid():x}.{next(_numbers):x}")
    server.add_insecure_port(f"unix:{beside}")
    beside.replace(path)
    return Listener(path=path)


def _refuse_to_replace(path: Path) -> None:
    """Raise OSError if a server listens on ``path``, or it is not a socket."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise OSError(errno.EEXIST, "the path exists and is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return  # nobody listens: a killed server left it
    except BlockingIOError:
        pass  # its backlog is full
    raise OSError(errno.EADDRINUSE, "another server is listening on it")


def check_free(listen: str, *, share: bool = False) -> None:
    """Raise OSError if ``listen`` is in use; with ``share``, by a server that doesn't share it.

    (Core binds "localhost" even if only one of its addresses is free.)
    """
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
    # A name may have addresses of a family that this host lacks: like gRPC, listen on the others.
    if refused and (len(refused) == len(addresses) or any(error.errno == errno.EADDRINUSE for error in refused)):
        raise refused[0]


def _identity(path: Path | None) -> tuple[int, int] | None:
    """Identifies a file, as opposed to its path."""
    try:
        status = path.stat() if path is not None else None
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status else None
