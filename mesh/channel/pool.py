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
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mesh.channel.causes import Causes
from mesh.channel.events import Events
from mesh.channel.subchannel import Subchannel
from mesh.config.settings import ServiceConfig
from mesh.discovery.resolver import Resolver, Update
from mesh.model import Connectivity, Endpoint
from mesh.policy.balancing.pickers import Picker
from mesh.policy.cluster.cluster import Cluster
from mesh.policy.cluster.connecting import Connects
from mesh.policy.cluster.node import Node
from mesh.tasks import keep_running

if TYPE_CHECKING:
    from mesh.channel.load_reports import OutOfBand

_LOG = logging.getLogger("mesh.channel")

RETIRE_AFTER = 1.0
"""Seconds that an endpoint which is gone keeps its channel at least, for calls that have just picked it."""


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
        from mesh.channel import load_reports

        load_reports.take(self.cluster, address, trailing_metadata)

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
            from mesh.channel.load_reports import OutOfBand

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
