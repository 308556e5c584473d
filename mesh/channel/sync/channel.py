"""``grpc.Channel`` over a cluster: the channel, the multicallables of the four kinds, and the object that stands for
a call.

Blocking unary calls run over grpc's own blocking path; all else is driven by events. A call in flight is one object,
``Call``, which is a ``grpc.Call``, a ``grpc.Future`` and a ``grpc.RpcError``, as grpc's own is.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from mesh import background, forking
from mesh.channel.arguments import check_channel_credentials
from mesh.channel.assemble import Assembly
from mesh.channel.base import BaseChannel, MulticallableFactory
from mesh.channel.instrumentation import channels_around, wrapped
from mesh.channel.subchannel import SyncSubchannel
from mesh.channel.sync.driver import Driver
from mesh.channel.sync.multicallable import MULTICALLABLES
from mesh.channel.worker import Worker

_LOG = logging.getLogger("mesh.channel")


class Channel(BaseChannel, grpc.Channel):
    """A ``grpc.Channel`` whose calls go through the mesh. Touches no core, thread or loop before its first use."""

    blocking = True

    def __init__(
        self,
        target: str,
        options: Sequence[tuple[str, Any]] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        compression: grpc.Compression | None = None,
    ) -> None:
        self.assembly = Assembly(target, options, credentials, compression, SyncSubchannel)
        self.closed = False
        self._around = channels_around(target, credentials)
        self._lock = threading.Lock()
        self._stop: weakref.finalize[Any, Any] | None = None
        self._calls: weakref.WeakSet[Driver] = weakref.WeakSet()
        # Two threads, if they are needed: callbacks that wait don't hold up the channel's other calls.
        self.stepping = Worker("mesh-calls")
        self.callbacks = Worker("mesh-callbacks")
        self._watch = _StateWatch(self)

    def start(self) -> None:
        """Bring the channel to life; once. Raises ValueError when it is closed."""
        if self._stop is not None and not self.closed:
            return
        with self._lock:
            if self.closed:
                raise ValueError("Cannot invoke RPC on closed channel!")
            if self._stop is None:
                forking.check(aio=self.assembly.discovers_by_aio)
                self.assembly.rng.seed()  # channels that forked apart must not move in step
                background.spawn(self.assembly.run())
                forking.register(self, self.assembly.pool)
                # The multicallables hold the channel, so it lives as long as any stub.
                self._stop = weakref.finalize(self, background.call_from_finalizer, self.assembly.pool.close)
                self._stop.atexit = False
        self._watch.look()

    def forked(self) -> object:
        """In a forked child: begin anew, with connections of its own; returns what is the parent's."""
        left = self.assembly, self._stop, list(self._calls)
        if self._stop is not None:
            self._stop.detach()
        for driver in left[2]:
            driver.forked()
        self._lock, self._stop, self._calls = threading.Lock(), None, weakref.WeakSet()
        self.stepping, self.callbacks = self.stepping.again(), self.callbacks.again()
        if not self.closed:
            self.assembly = self.assembly.again()
            self._watch = self._watch.again()
        return left

    def adopt(self, driver: Driver) -> None:
        """Have the call cancelled when the channel closes."""
        self._calls.add(driver)

    def subscribe(
        self, callback: Callable[[grpc.ChannelConnectivity], None], try_to_connect: bool | None = False
    ) -> None:
        pool = self.assembly.pool
        if pool.connected_by_core:  # core knows the state of its own targets best
            self.start()
            pool.core_channel().subscribe(callback, bool(try_to_connect))
            return
        if try_to_connect:
            self.start()
            pool.exit_idle()
        self._watch.subscribe(callback)

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        pool = self.assembly.pool
        if pool.connected_by_core and self._stop is not None:
            pool.core_channel().unsubscribe(callback)
        self._watch.unsubscribe(callback)

    def _multicallable(self, kind: str, path: str, serializer: Any, deserializer: Any, registered: bool | None) -> Any:
        # A stub's multicallables stand inside what instrumentation puts around channels.
        factory = wrapped(self._around, _Innermost(self))
        return getattr(factory, kind)(path, serializer, deserializer, registered)

    def close(self) -> None:
        """Cancel the calls in flight, close every connection, and take no more calls."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        for driver in list(self._calls):
            driver.close()
        self._watch.close()
        if self._stop is not None:
            self._stop.detach()  # what it would call later keeps the pool
        self.assembly.pool.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Innermost(MulticallableFactory):
    """Makes the mesh's own multicallables. Instrumentation's channels call it as the ``grpc.Channel`` that they stand
    around."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def _multicallable(self, kind: str, path: str, serializer: Any, deserializer: Any, registered: bool | None) -> Any:
        return MULTICALLABLES[kind](self._channel, kind, path, serializer, deserializer, registered)


class _StateWatch:
    """Tells subscribers each new state of a channel, in order, from a thread that lives while there is news (as
    grpc's)."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._told: dict[Callable[[grpc.ChannelConnectivity], None], grpc.ChannelConnectivity | None] = {}
        self._armed = False
        self._delivering = False

    def again(self) -> _StateWatch:
        """The same for a forked child, where nobody is told before the channel is used."""
        again = _StateWatch(self._channel)
        again._told = dict.fromkeys(self._told)
        return again

    def subscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        with self._lock:
            self._told[callback] = None
        self.look()

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        with self._lock:
            self._told.pop(callback, None)

    def close(self) -> None:
        with self._lock:
            self._told.clear()

    def _replaced(self) -> None:
        with self._lock:
            self._armed = False
        self.look()

    def look(self) -> None:
        """Watch for the next change, and deliver what the subscribers haven't been told."""
        with self._lock:
            if not self._told:
                return
            arm, self._armed = not self._armed, True
            deliver, self._delivering = not self._delivering, True
        pool = self._channel.assembly.pool
        if arm and not pool.closed:
            pool.when_replaced(pool.cluster.picker, self._replaced)
        if deliver:
            threading.Thread(target=self._deliver, name="mesh-connectivity", daemon=True).start()

    def _deliver(self) -> None:
        while True:
            with self._lock:
                state = self._channel.connectivity()
                callbacks = [callback for callback, told in self._told.items() if told is not state]
                for callback in callbacks:
                    self._told[callback] = state
                self._delivering = bool(callbacks)
            if not callbacks:
                return
            for callback in callbacks:
                _run_callback(functools.partial(callback, state))


def _run_callback(callback: Callable[[], object]) -> None:
    try:
        callback()
    except Exception:
        _LOG.exception("Exception in callback %r", callback)


# -- the multicallables


# -- driving by events


def insecure_channel(
    target: str,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
) -> grpc.Channel:
    """A ``grpc.Channel`` through the mesh: a drop-in for ``grpc.insecure_channel``.

    ``target`` is ``mesh:///SERVICE``, ``static:///HOST:PORT,HOST:PORT``, ``dns:///HOST:PORT``, or any that grpc takes.
    ``options`` go to the endpoints' channels, but for ``grpc.service_config``, which is the mesh's to honour.

    Raises:
        ValueError: the target or the service config is malformed; the message says where.
    """
    return Channel(target, options, None, compression)


def secure_channel(
    target: str,
    credentials: grpc.ChannelCredentials,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
) -> grpc.Channel:
    """As ``insecure_channel``, over TLS: for ``mesh:///`` and ``dns:///`` the servers must prove the service's name,
    not an address.

    Raises:
        TypeError: ``credentials`` are no ``grpc.ChannelCredentials``.
        ValueError: as ``insecure_channel``.
    """
    check_channel_credentials(credentials)
    return Channel(target, options, credentials, compression)
