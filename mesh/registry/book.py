"""The registry's data: instances under leases, services' configs, and a bounded log of changes.

Rule: no clock and no IO; randomness only in lease ids. ``now`` is monotonic seconds, the epoch is an argument, and each
method decides and returns. ``service.py`` waits, wakes watchers and does the IO.

Each change that a watcher can see gets the next *revision*. A watcher that names the revision it has seen gets the
changes since then if the log reaches back that far, and otherwise a snapshot. So the book keeps no state per watcher,
and slow watchers cost nothing.
"""

from __future__ import annotations

import heapq
import itertools
import math
import secrets
from bisect import bisect_left, bisect_right, insort
from collections import deque
from dataclasses import dataclass, field

from mesh.registry.limits import (
    MAX_CONFIGS,
    MAX_CONFIGS_BYTES,
    MAX_INSTANCES,
    MAX_SERVICE_BYTES,
    MAX_TOTAL_BYTES,
)
from weft.mesh.v1 import registry_pb2 as pb

LOG_SIZE = 10_000
"""Changes that the log keeps, over all services."""

LEASE_ID_BYTES = 16
"""Random bytes in a lease's id, so that it can't be guessed: whoever knows it can renew or end the lease. Bytes."""

KEEP_ALIVES_PER_TTL = 3
"""Keep-alives that a client sends in a lease's TTL."""

_CONFIG = ""  # the service's config in the log, where instances have their ids, which are never empty


@dataclass(frozen=True, slots=True)
class Delta:
    """What changed in a service: new or changed instances, and the ids of removed ones.

    ``config``: the service config's JSON if that changed, empty if it was removed; else None. ``revision``: the last
    one included; there may be later ones.
    """

    upserted: tuple[pb.Instance, ...] = ()
    removed_ids: tuple[str, ...] = ()
    config: str | None = None
    revision: int = field(default=0, compare=False)

    def __bool__(self) -> bool:
        return bool(self.upserted or self.removed_ids or self.config is not None)


@dataclass(slots=True)
class _Lease:
    id: str
    instance: pb.Instance
    size: int
    ttl: float
    expires_at: float
    extended: bool = False  # has had its one extension since it was last renewed


@dataclass(slots=True)
class _Service:
    """``log_start``: changes of this service up to this revision are no longer in the log."""

    log_start: int
    config: str = ""
    size: int = 0  # of its instances, in bytes
    leases: dict[str, _Lease] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)  # of the leases' instances, in order
    log: deque[tuple[int, str]] = field(default_factory=deque)


class Book:
    """The registry's state.

    ``epoch`` identifies this run of the registry: no two books share one, as their revisions and leases can't be
    compared. ``revision``: the first one. ``log_size``: how many changes, over all services, are kept for watchers that
    reconnect. Instances must not be modified after they are passed in.
    """

    def __init__(self, epoch: str, revision: int = 0, log_size: int = LOG_SIZE) -> None:
        self.epoch = epoch
        self.revision = revision
        self._log_size = log_size
        self._services: dict[str, _Service] = {}
        self._leases: dict[str, _Lease] = {}
        self._size = 0  # of all instances, in bytes
        self._configs = 0  # how many services have one
        self._configs_size = 0  # in bytes
        # A heap with one entry per lease. A renewal doesn't touch it: when the entry of a renewed lease comes up, it is
        # pushed again with the new expiry. Entries of ended leases stay until they come up.
        self._queue: list[tuple[float, str]] = []
        # The services of all logged changes, in order: its first entry is the service with the oldest change.
        self._log: deque[str] = deque()
        self._log_start = revision

    def refusal(self, instance: pb.Instance) -> str:
        """The limit that prevents an instance from being registered, with its value; empty if none does."""
        service = self._services.get(instance.service)
        before = service.leases.get(instance.id) if service else None
        if before is None and len(self._leases) >= MAX_INSTANCES:
            return f"the registry already has {MAX_INSTANCES} instances, its limit"
        more = instance.ByteSize() - (before.size if before else 0)
        if (service.size if service else 0) + more > MAX_SERVICE_BYTES:
            return (
                f"the instances of {instance.service} would exceed {MAX_SERVICE_BYTES} bytes, the limit for a service"
            )
        if self._size + more > MAX_TOTAL_BYTES:
            return f"the instances of all services would exceed {MAX_TOTAL_BYTES} bytes, the registry's limit"
        return ""

    def register(self, instance: pb.Instance, ttl: float, now: float) -> str:
        """Register an instance for ``ttl`` seconds. Returns its lease's id, which only the caller may know.

        An instance with the same id in its service is replaced, and so is its lease, which becomes unknown. Registering
        an identical instance is not a change.
        """
        service = self._service(instance.service)
        before = service.leases.get(instance.id)
        if before is None:
            insort(service.ids, instance.id)
        else:
            del self._leases[before.id]
        lease = _Lease(secrets.token_hex(LEASE_ID_BYTES), instance, instance.ByteSize(), ttl, now + ttl)
        self._grow(service, lease.size - (before.size if before else 0))
        service.leases[instance.id] = self._leases[lease.id] = lease
        self._enqueue(lease)
        if before is None or before.instance != instance:
            self._log_change(instance.service, instance.id)
        return lease.id

    def renew(self, lease_ids: list[str], now: float) -> list[str]:
        """Restart the TTL of these leases. Returns those that are unknown."""
        unknown = []
        for lease_id in lease_ids:
            lease = self._leases.get(lease_id)
            if lease is None:
                unknown.append(lease_id)
            else:
                lease.expires_at = now + lease.ttl
                lease.extended = False
        return unknown

    def renew_all(self, now: float) -> None:
        """Restart the TTL of all leases: the registry was suspended and read no keep-alives."""
        for lease in self._leases.values():
            lease.expires_at = now + lease.ttl
            lease.extended = False

    def deregister(self, lease_id: str) -> pb.Instance | None:
        """End a lease. Returns its instance; None if the lease is unknown."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return None
        self._end(lease)
        return lease.instance

    def expire(self, now: float, *, maybe_suspended: bool = False) -> list[pb.Instance]:
        """End the leases that have expired. Returns their instances.

        ``maybe_suspended``: the registry may have been suspended, with keep-alives waiting to be read. Each lease then
        gets the time of one more keep-alive, once until it is renewed.

        O(k log n) for k leases that expired, or that were renewed and come up for the first time since.
        """
        ended = []
        while self._queue and self._queue[0][0] <= now:
            lease = self._leases.get(heapq.heappop(self._queue)[1])
            if lease is None:
                continue
            if maybe_suspended and lease.expires_at <= now and not lease.extended:
                lease.extended = True
                lease.expires_at = now + lease.ttl / KEEP_ALIVES_PER_TTL
            if lease.expires_at > now:
                heapq.heappush(self._queue, (lease.expires_at, lease.id))
            else:
                self._end(lease)
                ended.append(lease.instance)
        return ended

    def next_expiry(self) -> float | None:
        """When to call ``expire`` next: no lease expires before that. None if there are no leases."""
        return self._queue[0][0] if self._queue else None

    def services(self) -> list[str]:
        """The services that have instances, sorted by name."""
        return sorted(name for name, service in self._services.items() if service.leases)

    def find(self, service: str, instance_id: str) -> pb.Instance | None:
        """The instance with this id; None if there is none."""
        known = self._services.get(service)
        lease = known.leases.get(instance_id) if known else None
        return lease.instance if lease else None

    def snapshot(self, service: str) -> tuple[pb.Instance, ...]:
        """All instances of a service, sorted by id."""
        known = self._services.get(service)
        return tuple(known.leases[key].instance for key in known.ids) if known else ()

    def page(
        self, service: str, after: str, limit: float = math.inf, count: int | None = None
    ) -> tuple[tuple[pb.Instance, ...], bool]:
        """The instances of a service with ids after ``after``, sorted by id, and whether there are more.

        At most ``count``, and at most ``limit`` bytes together, or a single instance that is larger.
        """
        known = self._services.get(service)
        if known is None:
            return (), False
        first = bisect_right(known.ids, after)
        found: list[pb.Instance] = []
        for key in itertools.islice(known.ids, first, None if count is None else first + count):
            lease = known.leases[key]
            limit -= lease.size
            if limit < 0 and found:
                break
            found.append(lease.instance)
        return tuple(found), first + len(found) < len(known.ids)

    def config_refusal(self, service: str, config: str) -> str:
        """The limit that prevents a config from being set, with its value; empty if none does."""
        before = self.config(service)
        if config and not before and self._configs >= MAX_CONFIGS:
            return f"the registry already has configs for {MAX_CONFIGS} services, its limit"
        if self._configs_size - len(before.encode()) + len(config.encode()) > MAX_CONFIGS_BYTES:
            return f"all service configs would exceed {MAX_CONFIGS_BYTES} bytes, the registry's limit"
        return ""

    def configure(self, service: str, config: str) -> None:
        """Set a service's config, as JSON that the caller has validated; empty to remove it."""
        before = self.config(service)
        if config == before:
            return
        self._configs += bool(config) - bool(before)
        self._configs_size += len(config.encode()) - len(before.encode())
        self._service(service).config = config
        self._log_change(service, _CONFIG)

    def config(self, service: str) -> str:
        """A service's config; empty if there is none."""
        known = self._services.get(service)
        return known.config if known else ""

    def configs(self) -> dict[str, str]:
        """The configs of the services that have one."""
        return {name: service.config for name, service in self._services.items() if service.config}

    def changes(self, service: str, since: int, limit: float = math.inf) -> Delta | None:
        """What changed in a service after revision ``since``: each instance once, in its current state.

        As much as fits in ``limit`` bytes, or a single change that is larger: see the delta's revision. None if the log
        doesn't reach back that far, or the book has never had that revision: use a snapshot.
        """
        if since > self.revision:
            return None
        known = self._services.get(service)
        if since < (known.log_start if known else self._log_start):
            return None
        if known is None:
            return Delta(revision=self.revision)
        latest: dict[str, int] = {}  # each key's latest change, newest first
        for revision, key in reversed(known.log):
            if revision <= since:
                break
            latest.setdefault(key, revision)
        upserted, removed, config = [], [], None
        reached = since
        for key, revision in reversed(latest.items()):
            lease = known.leases.get(key)
            limit -= len(known.config.encode()) if key == _CONFIG else lease.size if lease else len(key.encode())
            if limit < 0 and reached > since:
                break
            reached = revision
            if key == _CONFIG:
                config = known.config
            elif lease:
                upserted.append(lease.instance)
            else:
                removed.append(key)
        else:
            reached = self.revision
        return Delta(
            upserted=tuple(sorted(upserted, key=lambda each: each.id)),
            removed_ids=tuple(sorted(removed)),
            config=config,
            revision=reached,
        )

    def __repr__(self) -> str:
        return f"<Book epoch={self.epoch} revision={self.revision} leases={len(self._leases)}>"

    def _service(self, name: str) -> _Service:
        service = self._services.get(name)
        if service is None:
            # It may have existed before, with changes that have left the log.
            service = self._services[name] = _Service(self._log_start)
        return service

    def _enqueue(self, lease: _Lease) -> None:
        heapq.heappush(self._queue, (lease.expires_at, lease.id))
        # Bounded also if the same ids are registered over and over with long leases.
        if len(self._queue) > 2 * len(self._leases) + 64:
            self._queue = [(lease.expires_at, lease.id) for lease in self._leases.values()]
            heapq.heapify(self._queue)

    def _end(self, lease: _Lease) -> None:
        del self._leases[lease.id]
        service = self._services[lease.instance.service]
        del service.leases[lease.instance.id]
        del service.ids[bisect_left(service.ids, lease.instance.id)]
        self._grow(service, -lease.size)
        self._log_change(lease.instance.service, lease.instance.id)

    def _grow(self, service: _Service, size: int) -> None:
        service.size += size
        self._size += size

    def _log_change(self, service_name: str, instance_id: str) -> None:
        self.revision += 1
        self._services[service_name].log.append((self.revision, instance_id))
        self._log.append(service_name)
        if len(self._log) > self._log_size:
            oldest = self._log.popleft()
            service = self._services[oldest]
            self._log_start, _ = service.log.popleft()
            service.log_start = self._log_start
            if not (service.log or service.leases or service.config):
                del self._services[oldest]
