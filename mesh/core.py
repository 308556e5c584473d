"""gRPC's own channels, for the mesh's connections to endpoints and to the registry.

Instrumentation (OpenTelemetry, Sentry) replaces ``grpc.insecure_channel`` and similar functions with ones that return
wrapped channels. The mesh's own connections must not be wrapped: a wrapped channel hides its state, and internal RPCs
would be reported as the user's. So channels are made from grpc's classes, which aren't replaced.

The private names of grpcio are used only here; tests/test_core.py pins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from grpc._channel import Channel as _Channel
from grpc.aio._channel import Channel as _AioChannel

ChannelOptions = Sequence[tuple[str, Any]]


def channel(
    target: str,
    options: ChannelOptions = (),
    credentials: grpc.ChannelCredentials | None = None,
    compression: grpc.Compression | None = None,
) -> grpc.Channel:
    """A new ``grpc.Channel``; plaintext without ``credentials``."""
    return _Channel(target, options, _core(credentials), compression)


def aio_channel(
    target: str,
    options: ChannelOptions = (),
    credentials: grpc.ChannelCredentials | None = None,
    compression: grpc.Compression | None = None,
) -> grpc.aio.Channel:
    """A new ``grpc.aio.Channel`` on the running loop; plaintext without ``credentials``."""
    return _AioChannel(target, options, _core(credentials), compression, None)  # type: ignore[return-value]


def state(channel: Any, connect: bool) -> int:
    """The connectivity state of a ``grpc.Channel``, as core's number; ``connect``: an idle channel starts to connect.

    ``grpc.Channel`` reports its state only to subscribers, and each of those costs a thread.
    """
    return channel._channel.check_connectivity_state(connect)  # type: ignore[no-any-return]  # noqa: SLF001


def _core(credentials: grpc.ChannelCredentials | None) -> Any:
    return None if credentials is None else credentials._credentials  # type: ignore[attr-defined]  # noqa: SLF001
