"""``grpc.Channel`` through the mesh, and the public functions that create it."""

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
from mesh.channel.instrumentation import instrumenting_channels, wrapped
from mesh.channel.subchannel import SyncSubchannel
from mesh.channel.sync.driver import Driver
from mesh.channel.sync.multicallable import MULTICALLABLES
from mesh.channel.worker import Worker

_LOG = logging.getLogger("mesh.channel")


class Channel(BaseChannel, grpc.Channel):
    """A ``grpc.Channel`` whose calls go through the mesh. Uses no core, thread or loop before its first call."""

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
        self._around = instrumenting_channels(target, credentials)
        self._lock = threading.Lock()
        self._stop: weakref.finalize[Any, Any] | None = None
        self._calls: weakref.WeakSet[Driver] = weakref.WeakSet()
        # Two threads, started on demand: callbacks that block don't hold up the channel's other calls.
        self.flow_worker = Worker("mesh-calls")
        self.callbacks = Worker("mesh-callbacks")
        self._watch = _ConnectivityWatch(self)

    def start(self) -> None:
        """Start the channel, once. Raises ValueError when it is closed."""
        if self._stop is not None and not self.closed:
            return
        with self._lock:
            if self.closed:
                raise ValueError("Cannot invoke RPC on closed channel!")
            if self._stop is None:
                forking.check(aio=self.assembly.discovers_over_aio)
                self.assembly.rng.seed()  # forked processes must not draw the same numbers
                background.spawn(self.assembly.run())
                forking.register(self, self.assembly.pool)
                # Multicallables reference the channel, so it lives as long as any stub.
                self._stop = weakref.finalize(self, background.call_from_finalizer, self.assembly.pool.close)
                self._stop.atexit = False
        self._watch.check()

    def forked(self) -> object:
        """In a forked child: start over with new connections; returns what belongs to the parent."""
        left = self.assembly, self._stop, list(self._calls)
        if self._stop is not None:
            self._stop.detach()
        for driver in left[2]:
            driver.forked()
        self._lock, self._stop, self._calls = threading.Lock(), None, weakref.WeakSet()
        self.flow_worker, self.callbacks = self.flow_worker.for_child(), self.callbacks.for_child()
        if not self.closed:
            self.assembly = self.assembly.for_child()
            self._watch = self._watch.for_child()
        return left

    def adopt(self, driver: Driver) -> None:
        """Cancel the call when the channel closes."""
        self._calls.add(driver)

    def subscribe(
        self, callback: Callable[[grpc.ChannelConnectivity], None], try_to_connect: bool | None = False
    ) -> None:
        pool = self.assembly.pool
        if pool.connected_by_core:  # core knows the state of the targets that it connects
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
        # Instrumentation's channels wrap the mesh's own multicallables.
        factory = wrapped(self._around, _Innermost(self))
        return getattr(factory, kind)(path, serializer, deserializer, registered)

    def close(self) -> None:
        """Cancel the calls in flight and close all connections; no more calls can be made."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        for driver in list(self._calls):
            driver.close()
        self._watch.close()
        if self._stop is not None:
            self._stop.detach()  # it keeps the pool alive
        self.assembly.pool.close()
        self.flow_worker.close()
        self.callbacks.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Innermost(MulticallableFactory):
    """Creates the mesh's own multicallables. Instrumentation's channels use it as the ``grpc.Channel`` that they
    wrap."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def _multicallable(self, kind: str, path: str, serializer: Any, deserializer: Any, registered: bool | None) -> Any:
        return MULTICALLABLES[kind](self._channel, kind, path, serializer, deserializer, registered)


class _ConnectivityWatch:
    """Reports each new state of a channel to subscribers, in order, on a thread that lives while there are changes, as
    grpc does."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._reported: dict[Callable[[grpc.ChannelConnectivity], None], grpc.ChannelConnectivity | None] = {}
        self._armed = False
        self._delivering = False

    def for_child(self) -> _ConnectivityWatch:
        """The same for a forked child, where states are reported once the channel is used."""
        watch = _ConnectivityWatch(self._channel)
        watch._reported = dict.fromkeys(self._reported)
        return watch

    def subscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        with self._lock:
            self._reported[callback] = None
        self.check()

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        with self._lock:
            self._reported.pop(callback, None)

    def close(self) -> None:
        with self._lock:
            self._reported.clear()

    def _replaced(self) -> None:
        with self._lock:
            self._armed = False
        self.check()

    def check(self) -> None:
        """Watch for the next change, and report the state to subscribers that haven't seen it."""
        with self._lock:
            if not self._reported:
                return
            arm, self._armed = not self._armed, True
            deliver, self._delivering = not self._delivering, True
        pool = self._channel.assembly.pool
        if arm and not pool.closed:
            pool.on_picker_change(pool.cluster.picker, self._replaced)
        if deliver:
            threading.Thread(target=self._deliver, name="mesh-connectivity", daemon=True).start()

    def _deliver(self) -> None:
        while True:
            with self._lock:
                state = self._channel.connectivity()
                callbacks = [callback for callback, last in self._reported.items() if last is not state]
                for callback in callbacks:
                    self._reported[callback] = state
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
) -> Channel:
    """Create a ``grpc.Channel`` through the mesh: a drop-in for ``grpc.insecure_channel``.

    ``target`` is ``mesh:///SERVICE``, ``static:///HOST:PORT,HOST:PORT``, ``dns:///HOST:PORT``, or any target that grpc
    accepts. ``options`` are passed to the endpoints' channels, except ``grpc.service_config``, which the mesh applies.

    Raises:
        ValueError: the target or the service config is malformed; the message says where.
    """
    return Channel(target, options, None, compression)


def secure_channel(
    target: str,
    credentials: grpc.ChannelCredentials,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
) -> Channel:
    """As ``insecure_channel``, over TLS. For ``mesh:///`` and ``dns:///`` targets, servers must have a certificate for
    the service's name, not for an address.

    Raises:
        TypeError: ``credentials`` are not ``grpc.ChannelCredentials``.
        ValueError: as ``insecure_channel``.
    """
    check_channel_credentials(credentials)
    return Channel(target, options, credentials, compression)
