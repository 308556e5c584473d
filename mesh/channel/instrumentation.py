"""Takes over the interceptors that instrumentation adds to gRPC's channels.

OpenTelemetry, Sentry and Datadog replace ``grpc.insecure_channel``, ``grpc.secure_channel`` and those of ``grpc.aio``
by functions that call the original and add interceptors to what it returns. A program that creates its channels with
the mesh's functions never calls those. So a mesh channel, when it is created, has the replacement create a channel for
the same target, which never connects, and reads from it which interceptors were added. They run around the calls of
users, outside of retries and hedges; the mesh's own calls have none.

If anything goes wrong here, the channel works without the interceptors, and one warning says so.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

import grpc
import grpc.aio

_LOG = logging.getLogger("mesh.channel")

Make = Callable[..., Any]

_NAMES = ("insecure_channel", "secure_channel")
_AT_IMPORT = {(module, name): getattr(module, name) for module in (grpc, grpc.aio) for name in _NAMES}

_reading = threading.local()
"""Set in a thread while a replacement creates a channel: the mesh's own functions then return a plain one."""


def replacement(module: Any, *, secure: bool) -> Make | None:
    """The function that replaced gRPC's own one that creates channels; None if it wasn't replaced.

    ``module``: ``grpc`` or ``grpc.aio``. Where a program has put the mesh's function there, the one that it replaced
    counts.
    """
    if getattr(_reading, "active", False):
        return None
    name = _NAMES[secure]
    make: Make = getattr(module, name)
    if _package(make) == "mesh":
        make = _AT_IMPORT[module, name]
    return None if _package(make) in ("grpc", "mesh") else make


def _package(make: Make) -> str:
    """The package that a function is defined in; empty for what isn't a function. (wrapt's wrappers have the attributes
    of what they wrap.)"""
    return str(make.__globals__.get("__name__", "")).partition(".")[0] if type(make) is FunctionType else ""


def _made(make: Make, target: str, credentials: grpc.ChannelCredentials | None) -> Any:
    _reading.active = True
    try:
        return make(target) if credentials is None else make(target, credentials)
    finally:
        _reading.active = False


def _warn(target: str, make: Make, error: Exception) -> None:
    _LOG.warning(
        "%s: calls are not instrumented: can't read the interceptors that %s.%s adds (%s: %s)",
        target,
        getattr(make, "__module__", "?"),
        getattr(make, "__qualname__", make),
        type(error).__name__,
        error,
    )


def instrumenting_channels(target: str, credentials: grpc.ChannelCredentials | None) -> Sequence[grpc.Channel]:
    """The channels that instrumentation wraps around a ``grpc.Channel`` for ``target``, outermost first.

    They must not be used themselves: ``wrapped`` wraps copies of them around the mesh's own.
    """
    make = replacement(grpc, secure=credentials is not None)
    if make is None:
        return ()
    try:
        channel, around = _made(make, target, credentials), []
        # grpc.intercept_channel's channels, and OpenTelemetry's own, hold the next one so. Core's is no grpc.Channel.
        while isinstance(inner := getattr(channel, "_channel", None), grpc.Channel):
            # Copies without the inner channel: core's channel closes with its last reference. (Closing it would be
            # wrong if the replacement takes its channels from a pool.)
            around.append(_around(channel, None))
            channel = inner
        if type(channel).__module__.partition(".")[0] == "mesh":
            return ()  # the program made the mesh's function grpc's and then instrumented that: it already wraps us
    except Exception as error:
        _warn(target, make, error)
        return ()
    return around


def wrapped(around: Iterable[grpc.Channel], inner: Any) -> Any:
    """``inner`` wrapped in copies of ``around``."""
    for channel in reversed(tuple(around)):
        inner = _around(channel, inner)
    return inner


def _around(channel: grpc.Channel, inner: Any) -> Any:
    outer: Any = copy.copy(channel)
    outer._channel = inner  # noqa: SLF001
    return outer


def aio_interceptors(
    make: Make, target: str, credentials: grpc.ChannelCredentials | None, kinds: Iterable[str]
) -> dict[str, list[Any]]:
    """The interceptors of each kind that ``make`` adds to a ``grpc.aio.Channel`` for ``target``. To be called on the
    loop."""
    try:
        channel = _made(make, target, credentials)
        return {kind: list(getattr(channel, f"_{kind}_interceptors")) for kind in kinds}
    except Exception as error:
        _warn(target, make, error)
        return {}
