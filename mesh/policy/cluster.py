"""The endpoints of one service: who is there, in which state, and the picker over those that may be called.

Rule 1: a node lives as long as its address is in the set; an update keeps the memory of all that stay.
Rule 2: an empty set never evicts an endpoint that works.
Rule 3: the picker is replaced, never changed; ``picker`` is read without a lock.
Rule 4: everything else is called by one thread at a time (the channel's pool holds its lock around it).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from mesh.config import BalancerConfig, ServiceConfig
from mesh.model import Connectivity, Endpoint, Lock
from mesh.policy.budget import Budget, Throttle
from mesh.policy.hedge import Latencies
from mesh.policy.load import Node
from mesh.policy.pick import Picker, picker_for

# A channel's state from its endpoints': the first row with an endpoint in that state gives it (gRPC's connectivity
# semantics, as round_robin aggregates).
AGGREGATION = (
    Connectivity.READY,
    Connectivity.CONNECTING,
    Connectivity.IDLE,
    Connectivity.TRANSIENT_FAILURE,
)


class Cluster:
    """The endpoints of one service, and what their calls share.

    ``name`` is what errors call it; ``error`` is the latest reason why no endpoint can be called. ``new_lock`` makes
    the short locks that nodes and counts need among threads; who has one thread gives ``contextlib.nullcontext``.
    """

    def __init__(
        self, name: str, config: ServiceConfig, rng: random.Random, now: float, new_lock: Callable[[], Lock]
    ) -> None:
        self.name = name
        self.config = config
        self.balancer = config.balancer or BalancerConfig()
        self.budget = Budget(config.budget, new_lock(), now)
        self.throttle = Throttle(config.throttle, new_lock())
        self.nodes: dict[str, Node] = {}
        self.states: dict[str, Connectivity] = {}
        self.error = ""
        self._latencies: dict[str, Latencies] = {}
        self._rng = rng
        self._new_lock = new_lock
        self._resolved = False
        self._refused = False
        self.picker = Picker(error=f"{name}: not resolved yet")

    def latencies(self, method: str) -> Latencies:
        """What a method's attempts took, from which its hedging learns."""
        return self._latencies.get(method) or self._latencies.setdefault(method, Latencies(self._new_lock()))

    @property
    def state(self) -> Connectivity:
        """The state of the whole."""
        states = set(self.states.values())
        if not states and not self.picker.queue:
            return Connectivity.TRANSIENT_FAILURE  # it is known that there are none
        return next((state for state in AGGREGATION if state in states), Connectivity.CONNECTING)

    def update(self, endpoints: Iterable[Endpoint]) -> tuple[list[Endpoint], list[str]]:
        """Take a new endpoint set; returns the endpoints that are new and the addresses that are gone.

        Of endpoints with one address the last one holds.
        """
        wanted = {endpoint.address: endpoint for endpoint in endpoints}
        if not wanted:
            wanted = {
                address: self.nodes[address].endpoint
                for address, state in self.states.items()
                if state == Connectivity.READY
            }
        gone = [address for address in self.nodes if address not in wanted]
        for address in gone:
            del self.nodes[address], self.states[address]
        new = []
        for address, endpoint in wanted.items():
            node = self.nodes.get(address)
            if node is None:
                self.nodes[address] = Node(
                    endpoint, self._new_lock(), self.balancer.decay_time, self.balancer.failure_penalty
                )
                self.states[address] = Connectivity.IDLE
                new.append(endpoint)
            else:
                node.endpoint = endpoint
        self._resolved, self._refused = True, False
        if not wanted:
            self.error = "the service has no instances"
        elif len(new) == len(wanted):
            self.error = ""  # it was about those before, or about finding any
        self._swap()
        return new, gone

    def reconfigure(self, config: ServiceConfig, now: float) -> None:
        """Take another config. Every node keeps its memory, and the budget and the throttle what they hold, unless it
        is their own settings that are others now."""
        before, self.config = self.config, config
        if config.budget != before.budget:
            self.budget = Budget(config.budget, self._new_lock(), now)
        if config.throttle != before.throttle:
            self.throttle = Throttle(config.throttle, self._new_lock())
        self.balancer = config.balancer or BalancerConfig()
        for node in self.nodes.values():
            node.decay, node.penalty = self.balancer.decay_time, self.balancer.failure_penalty
        self._swap()

    def unresolved(self, error: str, *, final: bool) -> None:
        """The resolver could not find out who is there. Endpoints known from before stay; without any, calls wait for
        better news, or fail at once where the answer is ``final``."""
        if not self.nodes:
            self.error = error
            self._refused = final
            self._swap()

    def observe(self, states: Iterable[tuple[str, Connectivity]], error: str = "") -> bool:
        """Take the endpoints' states as they are now; returns whether one of them changed."""
        changed = False
        for address, state in states:
            if self.states.get(address, state) != state:
                self.states[address] = state
                changed = True
        if changed:
            if error:
                self.error = error
            self._swap()
        return changed

    def _swap(self) -> None:
        ready = [node for address, node in self.nodes.items() if self.states[address] == Connectivity.READY]
        if ready:
            self.picker = picker_for(self.balancer, ready, self._rng)
        elif not self.nodes:
            queue = not (self._resolved or self._refused)
            self.picker = Picker(queue=queue, error=f"{self.name}: {self.error}", unresolved=queue)
        else:
            failing = all(state == Connectivity.TRANSIENT_FAILURE for state in self.states.values())
            why = self.error or "connections failed"
            self.picker = Picker(
                queue=not failing,
                error=f"{self.name}: none of {len(self.nodes)} endpoints can be reached: {why}"
                if failing
                else f"{self.name}: no endpoint is ready yet",
            )

    def __repr__(self) -> str:
        ready = sum(state == Connectivity.READY for state in self.states.values())
        return f"<Cluster {self.name} {ready}/{len(self.nodes)} ready>"
