"""What ``grpc.Channel`` and ``grpc.aio.Channel`` over a cluster share: channels, multicallables and calls."""

from __future__ import annotations

import weakref
from typing import Any

import grpc

from mesh.channel.assemble import Assembly
from mesh.channel.driver import EventDriver, Owner
from mesh.channel.replay import Request
from mesh.channel.stats import channel_stats
from mesh.model import Connectivity
from mesh.observe import ChannelStats, Explanation
from mesh.wire import CONNECTIVITY


class MulticallableFactory:
    """Makes multicallables of the four kinds."""

    def _multicallable(self, kind: str, path: str, serializer: Any, deserializer: Any, registered: bool | None) -> Any:
        raise NotImplementedError

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self._multicallable("unary_unary", method, request_serializer, response_deserializer, _registered_method)

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self._multicallable(
            "unary_stream", method, request_serializer, response_deserializer, _registered_method
        )

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self._multicallable(
            "stream_unary", method, request_serializer, response_deserializer, _registered_method
        )

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self._multicallable(
            "stream_stream", method, request_serializer, response_deserializer, _registered_method
        )


class BaseChannel(MulticallableFactory):
    """A channel to a service."""

    _name = "mesh.Channel"
    assembly: Assembly
    closed = False
    _stop: weakref.finalize[Any, Any] | None = None
    """Closes the pool of a channel that has been garbage-collected. None: the channel has not been used."""

    def connectivity(self) -> grpc.ChannelConnectivity:
        """The channel's state over all its endpoints."""
        if self.closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        return CONNECTIVITY[self.assembly.pool.state() if self._stop is not None else Connectivity.IDLE]

    def stats(self) -> ChannelStats:
        """A snapshot of the channel's endpoints, ejections, refusals and retry budget."""
        return channel_stats(self.assembly, self.connectivity())

    def __repr__(self) -> str:
        return f"<{self._name} {self.assembly.target} {self.connectivity().name}>"


class BaseMulticallable:
    """One method of a channel."""

    def __init__(
        self, channel: Owner, kind: str, path: str, serializer: Any, deserializer: Any, registered: bool | None
    ) -> None:
        self._serializer = serializer
        # Requests of a stream are serialized by the replay buffer, once for all attempts.
        sent = Request.serialized if kind.startswith("stream") else serializer
        self._method = channel.assembly.method(kind, path, sent, deserializer, bool(registered))


class BaseCall:
    """What sync and asyncio call objects share."""

    _driver: EventDriver

    def explain(self) -> Explanation:
        """Every attempt that was made for the call so far: where, when, and how it ended."""
        return self._driver.explain()

    def time_remaining(self) -> float | None:
        """Seconds to the call's deadline; None without one."""
        return self._driver.time_remaining()

    def cancel(self) -> bool:
        """End the call; False when it is over already."""
        return self._driver.cancel()

    def done(self) -> bool:
        """Whether the call is over."""
        return self._driver.verdict is not None
