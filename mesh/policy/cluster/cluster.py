"""The endpoints of one service: their states, their statistics, and the picker over those that may be called.

Rule 1: a node lives as long as its address is in the endpoint set; an update keeps the statistics of those that stay.
Rule 2: an empty set never removes an endpoint that works.
Rule 3: the picker is replaced, never modified; ``picker`` is read without a lock.
Rule 4: everything else is called by one thread at a time (the channel's pool holds its lock).
Rule 5: as long as an endpoint is READY, one can be picked: ejections, weights or zones that would leave none are
ignored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

from mesh.config.settings import BalancerConfig, ServiceConfig
from mesh.criticality import Criticality
from mesh.model import Connectivity, Endpoint, Locality, Lock
from mesh.policy.balancing.pickers import Picker, ProbingPicker
from mesh.policy.balancing.policies import PickerBuildInfo, build_picker
from mesh.policy.call.budget import Budget, Throttle
from mesh.policy.call.hedge import Latencies
from mesh.policy.call.overload import ClientAdmission
from mesh.policy.cluster.breaker import State
from mesh.policy.cluster.node import Node
from mesh.policy.cluster.outlier import Ejections
from mesh.policy.cluster.subset import Priorities, Subset, in_own_locality
from mesh.policy.cluster.unready import EndpointState, describe
from mesh.policy.cluster.weights import NEGLIGIBLE_WEIGHT, update_weights

# The channel's state is the first of these that an endpoint has (gRPC's connectivity semantics, as round_robin
# aggregates).
AGGREGATION = (
    Connectivity.READY,
    Connectivity.CONNECTING,
    Connectivity.IDLE,
    Connectivity.TRANSIENT_FAILURE,
)


MAX_METHODS = 1000
"""Methods whose latencies are kept; beyond it the method that was added first is dropped."""


def _no_callback() -> None:
    """Default callback."""


def _uses_call_reports(balancer: BalancerConfig) -> bool:
    return balancer.reports.enabled and not balancer.reports.out_of_band


class Cluster:
    """The endpoints of one service, and what their calls share.

    ``name``: its name in error messages. ``error``: the latest reason why no endpoints are known. ``causes``: why
    endpoints can't be called, as far as known, by address. ``new_lock`` creates the locks of nodes and counters, which
    are held briefly; with a single thread ``contextlib.nullcontext`` will do.

    ``sweep`` must be called periodically (the channel's tick), and soon after ``on_breaker_event``, which is called
    from any thread when an endpoint may have to be ejected or may return. ``locality`` is the client's own. ``panic``:
    so many endpoints are ejected that ejections are ignored. ``reads_reports``: the balancing policy uses the load
    reports that come with responses.
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
        self.admission = ClientAdmission(config.overload, [new_lock() for _ in Criticality])
        self.ejections = Ejections(config.outlier_detection, rng, now)
        self.nodes: dict[str, Node] = {}
        self.states: dict[str, Connectivity] = {}
        self.error = ""
        self.state_since: dict[str, float] = {}  # when each took its state
        self.causes: Mapping[str, str] = {}
        self.on_breaker_event: Callable[[], object] = _no_callback
        self.locality = Locality()
        self.reads_reports = _uses_call_reports(self.balancer)
        self.panic = False
        self._latencies: dict[str, Latencies] = {}
        self._rng = rng
        self._new_lock = new_lock
        self._resolved = False
        self._resolver_failed = False
        self._connect_error = ""  # why connections aren't being made
        self._swept_at = now  # when the last sweep was: precise enough for the state and weights of endpoints
        self._update_weights_at = now
        self._subset = Subset()
        self._priorities = Priorities()
        self.picker = self._inner = Picker(error=f"{name}: {source} has not answered")

    def latencies(self, method: str) -> Latencies:
        """The latencies of a method's attempts, from which its hedging delay is learned."""
        known = self._latencies.get(method)
        if known is None:
            if len(self._latencies) >= MAX_METHODS:
                oldest, *_ = tuple(self._latencies)  # a copy: other threads may change it
                self._latencies.pop(oldest, None)
            known = self._latencies.setdefault(method, Latencies(self._new_lock()))
        return known

    @property
    def state(self) -> Connectivity:
        """The channel's state."""
        states = set(self.states.values())
        if not states and not self.picker.queue:
            return Connectivity.TRANSIENT_FAILURE  # the resolver has returned no endpoints
        return next((state for state in AGGREGATION if state in states), Connectivity.CONNECTING)

    def update(self, endpoints: Iterable[Endpoint], error: str = "") -> tuple[list[Endpoint], list[str]]:
        """Apply a new endpoint set; returns the added endpoints and the removed addresses of this client's subset.
        ``error``: why there are none.

        Of several endpoints with the same address the last one is used.
        """
        wanted = {endpoint.address: endpoint for endpoint in endpoints}
        if wanted:
            wanted = self._subset.select(wanted, self.balancer.subset, self._rng.getrandbits(64))
        else:
            wanted = {
                address: self.nodes[address].endpoint
                for address, state in self.states.items()
                if state == Connectivity.READY
            }
        removed = [address for address in self.nodes if address not in wanted]
        for address in removed:
            del self.nodes[address], self.states[address], self.state_since[address]
            self.ejections.forget(address)
        added = []
        for address, endpoint in wanted.items():
            node = self.nodes.get(address)
            if node is None:
                self.nodes[address] = self._node(endpoint)
                self.states[address], self.state_since[address] = Connectivity.IDLE, self._swept_at
                added.append(endpoint)
            else:
                node.endpoint = endpoint
        self._resolved, self._resolver_failed = True, False
        if not wanted:
            self.error = error or "no endpoints"
        self._priorities.update(self.nodes, self._swept_at)
        self._update_weights(force=True)
        self._update_picker()
        return added, removed

    def _node(self, endpoint: Endpoint) -> Node:
        balancer = self.balancer
        return Node(
            endpoint,
            self._new_lock(),
            balancer.decay_time,
            balancer.failure_penalty,
            self.config.outlier_detection,
            self._on_node_event,
        )

    def reconfigure(self, config: ServiceConfig, now: float) -> None:
        """Apply a new config. Nodes keep their statistics; the budget and the throttle keep their balance unless their
        own settings have changed. A new subset size applies from the next endpoint set."""
        before, self.config = self.config, config
        if config.budget != before.budget:
            self.budget = Budget(config.budget, self._new_lock(), now)
        if config.throttle != before.throttle:
            self.throttle = Throttle(config.throttle, self._new_lock())
        if config.overload != before.overload:
            self.admission.configure(config.overload)
        self.ejections.configure(config.outlier_detection, now)
        self.balancer = config.balancer or BalancerConfig()
        self.reads_reports = _uses_call_reports(self.balancer)
        for node in self.nodes.values():
            node.decay, node.penalty = self.balancer.decay_time, self.balancer.failure_penalty
            node.breaker.configure(config.outlier_detection)
        self._swept_at = now
        self._update_weights(force=True)
        self._update_picker()

    def resolver_error(self, error: str, *, final: bool) -> None:
        """The resolver has failed. Known endpoints stay; without any, calls wait for the next result, or fail at once
        when the error is ``final``."""
        if not self.nodes:
            self.error = error
            self._resolver_failed = final
            self._update_picker()

    def set_connect_error(self, error: str) -> None:
        """The channel can't connect at all: calls that would wait for a connection fail with ``error``. Empty: it can
        again."""
        if error != self._connect_error:
            self._connect_error = error
            self._update_picker()

    def update_states(self, states: Iterable[tuple[str, Connectivity]]) -> bool:
        """Apply the endpoints' current states; returns whether one of them has changed."""
        changed = connected = False
        for address, state in states:
            if self.states.get(address, state) != state:
                self.states[address], self.state_since[address] = state, self._swept_at
                changed = True
                if state == Connectivity.READY:
                    self._connected(self.nodes[address])
                    connected = True
        if changed:
            if connected:
                self._update_weights()
            self._update_picker()
        return changed

    def _connected(self, node: Node) -> None:
        node.ready_at = self._swept_at
        node.cost = 0.0  # measured on another connection, maybe to another process
        node.report.reconnected()
        self.ejections.reconnected(node)

    def sweep(self, now: float) -> bool:
        """Do what is due: ejections, weights, a failover; returns whether the picker was replaced."""
        self._swept_at = now
        changed = self.ejections.sweep(self.nodes, now) | self._priorities.sweep(now)
        if now >= self._update_weights_at and (self.balancer.reports.enabled or self.config.slow_start.window):
            self._update_weights_at = now + self.balancer.reports.update_period
            changed |= self._update_weights()
        if changed:
            self._update_picker()
        return changed

    def report(self, address: str, now: float, utilization: float, qps: float, eps: float) -> None:
        """Apply an endpoint's load report: its utilization, and its calls and errors per second. Called from any
        thread."""
        node = self.nodes.get(address)
        if node is not None:
            node.report.record(now, utilization, qps, eps, self.balancer.reports)

    def _on_node_event(self, node: Node) -> None:
        self.ejections.on_breaker_event(node)
        self.on_breaker_event()

    def _update_weights(self, *, force: bool = False) -> bool:
        changed = False
        for index, nodes in enumerate(self._priorities.nodes.values()):
            changed |= update_weights(
                nodes, self._balancer_at(index), self.config.slow_start, self._swept_at, force=force
            )
        return changed

    def _balancer_at(self, index: int) -> BalancerConfig:
        """The balancing policy of the priority at ``index``, counted from 0."""
        levels = self.balancer.priorities
        return levels[min(index, len(levels) - 1)] if levels else self.balancer

    def _update_picker(self) -> None:
        index, ready = self._priorities.serving(self.states, self._swept_at)
        if ready:
            self.picker = self._picker_over(index, ready)
        elif self._connect_error:
            self.picker = Picker(queue=False, error=f"{self.name}: {self._connect_error}")
        elif not self.nodes:
            queue = not (self._resolved or self._resolver_failed)
            self.picker = Picker(queue=queue, error=f"{self.name}: {self.error}", unresolved=queue)
        else:
            failing = all(state == Connectivity.TRANSIENT_FAILURE for state in self.states.values())
            self.picker = Picker(queue=not failing, error=f"{self.name}: 0 of {len(self.nodes)} endpoints connected")

    def explain_no_endpoint(self, picker: Picker, now: float, waited: float | None = None) -> str:
        """Why ``picker`` had no endpoint for a call that has waited for ``waited`` seconds; empty when it had one."""
        if picker.unresolved or not picker.error or self._connect_error:
            return picker.error
        # Copies: the pool may change these at any time.
        states, since = dict(self.states), dict(self.state_since)
        seen = {address: EndpointState(state, since.get(address, now)) for address, state in states.items()}
        if not seen:
            how = "after" if self._resolved or self._resolver_failed else "for"
            return picker.error if waited is None else f"{picker.error} {how} {waited:.1f} s"
        return f"{self.name}: {describe(seen, self.causes, now, waited)}"

    def _picker_over(self, index: int, ready: Sequence[Node]) -> Picker:
        """A picker over ``ready``, the READY endpoints of the priority at ``index``."""
        policy = self._balancer_at(index)
        usable, probes = ready, []
        self.panic = False
        note = ""
        if self.ejections.ejected:
            usable = [node for node in ready if node.breaker.state is State.CLOSED]
            probes = [node for node in ready if node.breaker.state is State.HALF_OPEN]
            if not usable or 100 * len(usable) < self.config.outlier_detection.panic_threshold * len(ready):
                self.panic = True
                note = f"panic: {len(ready) - len(usable)} of {len(ready)} endpoints are ejected; ignoring ejections"
                usable = ready
        level = list(self._priorities.nodes.values())[index]
        usable = in_own_locality(usable, level, self.locality, self.config.zone)
        # Endpoints without a weight get no calls while others have one.
        usable = [node for node in usable if node.weight > NEGLIGIBLE_WEIGHT] or usable
        self._inner = build_picker(
            PickerBuildInfo(policy, usable, self._rng, self._inner, self.admission.outstanding.__len__, len(level))
        )
        self._inner.note = note
        return ProbingPicker(self._inner, probes) if probes else self._inner

    def __repr__(self) -> str:
        ready = sum(state == Connectivity.READY for state in self.states.values())
        ejected = f", {len(self.ejections.ejected)} ejected" if self.ejections.ejected else ""
        return f"<Cluster {self.name} {ready}/{len(self.nodes)} ready{ejected}{', panic' if self.panic else ''}>"
