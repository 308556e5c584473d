"""The endpoints' own core channels, and the pool that keeps them in step with the cluster.

Each endpoint in use has one core channel, which watches ``grpc.health.v1`` on the connection that carries the calls
(A17). The pool is fed by a resolver, reads the channels' states on a tick, and tells whoever waits when the picker
was replaced. It is the same in both worlds; they differ in the class of the subchannels and in the loop that the
pool's one task runs on.

Rule 1: the pool's lock is held for arithmetic, never over IO or a callback.
Rule 2: a call looks at its subchannel's state just before sending; the tick only has to notice what no call would.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import functools
import itertools
import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from mesh import core
from mesh.channel.causes import Causes
from mesh.channel.events import Events
from mesh.config import MethodPolicy, ServiceConfig
from mesh.core import ChannelOptions
from mesh.discovery.resolver import Resolver, Update
from mesh.model import Connectivity, Endpoint
from mesh.policy.cluster import Cluster
from mesh.policy.connecting import Connects
from mesh.policy.load import Node
from mesh.policy.pick import Picker
from mesh.tasks import keep_running

if TYPE_CHECKING:
    from mesh.channel.reports import OutOfBand

_LOG = logging.getLogger("mesh.channel")

RETIRE_AFTER = (
    1.0  # seconds an endpoint that is gone keeps its channel at the least, for calls that have just picked it
)
RETRY_IDLE = 60.0  # seconds after which the retries' channel is closed

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


class Pool(abc.ABC):
    """The subchannels of a cluster's endpoints. All but ``run`` may be called from any thread."""

    core_waits = False
    """Whether calls are handed to core's own queue for a connection, wait_for_ready and all."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.closed = False
        self._lock = threading.Lock()
        self._waiting: set[Callable[[], None]] = set()
        self._wake: Callable[[], object] = lambda: None  # has ``run`` look around

    @abc.abstractmethod
    def get(self, address: str) -> Subchannel | None:
        """The subchannel of an endpoint, if it can take a call now. If not, the cluster learns of it at once."""

    def state(self) -> Connectivity:
        """The state of the whole."""
        return self.cluster.state

    @abc.abstractmethod
    def check(self, address: str) -> None:
        """A call to ``address`` ended as UNAVAILABLE: look at its connection's state again."""

    @abc.abstractmethod
    async def run(self) -> None:
        """The pool's one task, until the pool is closed or the task cancelled; then every subchannel is closed."""

    def wanted(self) -> None:
        """A call wants an endpoint and finds none: connect those whose connection was lost and not made anew."""
        return

    def answered(self, address: str, trailing_metadata: Any) -> None:
        """An answer came with these trailers. Told only where the balancing policy reads load reports."""
        from mesh.channel import reports

        reports.take(self.cluster, address, trailing_metadata)

    def when_replaced(self, picker: object, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, as soon as the cluster's picker is another than ``picker``, or the pool is closed."""
        with self._lock:
            if self.cluster.picker is picker and not self.closed:
                self._waiting.add(callback)
                return
        callback()

    def forget(self, callback: Callable[[], None]) -> None:
        """``callback`` need not be called any more."""
        with self._lock:
            self._waiting.discard(callback)

    def close(self) -> None:
        """The channel closes: whoever waits is told, and finds ``closed``; ``run`` closes the subchannels, and ends."""
        with self._lock:
            self.closed = True
            waiting, self._waiting = self._waiting, set()
        _call(waiting)
        self._wake()

    async def pause(self) -> None:
        """End what runs over grpc.aio, until ``resume``. On the loop of ``run``, of a blocking channel."""
        return

    def resume(self) -> None:
        """Begin again what ``pause`` ended."""
        return

    def reconfigure(self, config: ServiceConfig) -> None:
        """Have the cluster take another config."""
        self._change(lambda: self.cluster.reconfigure(config, time.monotonic()))

    def _change(self, change: Callable[[], object]) -> None:
        """Change the cluster, and tell those who wait when that replaced the picker."""
        waiting: set[Callable[[], None]] = set()
        with self._lock:
            before: Picker = self.cluster.picker
            change()
            if self.cluster.picker is not before:
                waiting, self._waiting = self._waiting, waiting
        _call(waiting)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.cluster!r}>"


def _call(callbacks: Iterable[Callable[[], object]]) -> None:
    for callback in callbacks:
        try:
            callback()
        except Exception:  # the call that it belongs to has failed with it; the others go on
            _LOG.exception("a call failed when its channel's endpoints changed")


class OwnPool(Pool):
    """The pool of a target that gRPC itself resolves and connects: one endpoint, whose connections core looks after."""

    core_waits = True

    def __init__(self, cluster: Cluster, endpoint: Endpoint, subchannel: Subchannel) -> None:
        super().__init__(cluster)
        self.subchannel = subchannel
        cluster.update((endpoint,))
        cluster.observe([(endpoint.address, Connectivity.READY)])

    def get(self, address: str) -> Subchannel:  # noqa: ARG002
        return self.subchannel

    def check(self, address: str) -> None:
        pass

    def wanted(self) -> None:
        self.subchannel.connect()

    def state(self) -> Connectivity:
        return self.subchannel.state()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        wake = asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(wake.set)
        try:
            if not self.closed:
                await wake.wait()
        finally:
            self._wake = lambda: None
            await self.subchannel.close()


class ResolvedPool(Pool):
    """The pool of a target of the mesh's own: fed by a resolver, its subchannels' states looked at on a tick.

    ``configured`` is told each service config that the resolver learns of, before the endpoints that come with it.
    """

    def __init__(
        self,
        cluster: Cluster,
        resolver: Resolver,
        open_subchannel: Callable[[str], Subchannel],
        configured: Callable[[str], None],
    ) -> None:
        super().__init__(cluster)
        self._resolver = resolver
        self._configured = configured
        self._open_subchannel = open_subchannel
        self._subchannels: dict[str, Subchannel] = {}
        self._retired: list[tuple[float, Node, Subchannel]] = []
        # Endpoints whose connection was lost while nobody called: the next call has them connected, as with gRPC's
        # pick_first. (Connected at once, into a restart's gap, they would sit out a backoff when the call comes.)
        self._resting: set[str] = set()
        self._connects = Connects()
        self._stalled = False
        cluster.alarm = lambda: self._wake()
        self._out_of_band: OutOfBand | None = None
        self._resolving: asyncio.Task[None] | None = None
        self._paused = False
        self._causes = Causes(lambda: self._wake())
        cluster.causes = self._causes.known
        self._events = Events(cluster)
        self._moved = False

    def get(self, address: str) -> Subchannel | None:
        if self._resting:
            self.wanted()
        subchannel = self._subchannels.get(address)
        if subchannel is not None:
            if subchannel.ready():
                return subchannel
            self._observe([(address, subchannel.state())])
        return None

    def check(self, address: str) -> None:
        subchannel = self._subchannels.get(address)
        if subchannel is not None:
            self._observe([(address, subchannel.state())])

    def wanted(self) -> None:
        if self._resting:
            self._resting.clear()
            self._wake()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        wake = asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(wake.set)
        if not self._paused and self._resolving is None:
            self._resolving = self._discover()
        try:
            await keep_running("connecting", functools.partial(self._watch, wake), self._stall, where=self.cluster.name)
        finally:
            self._wake = lambda: None
            await self.pause()
            with self._lock:
                subchannels = [*self._subchannels.values(), *(subchannel for _, _, subchannel in self._retired)]
                self._subchannels.clear()
                self._retired.clear()
            for subchannel in subchannels:
                await subchannel.close()

    async def pause(self) -> None:
        self._paused = True
        resolving, self._resolving = self._resolving, None
        if resolving is not None:
            resolving.cancel()
            await asyncio.wait([resolving])
        if self._out_of_band is not None:
            await self._out_of_band.close()
            self._out_of_band = None
        await self._causes.close()

    def resume(self) -> None:
        if self._paused and not self.closed:
            self._paused = False
            self._resolving = self._discover()
            self._wake()

    def _discover(self) -> asyncio.Task[None]:
        work = keep_running("discovery", self._resolve, self._unresolved, where=self.cluster.name)
        return asyncio.get_running_loop().create_task(work)

    async def _watch(self, wake: asyncio.Event) -> None:
        """Look at the states on a tick, or as soon as ``wake`` is set, until the pool is closed."""
        while not self.closed:
            pause = self._tick()
            await self._tidy(time.monotonic())
            if self._stalled:
                self._stall("")
            try:
                # (Not wait_for: before Python 3.12 it loses a cancellation that comes together with the wake-up.)
                async with asyncio.timeout(pause):
                    await wake.wait()
            except TimeoutError:
                pass
            wake.clear()

    def _stall(self, error: str) -> None:
        self._stalled = bool(error)
        self._change(lambda: self.cluster.stalled(error))

    def _unresolved(self, error: str) -> None:
        self._change(lambda: self.cluster.unresolved(error, final=True))

    async def _resolve(self) -> None:
        heard = False
        async with contextlib.aclosing(self._resolver.updates()) as updates:
            async for update in updates:
                self._events.resolved(update)
                heard = True
                if update.service_config is not None:
                    self._configured(update.service_config)
                self._change(functools.partial(self._update, update))
        if not heard:
            raise RuntimeError("the resolver ended without an update")

    def _update(self, update: Update) -> None:
        if update.endpoints is None:
            self.cluster.unresolved(update.error, final=update.final)
            return
        nodes = dict(self.cluster.nodes)
        new, gone = self.cluster.update(update.endpoints, update.error)
        self._events.updated(new, gone)
        now = time.monotonic()
        for address in gone:
            self._retired.append((now, nodes[address], self._subchannels.pop(address)))
        for endpoint in new:
            self._subchannels[endpoint.address] = self._open_subchannel(endpoint.address)
        self._wake()

    def _tick(self) -> float:
        """Do what time brings, look at every state, and connect what is idle and not at rest; returns the seconds until
        the next look."""
        now = time.monotonic()
        self._change(lambda: self.cluster.sweep(now))
        self._events.swept()
        states = [(subchannel.address, subchannel.state()) for subchannel in tuple(self._subchannels.values())]
        known = self.cluster.states
        for address, state in states:
            if state == Connectivity.IDLE and known.get(address) == Connectivity.READY:
                self._resting.add(address)
        failing = [address for address, state in states if state == Connectivity.TRANSIENT_FAILURE]
        self._causes.tick(self._subchannels, failing, now)
        self._observe(states)
        if self._moved:
            self._moved = False
            self._events.observed(tuple(known.items()), self._causes.known)
        if failing:
            self._resolver.resolve_now()
        resting = self._resting
        awake = (entry for entry in states if entry[0] not in resting) if resting else states
        begin, pause = self._connects.look(awake, now)
        error: Exception | None = None
        for address in begin:
            try:
                self._subchannels[address].connect()
            except Exception as failure:  # the others connect nevertheless
                error = failure
        if not self._paused and (self.cluster.balancer.reports.out_of_band or self._out_of_band is not None):
            self._ask_for_load()
        if error is not None:
            raise error
        return pause

    def _ask_for_load(self) -> None:
        """Have the endpoints that are READY asked for their load, if the balancing policy wants that."""
        if self._out_of_band is None:
            from mesh.channel.reports import OutOfBand

            self._out_of_band = OutOfBand(self.cluster)
        wanted = self.cluster.balancer.reports.out_of_band
        states = self.cluster.states
        self._out_of_band.keep(
            {
                address: subchannel
                for address, subchannel in self._subchannels.items()
                if wanted and states.get(address) == Connectivity.READY
            }
        )

    async def _tidy(self, now: float) -> None:
        """Close what has retired, and the channels of retries long past."""
        with self._lock:
            over: list[Subchannel] = []
            staying = []
            for entry in self._retired:
                if now - entry[0] > RETIRE_AFTER and not entry[1].in_flight:
                    over.append(entry[2])
                else:
                    staying.append(entry)
            self._retired = staying
        for subchannel in over:
            await subchannel.close()
        for address, subchannel in tuple(self._subchannels.items()):
            node = self.cluster.nodes.get(address)
            await subchannel.close_idle_retries(now, in_flight=node.in_flight if node else 0)

    def _observe(self, states: Sequence[tuple[str, Connectivity]]) -> None:
        known = self.cluster.states
        changed = [
            (address, seen)
            for address, state in states
            if known.get(address, seen := self._causes.seen(address, state)) != seen
        ]
        if changed:
            self._change(functools.partial(self.cluster.observe, changed))
            self._moved = True  # logged by the tick: a call may be here
            self._wake()
