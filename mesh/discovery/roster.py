"""What a watcher knows of a service: the steps of a registry's watch, merged.

The law of this file: no clock and no IO; ``now`` is monotonic seconds. What a registry says is merged or refused, and
never raises.

A registry is believed as long as it lives. One that was restarted (its epoch is another) begins empty and hears from
the services one by one, so what was known before is *held*: it stays among the endpoints until the service has
registered again, or HOLD seconds have passed since the registry first told of any instance; while it tells of none, for
as long as that lasts. An instance that really is gone by then does no harm: the health of its connection says so, and
no call goes there. So it is with the service's config: a registry that was restarted and has none takes none away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mesh.addresses import is_local, parse
from mesh.model import MAX_WEIGHT, Endpoint, Locality
from weft.mesh.v1 import registry_pb2 as pb

HOLD = 30.0
"""Longer than services need to find a restarted registry and register again. Seconds."""

MAX_KNOWN = 50_000
"""The most instances of a service that a client uses: more than a registry that obeys its own limits has of the usual
size, so that one gone wrong can't fill its clients' memory."""


@dataclass(slots=True)
class _Snapshot:
    """What a registry has sent so far of a snapshot in parts."""

    epoch: str
    instances: dict[str, Endpoint]
    service_config: str


class Roster:
    """The endpoints of one service, as its registry tells of them."""

    def __init__(self, service: str, hold: float = HOLD) -> None:
        self._service = service
        self._hold = hold
        self._epoch = ""
        self._revision = 0
        self._in_step = False
        self._coming: _Snapshot | None = None
        self._config = ""
        self._known: dict[str, Endpoint] = {}
        self._held: dict[str, Endpoint] = {}
        self._held_until: float | None = None

    @property
    def in_step(self) -> bool:
        """Whether the next delta can be merged. If not, only a snapshot helps: begin a new watch."""
        return self._in_step or self._coming is not None

    @property
    def complete(self) -> bool:
        """False between the parts of a snapshot: until the last has come, what was known before is used."""
        return self._coming is None

    @property
    def position(self) -> tuple[str, int]:
        """The epoch and revision from which to resume the watch; ``("", 0)`` to begin with a snapshot."""
        return (self._epoch, self._revision) if self._in_step else ("", 0)

    @property
    def held_until(self) -> float | None:
        """When to call ``settle``; None when nothing is held, or when it is held for as long as it takes."""
        return self._held_until

    @property
    def service_config(self) -> str:
        """The JSON of the service's config; empty when none is set."""
        return self._config

    def endpoints(self) -> tuple[Endpoint, ...]:
        """All endpoints, by address; of two instances with one address, the one that the registry knows now."""
        found = {endpoint.address: endpoint for endpoint in (*self._held.values(), *self._known.values())}
        return tuple(found[address] for address in sorted(found))

    def apply(self, step: pb.WatchResponse, now: float) -> str:
        """Merge a step of the watch. Returns what had to be ignored, for people to read; empty when all is well."""
        kind = step.WhichOneof("step")
        if not step.epoch or kind is None:
            return "an answer without " + ("epoch" if kind else "snapshot or delta")
        complaints: list[str] = []
        if kind == "snapshot":
            instances = self._read(step.snapshot.instances, complaints)
            if complaints and not instances:
                return complaints[0]
            self._coming = _Snapshot(step.epoch, instances, step.snapshot.service_config)
        elif self._coming is not None and step.epoch == self._coming.epoch:
            self._coming.instances |= self._read(step.delta.upserted, complaints)
            for instance_id in step.delta.removed_ids:
                self._coming.instances.pop(instance_id, None)
            if step.delta.HasField("service_config"):
                self._coming.service_config = step.delta.service_config
        elif not self._in_step or step.epoch != self._epoch or step.revision < self._revision:
            self._in_step = False
            self._coming = None
            return f"a delta to {step.epoch}/{step.revision} that doesn't follow {self._epoch}/{self._revision}"
        else:
            self._known |= self._read(step.delta.upserted, complaints)
            for instance_id in step.delta.removed_ids:
                self._known.pop(instance_id, None)
            if step.delta.HasField("service_config"):
                self._config = step.delta.service_config
        known = self._known if self._coming is None else self._coming.instances
        if len(known) > MAX_KNOWN:
            complaints.append(f"more than {MAX_KNOWN} instances; the rest is ignored")
            for instance_id in list(known)[MAX_KNOWN:]:
                del known[instance_id]
        if self._coming is not None:
            if step.more:
                return complaints[0] if complaints else ""
            self._replace(self._coming)
            self._coming = None
        self._epoch, self._revision = step.epoch, step.revision
        for instance_id in self._known:
            self._held.pop(instance_id, None)
        self._begin_hold(now)
        return complaints[0] if complaints else ""

    def remember(self, snapshot: pb.Snapshot) -> None:
        """Hold what was known in an earlier life of this process, as what another registry said."""
        self._held |= self._read(snapshot.instances, [])
        self._config = self._config or snapshot.service_config

    def snapshot(self) -> pb.Snapshot:
        """All of it, to be remembered."""
        instances = [_instance(self._service, key, endpoint) for key, endpoint in (self._held | self._known).items()]
        return pb.Snapshot(instances=instances, service_config=self._config)

    def cut(self) -> None:
        """The watch broke off: what is held has its time anew when the registry is back."""
        self._coming = None
        self._held_until = None

    def settle(self, now: float) -> None:
        """Let go of what was held for long enough."""
        if self._held_until is not None and now >= self._held_until:
            self._held = {}
            self._held_until = None

    def __repr__(self) -> str:
        at = f"{self._epoch}/{self._revision}"
        return f"<Roster {self._service} at {at} known={len(self._known)} held={len(self._held)}>"

    def _replace(self, told: _Snapshot) -> None:
        if told.epoch != self._epoch:
            self._held |= self._known
            self._held_until = None
        if told.epoch == self._epoch or told.service_config:
            self._config = told.service_config
        self._known = told.instances
        self._in_step = True

    def _begin_hold(self, now: float) -> None:
        if not self._held:
            self._held_until = None
        elif self._known and self._held_until is None:
            self._held_until = now + self._hold

    def _read(self, instances: Iterable[pb.Instance], complaints: list[str]) -> dict[str, Endpoint]:
        """The endpoints by instance id, without the instances that make no sense."""
        endpoints = {}
        for instance in instances:
            if instance.service != self._service:
                complaints.append(f"instance {instance.id!r} of service {instance.service!r}, not {self._service!r}")
            elif not instance.id:
                complaints.append(f"an instance at {instance.address!r} without an id")
            elif not _callable(instance.address):
                complaints.append(f"instance {instance.id!r} with address {instance.address!r}")
            else:
                if instance.weight > MAX_WEIGHT:
                    complaints.append(f"instance {instance.id!r} with weight {instance.weight}, used as {MAX_WEIGHT}")
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
