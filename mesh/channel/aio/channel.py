"""``grpc.aio.Channel`` through the mesh, and the public functions that create it.

A channel belongs to the loop of its first use. Awaiting a call awaits core's own call, so a call that succeeds costs no
task beside core's.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from mesh import forking
from mesh.channel.aio.call import call_from_finalizer
from mesh.channel.aio.driver import Driver
from mesh.channel.aio.interceptors import INSTRUMENTATION, interceptors_by_kind
from mesh.channel.aio.multicallable import MULTICALLABLES
from mesh.channel.arguments import check_channel_credentials
from mesh.channel.assemble import Assembly
from mesh.channel.base import BaseChannel
from mesh.channel.instrumentation import Make, aio_interceptors, replacement
from mesh.channel.pool import Pool
from mesh.channel.subchannel import AioSubchannel
from mesh.tasks import log_failure

_LOG = logging.getLogger("mesh.channel")


class Channel(BaseChannel, grpc.aio.Channel):
    """A ``grpc.aio.Channel`` whose calls go through the mesh. Uses no core, thread or loop before its first call."""

    blocking = False
    _name = "mesh.aio.Channel"

    def __init__(
        self,
        target: str,
        options: Sequence[tuple[str, Any]] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        compression: grpc.Compression | None = None,
        interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None,
    ) -> None:
        self.assembly = Assembly(target, options, credentials, compression, AioSubchannel)
        self.interceptors = interceptors_by_kind(tuple(interceptors or ()))
        for kind, of_kind in self.interceptors.items():
            setattr(self, f"_{kind}_interceptors", of_kind)  # as in grpc's channel: programs append to them
        self._instrument: Callable[[], None] | None = None
        make = replacement(grpc.aio, secure=credentials is not None)
        if make is not None:
            self._instrument = functools.partial(self._take_interceptors, make, target, credentials)
            for of_kind in self.interceptors.values():
                of_kind.insert(0, INSTRUMENTATION)
        self.closed = False
        self.calls: set[Driver] = set()
        self.intercepted: weakref.WeakSet[Any] = weakref.WeakSet()  # grpc's call objects around interceptors
        self.loop: asyncio.AbstractEventLoop | None = None
        self._running: asyncio.Task[None] | None = None
        self._inherited: object = None  # in a forked child, what belongs to the parent

    def forked(self) -> object:
        """In a forked child: only the parent can use the channel; returns what must not be freed here."""
        left = self.assembly, self._running, self._stop, tuple(self.calls), tuple(self.intercepted)
        if self._stop is not None:
            self._stop.detach()
        for driver in self.calls:
            driver.forked()
        self.calls, self.intercepted = set(), weakref.WeakSet()
        self._inherited, self._running, self._stop = left, None, None
        if not self.closed:
            self.assembly = self.assembly.for_child()  # asked for its state, it says IDLE and calls nothing in core
        return left

    def start(self) -> None:
        """Start the channel on the running loop, once.

        Raises UsageError when it is closed, RuntimeError on another loop than its first.
        """
        if self.closed:
            raise grpc.aio.UsageError("Channel is closed.")
        if self._running is not None:
            self._check_loop()
        else:
            if self._inherited is not None:
                raise forking.inherited()
            forking.check(aio=True)
            forking.register(self)
            self.assembly.rng.seed()  # forked processes must not draw the same numbers
            if self._instrument is not None:
                self._instrument()
            self.loop = asyncio.get_running_loop()
            # In its own context: it outlives the inbound call that may be handled here.
            self._running = self.loop.create_task(self.assembly.run(), context=contextvars.Context())
            self._running.add_done_callback(log_failure)
            # Multicallables reference the channel, so it lives as long as any stub.
            self._stop = weakref.finalize(self, _stop, self.loop, self.assembly.pool)
            self._stop.atexit = False

    def _take_interceptors(self, make: Make, target: str, credentials: grpc.ChannelCredentials | None) -> None:
        added = aio_interceptors(make, target, credentials, self.interceptors)
        for kind, of_kind in self.interceptors.items():
            place = of_kind.index(INSTRUMENTATION)
            of_kind[place : place + 1] = added.get(kind, ())
        self._instrument = None

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The channel's event loop, under its name in grpc.aio. Before the first use: the current one."""
        return self.loop or asyncio.get_event_loop()

    def _check_loop(self) -> None:
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:  # a call may be created outside of the loop and awaited on it
            return
        loop = self.loop
        if running is not loop:
            raise RuntimeError(
                f"{self!r} belongs to another event loop, {loop!r} at {id(loop):#x}. Create a channel for each loop."
            )

    async def close(self, grace: float | None = None) -> None:
        """Give the calls in flight ``grace`` seconds to end, cancel the rest and close all connections."""
        if grace is not None and grace < 0:
            raise ValueError(f"grace must be non-negative, got {grace}.")
        if self.closed:
            return
        if self.loop is not None and self.loop.is_closed():  # and with it all calls
            self.closed = True
            return
        if self._running is not None:
            self._check_loop()
        self.closed = True
        if self._inherited is not None:
            return
        intercepted = tuple(self.intercepted)
        if grace and (intercepted or self.calls):
            ends = [*(driver.outcome() for driver in self.calls), *(call.code() for call in intercepted)]
            await asyncio.wait([asyncio.ensure_future(end) for end in ends], timeout=grace)
        for call in (*intercepted, *self.calls):
            call.cancel()
        if self._stop is not None:
            self._stop.detach()  # it keeps the pool alive
        self.assembly.pool.close()
        if self._running is not None and not self._running.done():
            await asyncio.wait([self._running])

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- connectivity

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        state = self.connectivity()
        if try_to_connect and not self.closed:
            self.start()
            self.assembly.pool.exit_idle()
        return state  # as it was before connecting, as in grpc.aio

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        if self.closed:
            raise grpc.aio.UsageError("Channel is closed.")
        if self._running is not None:
            self._check_loop()
        pool = self.assembly.pool
        if pool.connected_by_core:  # core knows the state of the targets that it connects
            self.start()
            await pool.core_channel().wait_for_state_change(last_observed_state)
            return
        while self.get_state() is last_observed_state:
            replaced = asyncio.Event()
            pool.on_picker_change(pool.cluster.picker, replaced.set)
            try:
                if self.get_state() is last_observed_state:
                    await replaced.wait()
            finally:
                pool.forget(replaced.set)

    async def channel_ready(self) -> None:
        while (state := self.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            await self.wait_for_state_change(state)

    def _multicallable(self, kind: str, path: str, serializer: Any, deserializer: Any, registered: bool | None) -> Any:
        return MULTICALLABLES[kind](self, kind, path, serializer, deserializer, registered)


def _stop(loop: asyncio.AbstractEventLoop, pool: Pool) -> None:
    call_from_finalizer(loop, pool.close)


# -- interceptors


# -- the multicallables


# -- driving by events


# -- the call objects


def insecure_channel(
    target: str,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None,
) -> Channel:
    """Create a ``grpc.aio.Channel`` through the mesh: a drop-in for ``grpc.aio.insecure_channel``.

    ``target`` and ``options`` as for ``mesh.insecure_channel``.

    Raises:
        ValueError: the target or the service config is malformed; the message says where.
    """
    return Channel(target, options, None, compression, interceptors)


def secure_channel(
    target: str,
    credentials: grpc.ChannelCredentials,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None,
) -> Channel:
    """As ``insecure_channel``, over TLS. For ``mesh:///`` and ``dns:///`` targets, servers must have a certificate for
    the service's name, not for an address.

    Raises:
        TypeError: ``credentials`` are not ``grpc.ChannelCredentials``.
        ValueError: as ``insecure_channel``.
    """
    check_channel_credentials(credentials)
    return Channel(target, options, credentials, compression, interceptors)
