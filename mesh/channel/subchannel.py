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
"""Seconds after which the retries' channel is closed."""

_READY = int(Connectivity.READY)
_numbers = itertools.count()  # of core channels


class Method:
    """One method of a channel, as its multicallables share it.

    ``calls``: core's multicallables, by the number of the core channel. They are kept here and not by the subchannel,
    so that they live no longer than the multicallables that the program holds.
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

    Retries go out on a second core channel, with core's own retries off: with them on, core strips the header that
    tells the server how many attempts came before (A6). It is opened by the first retry to this endpoint, and closed
    when idle.
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
        self._number, self._retry_number = next(_numbers), next(_numbers)
        self._methods: weakref.WeakSet[Method] = weakref.WeakSet()  # those that have a call here
        self._lock = threading.Lock()

    @abc.abstractmethod
    def _open(self, options: ChannelOptions) -> Any:
        """A new core channel to the address."""

    @abc.abstractmethod
    async def _close(self, channel: Any) -> None:
        """Close a core channel; its calls are cancelled."""

    @abc.abstractmethod
    def check(self, connect: bool) -> int:
        """The connection's state as core's number; with ``connect``, an idle one begins to connect."""

    @abc.abstractmethod
    def aside(self) -> contextlib.AbstractAsyncContextManager[grpc.aio.Channel]:
        """An asyncio channel to the address, for what isn't a caller's."""

    @abc.abstractmethod
    def unwatched(self) -> contextlib.AbstractAsyncContextManager[grpc.aio.Channel]:
        """An asyncio channel to the address that doesn't watch its health, to ask about just that."""

    def connect(self) -> None:
        """Open the channel and begin to connect."""
        self.core()
        self.check(True)

    def ready(self) -> bool:
        """Whether a call would leave now."""
        return self._channel is not None and self.check(False) == _READY

    def state(self) -> Connectivity:
        """The connection's state."""
        if self._channel is None:
            return Connectivity.IDLE
        try:
            return Connectivity.SHUTDOWN if self.closed else Connectivity(self.check(False))
        except ValueError:  # it was closed meanwhile
            return Connectivity.SHUTDOWN

    def call(self, method: Method, previous: int) -> Any:
        """The core multicallable of ``method``; that of the retries' channel when attempts came before this one."""
        if previous:
            return self._retry_call(method)
        return method.calls.get(self._number) or self._first_call(method)

    def core(self) -> Any:
        """The core channel, opened if it isn't yet."""
        with self._lock:
            if self._channel is None:
                self._channel = self._open(self._options)
            return self._channel

    def _first_call(self, method: Method) -> Any:
        core = self.core()
        with self._lock:  # grpc: registering a method is not thread-safe
            self._methods.add(method)
            return method.calls.setdefault(self._number, _multicallable(core, method))

    def _retry_call(self, method: Method) -> Any:
        with self._lock:
            self._retried = time.monotonic()
            if self._retry_channel is None:
                self._retry_channel = self._open(self._retry_options)
            if self._retry_number not in method.calls:
                self._methods.add(method)
                method.calls[self._retry_number] = _multicallable(self._retry_channel, method)
            return method.calls[self._retry_number]

    async def close_idle_retries(self, now: float, *, in_flight: int) -> None:
        """Close the retries' channel when it was long unused."""
        with self._lock:
            if self._retry_channel is None or in_flight or now - self._retried < RETRY_IDLE:
                return
            idle, self._retry_channel = self._retry_channel, None
            self._forget_calls(self._retry_number)
        await self._close(idle)

    async def close(self) -> None:
        """Close what is open; calls on it are cancelled."""
        self.closed = True
        for channel in (self._channel, self._retry_channel):
            if channel is not None:
                await self._close(channel)
        with self._lock:
            self._forget_calls(self._number)
            self._forget_calls(self._retry_number)

    def _forget_calls(self, number: int) -> None:
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
    async def aside(self) -> AsyncIterator[grpc.aio.Channel]:
        # A connection of its own: a stream of grpc.Channel would take a thread.
        aside = AioSubchannel(self.address, self._options, self._credentials, self._compression)
        try:
            yield aside.core()
        finally:
            await aside.close()

    def unwatched(self) -> contextlib.AbstractAsyncContextManager[grpc.aio.Channel]:
        return _unwatched(self.address, self.options, self._credentials, self._compression)

    def check(self, connect: bool) -> int:
        return core.state(self._channel, connect)


class AioSubchannel(Subchannel):
    """A subchannel of ``grpc.aio.Channel``."""

    def _open(self, options: ChannelOptions) -> grpc.aio.Channel:
        return core.aio_channel(self.address, options, self._credentials, self._compression)

    async def _close(self, channel: grpc.aio.Channel) -> None:
        await channel.close()

    @contextlib.asynccontextmanager
    async def aside(self) -> AsyncIterator[grpc.aio.Channel]:
        yield self.core()

    def unwatched(self) -> contextlib.AbstractAsyncContextManager[grpc.aio.Channel]:
        return _unwatched(self.address, self.options, self._credentials, self._compression)

    def check(self, connect: bool) -> int:
        state: int = self._channel.get_state(connect).value[0]
        return state


@contextlib.asynccontextmanager
async def _unwatched(
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
