"""A watcher's state: the instances of one service, merged from the messages of a registry's watch.

No clock and no IO here; ``now`` is monotonic seconds. Messages are merged or rejected; they never raise.

A registry is trusted while it runs. After a restart (it has a new epoch) it starts empty and instances register again
one by one, so the previous instances are *held*: they stay among the endpoints until they have registered again, or
until HOLD_TIME seconds after the registry's first instance; while it has none, they stay. Keeping an instance that
really is gone does no harm: its connection or health check fails, so it gets no calls. The service config is kept in
the same way: a restarted registry without one doesn't remove it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mesh.addresses import is_local, parse
from mesh.model import MAX_WEIGHT, Endpoint, Locality
from weft.mesh.v1 import registry_pb2 as pb

HOLD_TIME = 30.0
"""Longer than instances need to reconnect to a restarted registry and register. Seconds."""

MAX_KNOWN = 50_000
"""The most instances of a service that a client uses. A registry within its own limits has fewer of the usual size, but
a broken one must not fill its clients' memory."""


@dataclass(slots=True)
class _Snapshot:
    """The parts of a snapshot that have arrived."""

    epoch: str
    instances: dict[str, Endpoint]
    service_config: str


class Roster:
    """The endpoints of one service, according to its registry."""

    def __init__(self, service: str, hold: float = HOLD_TIME) -> None:
        self._service = service
        self._hold = hold
        self._epoch = ""
        self._revision = 0
        self._in_sync = False
        self._incoming: _Snapshot | None = None
        self._config = ""
        self._known: dict[str, Endpoint] = {}
        self._held: dict[str, Endpoint] = {}
        self._held_until: float | None = None

    @property
    def in_sync(self) -> bool:
        """Whether a delta can be merged. If not, a new watch with a new snapshot is needed."""
        return self._in_sync or self._incoming is not None

    @property
    def complete(self) -> bool:
        """False between the parts of a snapshot: until the last one, the previous instances are used."""
        return self._incoming is None

    @property
    def position(self) -> tuple[str, int]:
        """The epoch and revision from which to resume the watch; ``("", 0)`` to start with a snapshot."""
        return (self._epoch, self._revision) if self._in_sync else ("", 0)

    @property
    def held_until(self) -> float | None:
        """When to call ``expire``; None when nothing is held, or the time hasn't started."""
        return self._held_until

    @property
    def service_config(self) -> str:
        """The service config's JSON; empty when none is set."""
        return self._config

    def endpoints(self) -> tuple[Endpoint, ...]:
        """All endpoints, sorted by address; of two instances with one address, the one that isn't held."""
        found = {endpoint.address: endpoint for endpoint in (*self._held.values(), *self._known.values())}
        return tuple(found[address] for address in sorted(found))

    def apply(self, step: pb.WatchResponse, now: float) -> str:
        """Merge a message of the watch. Returns a description of what had to be ignored; empty if nothing."""
        kind = step.WhichOneof("step")
        if not step.epoch or kind is None:
            return "a message without " + ("an epoch" if kind else "a snapshot or delta")
        problems: list[str] = []
        if kind == "snapshot":
            instances = self._read(step.snapshot.instances, problems)
            if problems and not instances:
                return problems[0]
            self._incoming = _Snapshot(step.epoch, instances, step.snapshot.service_config)
        elif self._incoming is not None and step.epoch == self._incoming.epoch:
            self._incoming.instances |= self._read(step.delta.upserted, problems)
            for instance_id in step.delta.removed_ids:
                self._incoming.instances.pop(instance_id, None)
            if step.delta.HasField("service_config"):
                self._incoming.service_config = step.delta.service_config
        elif not self._in_sync or step.epoch != self._epoch or step.revision < self._revision:
            self._in_sync = False
            self._incoming = None
            return f"a delta to {step.epoch}/{step.revision} that doesn't follow {self._epoch}/{self._revision}"
        else:
            self._known |= self._read(step.delta.upserted, problems)
            for instance_id in step.delta.removed_ids:
                self._known.pop(instance_id, None)
            if step.delta.HasField("service_config"):
                self._config = step.delta.service_config
        known = self._known if self._incoming is None else self._incoming.instances
        if len(known) > MAX_KNOWN:
            problems.append(f"more than {MAX_KNOWN} instances; the rest is ignored")
            for instance_id in list(known)[MAX_KNOWN:]:
                del known[instance_id]
        if self._incoming is not None:
            if step.more:
                return problems[0] if problems else ""
            self._replace(self._incoming)
            self._incoming = None
        self._epoch, self._revision = step.epoch, step.revision
        for instance_id in self._known:
            self._held.pop(instance_id, None)
        self._begin_hold(now)
        return problems[0] if problems else ""

    def restore(self, snapshot: pb.Snapshot) -> None:
        """Hold the instances of the disk cache."""
        self._held |= self._read(snapshot.instances, [])
        self._config = self._config or snapshot.service_config

    def snapshot(self) -> pb.Snapshot:
        """All instances, for the disk cache."""
        instances = [_instance(self._service, key, endpoint) for key, endpoint in (self._held | self._known).items()]
        return pb.Snapshot(instances=instances, service_config=self._config)

    def watch_ended(self) -> None:
        """The watch has ended: the hold time restarts when the registry is back."""
        self._incoming = None
        self._held_until = None

    def expire(self, now: float) -> None:
        """Remove the held instances when their time is up."""
        if self._held_until is not None and now >= self._held_until:
            self._held = {}
            self._held_until = None

    def __repr__(self) -> str:
        at = f"{self._epoch}/{self._revision}"
        return f"<Roster {self._service} at {at} known={len(self._known)} held={len(self._held)}>"

    def _replace(self, snapshot: _Snapshot) -> None:
        if snapshot.epoch != self._epoch:
            self._held |= self._known
            self._held_until = None
        if snapshot.epoch == self._epoch or snapshot.service_config:
            self._config = snapshot.service_config
        self._known = snapshot.instances
        self._in_sync = True

    def _begin_hold(self, now: float) -> None:
        if not self._held:
            self._held_until = None
        elif self._known and self._held_until is None:
            self._held_until = now + self._hold

    def _read(self, instances: Iterable[pb.Instance], problems: list[str]) -> dict[str, Endpoint]:
        """The endpoints by instance id, without invalid instances."""
        endpoints = {}
        for instance in instances:
            if instance.service != self._service:
                problems.append(f"instance {instance.id!r} of service {instance.service!r}, not {self._service!r}")
            elif not instance.id:
                problems.append(f"an instance at {instance.address!r} without an id")
            elif not _callable(instance.address):
                problems.append(f"instance {instance.id!r} with address {instance.address!r}")
            else:
                if instance.weight > MAX_WEIGHT:
                    problems.append(f"instance {instance.id!r} with weight {instance.weight}, used as {MAX_WEIGHT}")
                endpoints[instance.id] = _endpoint(instance)
        return endpoints


def _callable(address: str) -> bool:
    try:
        return is_local(address) or not parse(address).is_wildcard
    except ValueError:
        return False


def _endpoint(instance: pb.Instance) -> Endpoint:
    where = instance.locality
    return Endpoint(
        address=instance.address,
        locality=Locality(where.region, where.zone, where.sub_zone),
        weight=min(instance.weight, MAX_WEIGHT) or 1,
        metadata=dict(instance.metadata),
    )


def _instance(service: str, instance_id: str, endpoint: Endpoint) -> pb.Instance:
    where = endpoint.locality
    return pb.Instance(
        id=instance_id,
        service=service,
        address=endpoint.address,
        locality=pb.Locality(region=where.region, zone=where.zone, sub_zone=where.sub_zone),
        weight=endpoint.weight,
        metadata=endpoint.metadata,
    )
