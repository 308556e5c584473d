"""One endpoint's own core channel, which watches ``grpc.health.v1`` on the connection that carries the calls (A17)."""

from __future__ import annotations

import abc
import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import AsyncIterator
from typing import Any

import grpc

from mesh import core
from mesh.config.settings import MethodPolicy
from mesh.core import ChannelOptions
from mesh.model import Connectivity

RETRY_IDLE = 60.0
"""Seconds after which an unused retry channel is closed."""

_READY = int(Connectivity.READY)
_keys = itertools.count()  # of core channels


class Method:
    """One method of a channel, shared by its multicallables.

    ``calls``: core's multicallables by the key of the core channel. They are kept here and not in the subchannel, so
    that they live no longer than the multicallables that the program holds.
    """

    __slots__ = ("__weakref__", "calls", "deserializer", "kind", "path", "policy", "registered", "serializer")

    def __init__(
        self, kind: str, path: str, serializer: Any, deserializer: Any, registered: bool, policy: MethodPolicy
    ) -> None:
        self.kind = kind
        self.path = path
        self.serializer = serializer
        self.deserializer = deserializer
        self.registered = registered
        self.policy = policy
        self.calls: dict[int, Any] = {}

    def __repr__(self) -> str:
        return f"<Method {self.path} {self.kind}>"


class Subchannel(abc.ABC):
    """One endpoint's core channel: one address, whose connection and keepalive core owns.

    Retries use a second core channel, on which core's own retries are off: with them on, core strips the header that
    tells the server how many attempts came before (docs/correctness.md, R4). The first retry to this endpoint opens it;
    it is closed when unused.
    """

    def __init__(
        self,
        address: str,
        options: ChannelOptions,
        credentials: grpc.ChannelCredentials | None,
        compression: grpc.Compression | None,
    ) -> None:
        self.address = address
        self.options = options
        self._options = (*options, ("grpc.enable_retries", 1))
        self._retry_options = (*options, ("grpc.enable_retries", 0))
        self._credentials = credentials
        self._compression = compression
        self.closed = False
        self._channel: Any = None
        self._retry_channel: Any = None
        self._retried = 0.0
        self._key, self._retry_key = next(_keys), next(_keys)
        self._methods: weakref.WeakSet[Method] = weakref.WeakSet()  # those that have a call here
        self._lock = threading.Lock()

    @abc.abstractmethod
    def _open(self, options: ChannelOptions) -> Any:
        """Open a core channel to the address."""

    @abc.abstractmethod
    async def _close(self, channel: Any) -> None:
        """Close a core channel, which cancels its calls."""

    @abc.abstractmethod
    def check(self, connect: bool) -> int:
        """The connection's state as core's number; with ``connect``, an idle one starts to connect."""

    @abc.abstractmethod
    def control_channel(self) -> contextlib.AbstractAsyncContextManager[grpc.aio.Channel]:
        """An asyncio channel to the address for the mesh's own calls."""

    @abc.abstractmethod
    def channel_without_health(self) -> contextlib.AbstractAsyncContextManager[grpc.aio.Channel]:
        """An asyncio channel to the address without client-side health checking, to ask for its health."""

    def connect(self) -> None:
        """Open the channel and start to connect."""
        self.core()
        self.check(True)

    def ready(self) -> bool:
        """Whether a call would be sent at once."""
        return self._channel is not None and self.check(False) == _READY

    def state(self) -> Connectivity:
        """The connection's state."""
        if self._channel is None:
            return Connectivity.IDLE
        try:
            return Connectivity.SHUTDOWN if self.closed else Connectivity(self.check(False))
        except ValueError:  # closed in the meantime
            return Connectivity.SHUTDOWN

    def call(self, method: Method, previous: int) -> Any:
        """The core multicallable of ``method``; the retry channel's when attempts came before this one."""
        if previous:
            return self._retry_call(method)
        return method.calls.get(self._key) or self._first_call(method)

    def core(self) -> Any:
        """The core channel, opened on first use."""
        with self._lock:
            if self._channel is None:
                self._channel = self._open(self._options)
            return self._channel

    def _first_call(self, method: Method) -> Any:
        core = self.core()
        with self._lock:  # registering a method with grpc is not thread-safe
            self._methods.add(method)
            return method.calls.setdefault(self._key, _multicallable(core, method))

    def _retry_call(self, method: Method) -> Any:
        with self._lock:
            self._retried = time.monotonic()
            if self._retry_channel is None:
                self._retry_channel = self._open(self._retry_options)
            if self._retry_key not in method.calls:
                self._methods.add(method)
                method.calls[self._retry_key] = _multicallable(self._retry_channel, method)
            return method.calls[self._retry_key]

    async def close_idle_retries(self, now: float, *, in_flight: int) -> None:
        """Close the retry channel if it has not been used for a while."""
        with self._lock:
            if self._retry_channel is None or in_flight or now - self._retried < RETRY_IDLE:
                return
            idle, self._retry_channel = self._retry_channel, None
            self._forget_multicallables(self._retry_key)
        await self._close(idle)

    async def close(self) -> None:
        """Close the core channels, which cancels their calls."""
        self.closed = True
        for channel in (self._channel, self._retry_channel):
            if channel is not None:
                await self._close(channel)
        with self._lock:
            self._forget_multicallables(self._key)
            self._forget_multicallables(self._retry_key)

    def _forget_multicallables(self, number: int) -> None:
        for method in tuple(self._methods):
            method.calls.pop(number, None)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address} {self.state().name}>"


class SyncSubchannel(Subchannel):
    """A subchannel of ``grpc.Channel``."""

    def _open(self, options: ChannelOptions) -> grpc.Channel:
        return core.channel(self.address, options, self._credentials, self._compression)

    async def _close(self, channel: grpc.Channel) -> None:
        channel.close()

    @contextlib.asynccontextmanager
    async def control_channel(self) -> AsyncIterator[grpc.aio.Channel]:
        # A connection of its own: a stream of grpc.Channel would take a thread.
        separate = AioSubchannel(self.address, self._options, self._credentials, self._compression)
        try:
            yield separate.core()
        finally:
            await separate.close()

    def channel_without_health(self) -> contextlib.AbstractAsyncContextManager[grpc.aio.Channel]:
        return _channel_without_health(self.address, self.options, self._credentials, self._compression)

    def check(self, connect: bool) -> int:
        return core.state(self._channel, connect)


class AioSubchannel(Subchannel):
    """A subchannel of ``grpc.aio.Channel``."""

    def _open(self, options: ChannelOptions) -> grpc.aio.Channel:
        return core.aio_channel(self.address, options, self._credentials, self._compression)

    async def _close(self, channel: grpc.aio.Channel) -> None:
        await channel.close()

    @contextlib.asynccontextmanager
    async def control_channel(self) -> AsyncIterator[grpc.aio.Channel]:
        yield self.core()

    def channel_without_health(self) -> contextlib.AbstractAsyncContextManager[grpc.aio.Channel]:
        return _channel_without_health(self.address, self.options, self._credentials, self._compression)

    def check(self, connect: bool) -> int:
        state: int = self._channel.get_state(connect).value[0]
        return state


@contextlib.asynccontextmanager
async def _channel_without_health(
    address: str,
    options: ChannelOptions,
    credentials: grpc.ChannelCredentials | None,
    compression: grpc.Compression | None,
) -> AsyncIterator[grpc.aio.Channel]:
    plain = [option for option in options if option[0] != "grpc.service_config"]
    subchannel = AioSubchannel(address, plain, credentials, compression)
    try:
        yield subchannel.core()
    finally:
        await subchannel.close()


def _multicallable(channel: Any, method: Method) -> Any:
    make = getattr(channel, method.kind)
    return make(method.path, method.serializer, method.deserializer, _registered_method=method.registered)
