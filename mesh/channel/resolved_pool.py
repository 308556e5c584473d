"""The pool of a target that the mesh resolves.

It takes endpoint sets from a resolver, opens and retires subchannels, and polls their states.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mesh.channel.causes import Causes
from mesh.channel.endpoint_log import EndpointLog
from mesh.channel.pool import Pool
from mesh.channel.subchannel import Subchannel
from mesh.discovery.resolver import Resolver, Update
from mesh.model import Connectivity
from mesh.policy.cluster.cluster import Cluster
from mesh.policy.cluster.connecting import ConnectPacer
from mesh.policy.cluster.node import Node
from mesh.tasks import keep_running

if TYPE_CHECKING:
    from mesh.channel.load_reports import OutOfBand

RETIRE_AFTER = 1.0
"""The minimum time in seconds that a removed endpoint keeps its channel, for calls that have just picked it."""


class ResolvedPool(Pool):
    """The subchannels of the endpoints that a resolver finds.

    ``configured`` is called with each service config from the resolver, before the endpoints that come with it are
    applied.
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
        # Endpoints whose connection was lost while no call was made: the next call reconnects them, as gRPC's
        # pick_first does. (Reconnecting at once, while the server restarts, would leave them in backoff when the call
        # comes.)
        self._idle_after_ready: set[str] = set()
        self._connects = ConnectPacer()
        self._stalled = False
        cluster.on_breaker_event = lambda: self._wake()
        self._out_of_band: OutOfBand | None = None
        self._resolving: asyncio.Task[None] | None = None
        self._paused = False
        self._causes = Causes(lambda: self._wake())
        cluster.causes = self._causes.known
        self._events = EndpointLog(cluster)
        self._states_changed = False

    def get(self, address: str) -> Subchannel | None:
        if self._idle_after_ready:
            self.exit_idle()
        subchannel = self._subchannels.get(address)
        if subchannel is not None:
            if subchannel.ready():
                return subchannel
            self._observe([(address, subchannel.state())])
        return None

    def refresh_state(self, address: str) -> None:
        subchannel = self._subchannels.get(address)
        if subchannel is not None:
            self._observe([(address, subchannel.state())])

    def exit_idle(self) -> None:
        if self._idle_after_ready:
            self._idle_after_ready.clear()
            self._wake()

    def subchannels(self) -> Sequence[Subchannel]:
        return tuple(self._subchannels.values())

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        wake = asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(wake.set)
        if not self._paused and self._resolving is None:
            self._resolving = self._start_discovery()
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
            self._resolving = self._start_discovery()
            self._wake()

    def _start_discovery(self) -> asyncio.Task[None]:
        work = keep_running("discovery", self._resolve, self._unresolved, where=self.cluster.name)
        return asyncio.get_running_loop().create_task(work)

    async def _watch(self, wake: asyncio.Event) -> None:
        """Check the states on a tick, or as soon as ``wake`` is set, until the pool is closed."""
        while not self.closed:
            pause = self._tick()
            await self._close_retired(time.monotonic())
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
        self._update_cluster(lambda: self.cluster.set_connect_error(error))

    def _unresolved(self, error: str) -> None:
        self._update_cluster(lambda: self.cluster.resolver_error(error, final=True))

    async def _resolve(self) -> None:
        updated = False
        async with contextlib.aclosing(self._resolver.updates()) as updates:
            async for update in updates:
                self._events.on_resolver_update(update)
                updated = True
                if update.service_config is not None:
                    self._configured(update.service_config)
                self._update_cluster(functools.partial(self._update, update))
        if not updated:
            raise RuntimeError("the resolver ended without an update")

    def _update(self, update: Update) -> None:
        if update.endpoints is None:
            self.cluster.resolver_error(update.error, final=update.final)
            return
        nodes = dict(self.cluster.nodes)
        added, removed = self.cluster.update(update.endpoints, update.error)
        self._events.on_endpoints(added, removed)
        now = time.monotonic()
        for address in removed:
            self._retired.append((now, nodes[address], self._subchannels.pop(address)))
        for endpoint in added:
            self._subchannels[endpoint.address] = self._open_subchannel(endpoint.address)
        self._wake()

    def _tick(self) -> float:
        """Sweep the cluster, check every state, and connect idle endpoints, except those that went idle after READY.
        Returns the seconds until the next tick."""
        now = time.monotonic()
        self._update_cluster(lambda: self.cluster.sweep(now))
        self._events.on_sweep()
        states = [(subchannel.address, subchannel.state()) for subchannel in tuple(self._subchannels.values())]
        known = self.cluster.states
        for address, state in states:
            if state == Connectivity.IDLE and known.get(address) == Connectivity.READY:
                self._idle_after_ready.add(address)
        failing = [address for address, state in states if state == Connectivity.TRANSIENT_FAILURE]
        self._causes.tick(self._subchannels, failing, now)
        self._observe(states)
        if self._states_changed:
            self._states_changed = False
            self._events.on_states(tuple(known.items()), self._causes.known)
        if failing:
            self._resolver.resolve_now()
        idle = self._idle_after_ready
        awake = (entry for entry in states if entry[0] not in idle) if idle else states
        begin, pause = self._connects.poll(awake, now)
        error: Exception | None = None
        for address in begin:
            try:
                self._subchannels[address].connect()
            except Exception as failure:  # the others still connect
                error = failure
        if not self._paused and (self.cluster.balancer.reports.out_of_band or self._out_of_band is not None):
            self._update_out_of_band()
        if error is not None:
            raise error
        return pause

    def _update_out_of_band(self) -> None:
        """Watch the load reports of READY endpoints, if the balancing policy uses them."""
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

    async def _close_retired(self, now: float) -> None:
        """Close retired subchannels, and retry channels that are no longer used."""
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
            if known.get(address, seen := self._causes.reported_state(address, state)) != seen
        ]
        if changed:
            self._update_cluster(functools.partial(self.cluster.update_states, changed))
            self._states_changed = True  # the tick logs it: this may be a call's thread
            self._wake()
