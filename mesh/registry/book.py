"""The registry's book-keeping: instances under leases, services' configs, and a bounded log of what changed.

The law of this file: no clock, no IO, no chance. ``now`` is monotonic seconds, the epoch is given, and every method
decides and returns; who waits, wakes watchers and talks to the network is ``service.py``.

Every change to what a watcher may see takes the next *revision*. A watcher that says which revision it has seen is told
what changed since, as far as the log reaches back, and otherwise everything. So the book remembers nothing about any
watcher, and one that is slow costs nothing.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from weft.mesh.v1 import registry_pb2 as pb

LOG_SIZE = 10_000
"""Changes that the log remembers, over all services."""

RENEWALS = 3
"""Keep-alives that a client sends in a lease's time to live."""

_CONFIG = ""  # stands in the log for the service's config, where instances have their ids, which are never empty


@dataclass(frozen=True, slots=True)
class Delta:
    """What changed in a service: instances that are new or different, and the ids of those that are gone.

    ``config``: the service config's JSON when that changed, empty when it was taken back; else None.
    """

    upserted: tuple[pb.Instance, ...] = ()
    removed_ids: tuple[str, ...] = ()
    config: str | None = None

    def __bool__(self) -> bool:
        return bool(self.upserted or self.removed_ids or self.config is not None)


@dataclass(slots=True)
class _Lease:
    id: str
    instance: pb.Instance
    ttl: float
    expires_at: float
    spared: bool = False  # has had its one period more since it was last renewed


@dataclass(slots=True)
class _Service:
    """``forgotten``: the log no longer tells of this service's changes up to this revision."""

    forgotten: int
    config: str = ""
    leases: dict[str, _Lease] = field(default_factory=dict)
    log: deque[tuple[int, str]] = field(default_factory=deque)


class Book:
    """What the registry knows.

    ``epoch`` names this life of the registry: two books never share one, as their revisions and leases can't be
    compared. ``revision`` is where it begins. ``log_size`` is how many changes, over all services, are remembered for
    watchers that come back. An instance given to the book must not be changed afterwards.
    """

    def __init__(self, epoch: str, revision: int = 0, log_size: int = LOG_SIZE) -> None:
        self.epoch = epoch
        self.revision = revision
        self._log_size = log_size
        self._services: dict[str, _Service] = {}
        self._leases: dict[str, _Lease] = {}
        self._granted = 0
        # One entry a lease, at the time when it was last looked at: a renewal doesn't touch the heap, and an entry that
        # comes up for a lease renewed meanwhile goes back in at its new time. Entries of ended leases stay until they
        # come up.
        self._queue: list[tuple[float, str]] = []
        # The services of all logged changes in order, so that the oldest change of all is always the oldest of its
        # service.
        self._log: deque[str] = deque()
        self._forgotten = revision

    def register(self, instance: pb.Instance, ttl: float, now: float) -> str:
        """Make an instance known for ``ttl`` seconds and return its lease's id.

        An id that its service already has is replaced, and so is its lease, which is unknown from here on. An instance
        that is exactly as before is no change.
        """
        service = self._service(instance.service)
        before = service.leases.get(instance.id)
        if before is not None:
            del self._leases[before.id]
        self._granted += 1
        lease = _Lease(f"{self.epoch}-{self._granted}", instance, ttl, now + ttl)
        service.leases[instance.id] = self._leases[lease.id] = lease
        self._enqueue(lease)
        if before is None or before.instance != instance:
            self._record(instance.service, instance.id)
        return lease.id

    def renew(self, lease_ids: list[str], now: float) -> list[str]:
        """Begin the time to live of these leases anew, and return those that aren't known."""
        unknown = []
        for lease_id in lease_ids:
            lease = self._leases.get(lease_id)
            if lease is None:
                unknown.append(lease_id)
            else:
                lease.expires_at = now + lease.ttl
                lease.spared = False
        return unknown

    def renew_all(self, now: float) -> None:
        """Begin the time to live of every lease anew: the registry itself was away, and heard nobody."""
        for lease in self._leases.values():
            lease.expires_at = now + lease.ttl
            lease.spared = False

    def deregister(self, lease_id: str) -> pb.Instance | None:
        """End a lease and return its instance; None when the lease isn't known."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return None
        self._end(lease)
        return lease.instance

    def expire(self, now: float, *, doubtful: bool = False) -> list[pb.Instance]:
        """End the leases whose time is over and return their instances.

        ``doubtful``: perhaps the registry itself did not run for a while, and their keep-alives wait to be read. Each
        lease then stays for one period of them more, once until it is renewed.

        O(k log n) for the k leases that expired, or were renewed and come up for the first time since.
        """
        ended = []
        while self._queue and self._queue[0][0] <= now:
            lease = self._leases.get(heapq.heappop(self._queue)[1])
            if lease is None:
                continue
            if doubtful and lease.expires_at <= now and not lease.spared:
                lease.spared = True
                lease.expires_at = now + lease.ttl / RENEWALS
            if lease.expires_at > now:
                heapq.heappush(self._queue, (lease.expires_at, lease.id))
            else:
                self._end(lease)
                ended.append(lease.instance)
        return ended

    def next_expiry(self) -> float | None:
        """When to call ``expire`` next: no lease ends before, though none need end then. None: nothing to wait for."""
        return self._queue[0][0] if self._queue else None

    def services(self) -> list[str]:
        """The services that have an instance, by name."""
        return sorted(name for name, service in self._services.items() if service.leases)

    def find(self, service: str, instance_id: str) -> pb.Instance | None:
        """The instance with this id, if it is known."""
        known = self._services.get(service)
        lease = known.leases.get(instance_id) if known else None
        return lease.instance if lease else None

    def snapshot(self, service: str) -> tuple[pb.Instance, ...]:
        """All instances of a service, by id."""
        known = self._services.get(service)
        return tuple(known.leases[key].instance for key in sorted(known.leases)) if known else ()

    def configure(self, service: str, config: str) -> None:
        """Set a service's config, as JSON that whoever calls has validated; empty to take it back."""
        if config == self.config(service):
            return
        self._service(service).config = config
        self._record(service, _CONFIG)

    def config(self, service: str) -> str:
        """The config that is set for a service; empty when there is none."""
        known = self._services.get(service)
        return known.config if known else ""

    def configs(self) -> dict[str, str]:
        """The services' configs, of those that have one."""
        return {name: service.config for name, service in self._services.items() if service.config}

    def changes(self, service: str, since: int) -> Delta | None:
        """What changed in a service after revision ``since``, each instance once, as it is now.

        None when the log doesn't reach back so far, or when the book never was at that revision: take a snapshot.
        """
        if since > self.revision:
            return None
        known = self._services.get(service)
        if since < (known.forgotten if known else self._forgotten):
            return None
        if known is None:
            return Delta()
        changed = set()
        for revision, instance_id in reversed(known.log):
            if revision <= since:
                break
            changed.add(instance_id)
        configured = _CONFIG in changed
        changed.discard(_CONFIG)
        return Delta(
            upserted=tuple(known.leases[key].instance for key in sorted(changed & known.leases.keys())),
            removed_ids=tuple(sorted(changed - known.leases.keys())),
            config=known.config if configured else None,
        )

    def __repr__(self) -> str:
        return f"<Book epoch={self.epoch} revision={self.revision} leases={len(self._leases)}>"

    def _service(self, name: str) -> _Service:
        service = self._services.get(name)
        if service is None:
            # It may have been here before and have left the log since.
            service = self._services[name] = _Service(self._forgotten)
        return service

    def _enqueue(self, lease: _Lease) -> None:
        heapq.heappush(self._queue, (lease.expires_at, lease.id))
        # Ids that are registered over and over with long leases must not pile up what has ended.
        if len(self._queue) > 2 * len(self._leases) + 64:
            self._queue = [(lease.expires_at, lease.id) for lease in self._leases.values()]
            heapq.heapify(self._queue)

    def _end(self, lease: _Lease) -> None:
        del self._leases[lease.id]
        del self._services[lease.instance.service].leases[lease.instance.id]
        self._record(lease.instance.service, lease.instance.id)

    def _record(self, service_name: str, instance_id: str) -> None:
        self.revision += 1
        self._services[service_name].log.append((self.revision, instance_id))
        self._log.append(service_name)
        if len(self._log) > self._log_size:
            oldest = self._log.popleft()
            service = self._services[oldest]
            self._forgotten, _ = service.log.popleft()
            service.forgotten = self._forgotten
            if not (service.log or service.leases or service.config):
                del self._services[oldest]
