"""The endpoints of one service: who is there, in which state, and the picker over those that may be called.

Rule 1: a node lives as long as its address is in the set; an update keeps the memory of all that stay.
Rule 2: an empty set never evicts an endpoint that works.
Rule 3: the picker is replaced, never changed; ``picker`` is read without a lock.
Rule 4: everything else is called by one thread at a time (the channel's pool holds its lock around it).
Rule 5: among those that are READY there is always one to pick: what would leave none is ignored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

from mesh.config.settings import BalancerConfig, ServiceConfig
from mesh.criticality import Criticality
from mesh.model import Connectivity, Endpoint, Locality, Lock
from mesh.policy.balancing.pickers import Picker, Probing
from mesh.policy.balancing.policies import Given, picker_for
from mesh.policy.call.budget import Budget, Throttle
from mesh.policy.call.hedge import Latencies
from mesh.policy.call.overload import Gate
from mesh.policy.cluster.breaker import State
from mesh.policy.cluster.node import Node
from mesh.policy.cluster.outlier import Ejections
from mesh.policy.cluster.subset import Levels, Subset, nearest
from mesh.policy.cluster.unready import Seen, describe
from mesh.policy.cluster.weights import NOTHING, weigh

# A channel's state from its endpoints': the first row with an endpoint in that state gives it (gRPC's connectivity
# semantics, as round_robin aggregates).
AGGREGATION = (
    Connectivity.READY,
    Connectivity.CONNECTING,
    Connectivity.IDLE,
    Connectivity.TRANSIENT_FAILURE,
)


METHODS = 1000
"""Methods whose latencies are kept; past it the one that was first called longest ago is forgotten."""


def _nobody() -> None:
    """Nobody is to be woken."""


def _reads_reports(balancer: BalancerConfig) -> bool:
    return balancer.reports.enabled and not balancer.reports.out_of_band


class Cluster:
    """The endpoints of one service, and what their calls share.

    ``name`` is what errors call it; ``error`` is the latest reason why no endpoints are known; ``causes`` says of those
    that can't be called why, as far as that is known. ``new_lock`` makes the short locks that nodes and counts need
    among threads; who has one thread gives ``contextlib.nullcontext``.

    ``sweep`` is to be called now and then (the channel's tick), and soon after ``alarm``, which is called from any
    thread when an endpoint's calls are news. ``locality`` is the client's own. ``panic``: so many endpoints are ejected
    that ejections are ignored. ``reads_reports``: the balancing policy goes by what answers report of load.
    """

    def __init__(
        self,
        name: str,
        config: ServiceConfig,
        rng: random.Random,
        now: float,
        new_lock: Callable[[], Lock],
        source: str = "the resolver",
    ) -> None:
        self.name = name
        self.config = config
        self.balancer = config.balancer or BalancerConfig()
        self.budget = Budget(config.budget, new_lock(), now)
        self.throttle = Throttle(config.throttle, new_lock())
        self.gate = Gate(config.overload, [new_lock() for _ in Criticality])
        self.ejections = Ejections(config.ejection, rng, now)
        self.nodes: dict[str, Node] = {}
        self.states: dict[str, Connectivity] = {}
        self.error = ""
        self.since: dict[str, float] = {}  # when each took its state
        self.causes: Mapping[str, str] = {}
        self.alarm: Callable[[], object] = _nobody
        self.locality = Locality()
        self.reads_reports = _reads_reports(self.balancer)
        self.panic = False
        self._latencies: dict[str, Latencies] = {}
        self._rng = rng
        self._new_lock = new_lock
        self._resolved = False
        self._refused = False
        self._stalled = ""  # why connections aren't being made
        self._now = now  # of the last sweep, for what needs no more than that
        self._weigh_at = now
        self._subset = Subset()
        self._levels = Levels()
        self.picker = self._inner = Picker(error=f"{name}: {source} has not answered")

    def latencies(self, method: str) -> Latencies:
        """What a method's attempts took, from which its hedging learns."""
        known = self._latencies.get(method)
        if known is None:
            if len(self._latencies) >= METHODS:
                oldest, *_ = tuple(self._latencies)  # a copy: any thread may be here
                self._latencies.pop(oldest, None)
            known = self._latencies.setdefault(method, Latencies(self._new_lock()))
        return known

    @property
    def state(self) -> Connectivity:
        """The state of the whole."""
        states = set(self.states.values())
        if not states and not self.picker.queue:
            return Connectivity.TRANSIENT_FAILURE  # it is known that there are none
        return next((state for state in AGGREGATION if state in states), Connectivity.CONNECTING)

    def update(self, endpoints: Iterable[Endpoint], error: str = "") -> tuple[list[Endpoint], list[str]]:
        """Take a new endpoint set; returns the endpoints that are new and the addresses that are gone, of those that
        this client uses (its subset). ``error``: why there are none.

        Of endpoints with one address the last one holds.
        """
        wanted = {endpoint.address: endpoint for endpoint in endpoints}
        if wanted:
            wanted = self._subset.of(wanted, self.balancer.subset, self._rng.getrandbits(64))
        else:
            wanted = {
                address: self.nodes[address].endpoint
                for address, state in self.states.items()
                if state == Connectivity.READY
            }
        gone = [address for address in self.nodes if address not in wanted]
        for address in gone:
            del self.nodes[address], self.states[address], self.since[address]
            self.ejections.forget(address)
        new = []
        for address, endpoint in wanted.items():
            node = self.nodes.get(address)
            if node is None:
                self.nodes[address] = self._node(endpoint)
                self.states[address], self.since[address] = Connectivity.IDLE, self._now
                new.append(endpoint)
            else:
                node.endpoint = endpoint
        self._resolved, self._refused = True, False
        if not wanted:
            self.error = error or "no endpoints"
        self._levels.update(self.nodes, self._now)
        self._weigh(exactly=True)
        self._swap()
        return new, gone

    def _node(self, endpoint: Endpoint) -> Node:
        balancer = self.balancer
        return Node(
            endpoint,
            self._new_lock(),
            balancer.decay_time,
            balancer.failure_penalty,
            self.config.ejection,
            self._heard,
        )

    def reconfigure(self, config: ServiceConfig, now: float) -> None:
        """Take another config. Every node keeps its memory, and the budget and the throttles what they hold, unless it
        is their own settings that are others now. Another subset takes hold with the next endpoint set."""
        before, self.config = self.config, config
        if config.budget != before.budget:
            self.budget = Budget(config.budget, self._new_lock(), now)
        if config.throttle != before.throttle:
            self.throttle = Throttle(config.throttle, self._new_lock())
        if config.overload != before.overload:
            self.gate.configure(config.overload)
        self.ejections.configure(config.ejection, now)
        self.balancer = config.balancer or BalancerConfig()
        self.reads_reports = _reads_reports(self.balancer)
        for node in self.nodes.values():
            node.decay, node.penalty = self.balancer.decay_time, self.balancer.failure_penalty
            node.breaker.configure(config.ejection)
        self._now = now
        self._weigh(exactly=True)
        self._swap()

    def unresolved(self, error: str, *, final: bool) -> None:
        """The resolver could not find out who is there. Endpoints known from before stay; without any, calls wait for
        better news, or fail at once where the answer is ``final``."""
        if not self.nodes:
            self.error = error
            self._refused = final
            self._swap()

    def stalled(self, error: str) -> None:
        """Connections aren't being made for now: calls that would wait for one fail with ``error``. Empty: they are
        again."""
        if error != self._stalled:
            self._stalled = error
            self._swap()

    def observe(self, states: Iterable[tuple[str, Connectivity]]) -> bool:
        """Take the endpoints' states as they are now; returns whether one of them changed."""
        changed = connected = False
        for address, state in states:
            if self.states.get(address, state) != state:
                self.states[address], self.since[address] = state, self._now
                changed = True
                if state == Connectivity.READY:
                    self._connected(self.nodes[address])
                    connected = True
        if changed:
            if connected:
                self._weigh()
            self._swap()
        return changed

    def _connected(self, node: Node) -> None:
        node.ready_at = self._now
        node.cost = 0.0  # what was slow or failed was reached by another connection, maybe in another process
        node.report.reconnected()
        self.ejections.reconnected(node)

    def sweep(self, now: float) -> bool:
        """Do what time brings: ejections, weights, a failover; returns whether the picker was replaced."""
        self._now = now
        changed = self.ejections.sweep(self.nodes, now) | self._levels.sweep(now)
        if now >= self._weigh_at and (self.balancer.reports.enabled or self.config.slow_start.window):
            self._weigh_at = now + self.balancer.reports.update_period
            changed |= self._weigh()
        if changed:
            self._swap()
        return changed

    def report(self, address: str, now: float, utilization: float, qps: float, eps: float) -> None:
        """What an endpoint says of its load: the share of it in use, and calls and failures a second. From any
        thread."""
        node = self.nodes.get(address)
        if node is not None:
            node.report.take(now, utilization, qps, eps, self.balancer.reports)

    def _heard(self, node: Node) -> None:
        self.ejections.heard(node)
        self.alarm()

    def _weigh(self, *, exactly: bool = False) -> bool:
        changed = False
        for place, nodes in enumerate(self._levels.nodes.values()):
            changed |= weigh(nodes, self._policy(place), self.config.slow_start, self._now, exactly=exactly)
        return changed

    def _policy(self, place: int) -> BalancerConfig:
        """The balancing policy of the priority at ``place``."""
        levels = self.balancer.levels
        return levels[min(place, len(levels) - 1)] if levels else self.balancer

    def _swap(self) -> None:
        place, ready = self._levels.serving(self.states, self._now)
        if ready:
            self.picker = self._serving(place, ready)
        elif self._stalled:
            self.picker = Picker(queue=False, error=f"{self.name}: {self._stalled}")
        elif not self.nodes:
            queue = not (self._resolved or self._refused)
            self.picker = Picker(queue=queue, error=f"{self.name}: {self.error}", unresolved=queue)
        else:
            failing = all(state == Connectivity.TRANSIENT_FAILURE for state in self.states.values())
            self.picker = Picker(queue=not failing, error=f"{self.name}: 0 of {len(self.nodes)} endpoints connected")

    def why(self, picker: Picker, now: float, waited: float | None = None) -> str:
        """Why ``picker`` had no endpoint for a call that has ``waited`` so many seconds; empty when it had one."""
        if picker.unresolved or not picker.error or self._stalled:
            return picker.error
        # Copied at once: the pool changes these meanwhile.
        states, since = dict(self.states), dict(self.since)
        seen = {address: Seen(state, since.get(address, now)) for address, state in states.items()}
        if not seen:
            how = "after" if self._resolved or self._refused else "for"
            return picker.error if waited is None else f"{picker.error} {how} {waited:.1f} s"
        return f"{self.name}: {describe(seen, self.causes, now, waited)}"

    def _serving(self, place: int, ready: Sequence[Node]) -> Picker:
        """The picker over ``ready``, those of one priority."""
        policy = self._policy(place)
        usable, probes = ready, []
        self.panic = False
        note = ""
        if self.ejections.out:
            usable = [node for node in ready if node.breaker.state is State.CLOSED]
            probes = [node for node in ready if node.breaker.state is State.HALF_OPEN]
            if not usable or 100 * len(usable) < self.config.ejection.panic * len(ready):
                self.panic = True
                note = f"panic: {len(ready) - len(usable)} of {len(ready)} are ejected, so none is"
                usable = ready
        level = list(self._levels.nodes.values())[place]
        usable = nearest(usable, level, self.locality, self.config.zone)
        # What has no weight is left to those that have.
        usable = [node for node in usable if node.weight > NOTHING] or usable
        self._inner = picker_for(Given(policy, usable, self._rng, self._inner, self.gate.out.__len__, len(level)))
        self._inner.note = note
        return Probing(self._inner, probes) if probes else self._inner

    def __repr__(self) -> str:
        ready = sum(state == Connectivity.READY for state in self.states.values())
        out = len(self.ejections.out)
        ejected = f", {out} ejected" if out else ""
        return f"<Cluster {self.name} {ready}/{len(self.nodes)} ready{ejected}{', panic' if self.panic else ''}>"
