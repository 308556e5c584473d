"""The pool of a channel: its endpoints' subchannels, in step with the cluster.

Sync and asyncio channels share these classes; only the class of the subchannels differs, and the loop that the pool's
one task runs on. ``CorePool`` is for targets that gRPC core resolves, ``ResolvedPool`` (``resolved_pool.py``) for all
others.

Rule 1: the pool's lock is held for arithmetic, never over IO or a callback.
Rule 2: a call looks at its subchannel's state just before sending; the tick only has to notice what no call
would.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mesh.channel.subchannel import Subchannel
from mesh.config.settings import ServiceConfig
from mesh.model import Connectivity, Endpoint
from mesh.policy.balancing.pickers import Picker
from mesh.policy.cluster.cluster import Cluster

_LOG = logging.getLogger("mesh.channel")


class Pool(abc.ABC):
    """The subchannels of a cluster's endpoints. All but ``run`` may be called from any thread."""

    connected_by_core = False
    """Whether core resolves the target, connects, and queues calls until it has a connection (``wait_for_ready``)."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.closed = False
        self._lock = threading.Lock()
        self._waiting: set[Callable[[], None]] = set()
        self._wake: Callable[[], object] = lambda: None  # wakes up ``run``

    @abc.abstractmethod
    def get(self, address: str) -> Subchannel | None:
        """The subchannel of an endpoint, if it is READY; otherwise the cluster is notified of its state at once."""

    def state(self) -> Connectivity:
        """The aggregated state of the endpoints."""
        return self.cluster.state

    @abc.abstractmethod
    def refresh_state(self, address: str) -> None:
        """A call to ``address`` ended as UNAVAILABLE: check its connection's state."""

    @abc.abstractmethod
    async def run(self) -> None:
        """The pool's one task, until the pool is closed or the task is cancelled; then it closes every subchannel."""

    def exit_idle(self) -> None:
        """A call needs an endpoint and there is none: connect those that went idle after they had been READY."""
        return

    def take_load_report(self, address: str, trailing_metadata: Any) -> None:
        """Read the load report in a response's trailers. Called only where the balancing policy uses load reports."""
        from mesh.channel import load_reports

        load_reports.take(self.cluster, address, trailing_metadata)

    def on_picker_change(self, picker: object, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, as soon as the cluster's picker is no longer ``picker`` or the pool is closed."""
        with self._lock:
            if self.cluster.picker is picker and not self.closed:
                self._waiting.add(callback)
                return
        callback()

    def forget(self, callback: Callable[[], None]) -> None:
        """Cancel a callback that was passed to ``on_picker_change``."""
        with self._lock:
            self._waiting.discard(callback)

    def close(self) -> None:
        """Close the pool: waiters are woken up and find ``closed``; ``run`` closes the subchannels and ends."""
        with self._lock:
            self.closed = True
            waiting, self._waiting = self._waiting, set()
        _call(waiting)
        self._wake()

    def core_channel(self) -> Any:
        """The core channel of a pool that is ``connected_by_core``; opened if it isn't yet."""
        raise NotImplementedError

    @abc.abstractmethod
    def subchannels(self) -> Sequence[Subchannel]:
        """The subchannels of the current endpoints, without retired ones."""

    async def pause(self) -> None:
        """Stop everything that uses grpc.aio, until ``resume``. Called on ``run``'s loop, for blocking channels."""
        return

    def resume(self) -> None:
        """Restart what ``pause`` stopped."""
        return

    def reconfigure(self, config: ServiceConfig) -> None:
        """Apply another service config."""
        self._update_cluster(lambda: self.cluster.reconfigure(config, time.monotonic()))

    def _update_cluster(self, change: Callable[[], object]) -> None:
        """Change the cluster, and wake up the waiters if that replaced the picker."""
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
        except Exception:  # its call has failed with it; the others continue
            _LOG.exception("a call failed when its channel's endpoints changed")


class CorePool(Pool):
    """The pool of a target that gRPC core resolves, connects and balances: one endpoint, as far as the mesh can see."""

    connected_by_core = True

    def __init__(self, cluster: Cluster, endpoint: Endpoint, subchannel: Subchannel) -> None:
        super().__init__(cluster)
        self._subchannel = subchannel
        cluster.update((endpoint,))
        cluster.update_states([(endpoint.address, Connectivity.READY)])

    def get(self, address: str) -> Subchannel:  # noqa: ARG002
        return self._subchannel

    def refresh_state(self, address: str) -> None:
        pass

    def exit_idle(self) -> None:
        self._subchannel.connect()

    def state(self) -> Connectivity:
        return self._subchannel.state()

    def core_channel(self) -> Any:
        return self._subchannel.core()

    def subchannels(self) -> Sequence[Subchannel]:
        return (self._subchannel,)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        wake = asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(wake.set)
        try:
            if not self.closed:
                await wake.wait()
        finally:
            self._wake = lambda: None
            await self._subchannel.close()
