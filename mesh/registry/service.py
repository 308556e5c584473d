"""``weft.mesh.v1.Registry`` over a ``Book``, for an asyncio server.

The book decides; this file validates, keeps the time and carries the news. A watcher is a coroutine that holds the
revision it was last sent: when its service changes it is woken, and when its stream can take a message it reads from
the book what it has missed. So a watcher that is slow, or never reads, holds no news back and costs no memory, and no
registration waits for it.
"""

# ruff: noqa: N802 - a servicer's methods have the names of its contract
from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from mesh import config, lines
from mesh.addresses import is_local, parse
from mesh.descriptors import unknown_names
from mesh.registry.book import Book, Delta
from mesh.registry.state import State
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

try:
    from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
except ImportError:  # pragma: no cover - they come with grpcio-status, without which errors have a text only
    _HAVE_DETAILS = False
else:
    _HAVE_DETAILS = True

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Registry"].full_name

DEFAULT_TTL = 10.0
MIN_TTL = 1.0
MAX_TTL = 300.0
"""Seconds. A TTL that is asked for is taken into these bounds."""

EXPIRY_PERIOD = 0.1
"""Leases are ended at most this often, so that thousands of them cost few wake-ups. Seconds."""

STALL = 1.0
"""An expiry that comes this late means that the process was stopped or starved, and heard no keep-alives. Seconds."""

QUIET = 0.5
"""After so long without any keep-alive the process may have been stopped, in any part of that time. A shorter stop lets
no lease end, as keep-alives come every third of a time to live. Seconds."""

MAX_TEXT = 1024
"""Characters in any text of an instance."""

MAX_METADATA = 64
"""Labels on an instance."""

MAX_CONFIG = 256 * 1024
"""Characters in a service config."""

_FULL_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)

_Context = grpc.aio.ServicerContext[Any, Any]
_Violations = list[tuple[str, str]]

_log = logging.getLogger(__name__)


class RegistryService(pb_grpc.RegistryServicer):
    """The registry's servicer. It belongs to the event loop that its server runs on.

    ``state``: where service configs are kept across restarts, if anywhere.
    """

    def __init__(self, book: Book) -> None:
        self._book = book
        self.state: State | None = None
        self._configuring = asyncio.Lock()
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._streams: set[asyncio.Task[Any]] = set()
        self._expiry: asyncio.TimerHandle | None = None
        self._heard = -QUIET  # when the last keep-alive came
        self._quiet_until = -QUIET  # when the last quiet time ended
        self._closed = False

    async def Register(self, request: pb.RegisterRequest, context: _Context) -> pb.RegisterResponse:
        instance = request.instance
        await _refuse(context, _instance_violations(instance))
        ttl = DEFAULT_TTL
        if request.HasField("ttl"):
            ttl = min(max(request.ttl.seconds + request.ttl.nanos / 1e9, MIN_TTL), MAX_TTL)
        before = self._book.find(instance.service, instance.id)
        if before is not None and before.address != instance.address:
            # A process that came back elsewhere; or two with one id, and then this line comes again and again.
            _log.warning(
                "%s: instance %s moved from %s to %s; two processes with one instance id do so again and again",
                instance.service,
                instance.id,
                before.address,
                instance.address,
            )
        lease_id = self._book.register(instance, ttl, _now())
        self._tell(instance.service)
        self._schedule()
        granted = Duration(seconds=int(ttl), nanos=int(ttl % 1 * 1e9))
        return pb.RegisterResponse(lease_id=lease_id, ttl=granted)

    # The two streams are async generators, which interceptors can iterate over. Requests are read through the context,
    # where close() can end the wait for one with a status of its own.

    async def KeepAlive(self, _: object, context: _Context) -> AsyncIterator[pb.KeepAliveResponse]:
        async with self._stream(context):
            while (request := await context.read()) is not grpc.aio.EOF:
                now = _now()
                self._note(now)
                self._heard = now
                unknown = self._book.renew(request.lease_ids, now)
                yield pb.KeepAliveResponse(unknown_lease_ids=unknown)

    async def Deregister(self, request: pb.DeregisterRequest, _: _Context) -> pb.DeregisterResponse:
        instance = self._book.deregister(request.lease_id)
        if instance is not None:
            self._tell(instance.service)
        return pb.DeregisterResponse()

    async def ListInstances(self, request: pb.ListInstancesRequest, _: _Context) -> pb.ListInstancesResponse:
        services = [request.service] if request.service else self._book.services()
        return pb.ListInstancesResponse(
            instances=[instance for service in services for instance in self._book.snapshot(service)],
            epoch=self._book.epoch,
            revision=self._book.revision,
        )

    async def Watch(self, request: pb.WatchRequest, context: _Context) -> AsyncIterator[pb.WatchResponse]:
        await _refuse(context, _service_violations("service", request.service))
        # None: has seen nothing of this book.
        since = request.revision if request.epoch == self._book.epoch else None
        answered = False
        async with self._stream(context):
            with self._watcher(request.service) as changed:
                while True:
                    changed.clear()
                    delta = None if since is None else self._book.changes(request.service, since)
                    # The first answer comes even when there is nothing to tell: the watcher learns that it is up to
                    # date.
                    if delta is None or delta or not answered:
                        step = self._step(request.service, delta)
                        yield step
                        since = step.revision
                        answered = True
                    await changed.wait()

    async def SetServiceConfig(
        self, request: pb.SetServiceConfigRequest, context: _Context
    ) -> pb.SetServiceConfigResponse:
        violations = _service_violations("service", request.service) + _config_violations(request.service_config)
        await _refuse(context, violations)
        # A caller that leaves meanwhile must not leave behind a config that is on disk and not in the book.
        try:
            await asyncio.shield(self._configure(request.service, request.service_config))
        except OSError as error:
            _log.error("%s: the config can't be kept in %r: %s", request.service, self.state, error)
            await context.abort(
                grpc.StatusCode.INTERNAL,
                f"the registry can't keep the config on disk ({error.strerror}); the one before still holds",
            )
        warnings = _config_warnings(request.service, request.service_config)
        what = "set" if request.service_config else "removed"
        ignored = f"; ignored in it: {'; '.join(warnings[:3])}" if warnings else ""
        lines.info(_log, "config", "%s: service config %s%s", request.service, what, ignored)
        return pb.SetServiceConfigResponse(warnings=warnings)

    async def _configure(self, service: str, text: str) -> None:
        async with self._configuring:
            if self.state is not None:
                configs = self._book.configs()
                configs[service] = text
                kept = {name: each for name, each in configs.items() if each}
                await asyncio.to_thread(self.state.save, kept)
            self._book.configure(service, text)
            self._tell(service)

    async def GetServiceConfig(self, request: pb.GetServiceConfigRequest, _: _Context) -> pb.GetServiceConfigResponse:
        return pb.GetServiceConfigResponse(service_config=self._book.config(request.service))

    def close(self) -> None:
        """End all streams with UNAVAILABLE, so that their clients look elsewhere, and end no more leases.

        To be followed by the server's ``stop``.
        """
        self._closed = True
        if self._expiry is not None:
            self._expiry.cancel()
        for stream in self._streams:
            stream.cancel()

    def __repr__(self) -> str:
        return f"<RegistryService {self._book!r} streams={len(self._streams)}>"

    def _step(self, service: str, delta: Delta | None) -> pb.WatchResponse:
        """The message that brings a watcher up to date, from a delta if there is one."""
        step = pb.WatchResponse(epoch=self._book.epoch, revision=self._book.revision)
        if delta is None:
            snapshot = pb.Snapshot(instances=self._book.snapshot(service), service_config=self._book.config(service))
            step.snapshot.CopyFrom(snapshot)
        else:
            step.delta.CopyFrom(
                pb.Delta(upserted=delta.upserted, removed_ids=delta.removed_ids, service_config=delta.config)
            )
        return step

    @contextlib.contextmanager
    def _watcher(self, service: str) -> Iterator[asyncio.Event]:
        """What is set whenever the service has changed."""
        changed = asyncio.Event()
        watchers = self._watchers.setdefault(service, set())
        watchers.add(changed)
        try:
            yield changed
        finally:
            watchers.remove(changed)
            if not watchers:
                del self._watchers[service]

    def _tell(self, service: str) -> None:
        for changed in self._watchers.get(service, ()):
            changed.set()

    @contextlib.asynccontextmanager
    async def _stream(self, context: _Context) -> AsyncIterator[None]:
        """Run a stream's handler such that ``close`` ends it."""
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            if not self._closed:
                yield
                return
        except asyncio.CancelledError:
            if not self._closed:
                raise
            task.uncancel()
        finally:
            self._streams.discard(task)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the registry is shutting down")

    def _schedule(self) -> None:
        """Have ``_expire`` called when the next lease may end."""
        due = self._book.next_expiry()
        if due is None or self._closed:
            return
        due = max(due, _now() + EXPIRY_PERIOD)
        if self._expiry is not None:
            if self._expiry.when() <= due:
                return
            self._expiry.cancel()
        self._expiry = asyncio.get_running_loop().call_at(due, self._expire, due)

    def _note(self, now: float) -> None:
        """See whether a quiet time ends here. (A clock of its own, ticking, would wake an idle registry.)"""
        if now - self._heard > QUIET:
            self._quiet_until = now

    def _expire(self, due: float) -> None:
        self._expiry = None
        now = _now()
        self._note(now)
        if now - due > STALL:
            _log.warning("this process was stopped or starved for %.1f s; all leases are extended", now - due)
            self._book.renew_all(now)
        # Right after a quiet time, keep-alives that came meanwhile may still wait to be read.
        for instance in self._book.expire(now, doubtful=now - self._quiet_until < QUIET):
            _log.info("%s: lease of instance %s at %s expired", instance.service, instance.id, instance.address)
            self._tell(instance.service)
        self._schedule()


def _now() -> float:
    """The loop's time: monotonic, so that a wall clock that jumps ends no lease."""
    return asyncio.get_running_loop().time()


async def _refuse(context: _Context, violations: _Violations) -> None:
    """End the call with INVALID_ARGUMENT if there are violations: pairs of a field's path and what is wrong with it."""
    if not violations:
        return
    text = "; ".join(f"{path}: {what}" for path, what in violations)
    trailers: tuple[tuple[str, bytes], ...] = ()
    if _HAVE_DETAILS:
        status = status_pb2.Status(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message=text)
        bad = error_details_pb2.BadRequest()
        for path, what in violations:
            bad.field_violations.add(field=path, description=what)
        status.details.add().Pack(bad)
        trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text, trailers)


def _instance_violations(instance: pb.Instance) -> _Violations:
    violations = _service_violations("instance.service", instance.service)
    if not instance.id:
        violations.append(("instance.id", "must be set"))
    violations += _address_violations("instance.address", instance.address)
    if len(instance.metadata) > MAX_METADATA:
        violations.append(("instance.metadata", f"has more than {MAX_METADATA} labels"))
    texts = {
        "instance.id": instance.id,
        "instance.address": instance.address,
        "instance.locality.region": instance.locality.region,
        "instance.locality.zone": instance.locality.zone,
        "instance.locality.sub_zone": instance.locality.sub_zone,
        "instance.metadata": max((text for label in instance.metadata.items() for text in label), key=len, default=""),
    }
    violations += [(path, f"is longer than {MAX_TEXT}") for path, text in texts.items() if len(text) > MAX_TEXT]
    return violations


def _service_violations(path: str, service: str) -> _Violations:
    if len(service) > MAX_TEXT or not _FULL_NAME.fullmatch(service):
        return [(path, 'must be a service\'s full name, such as "weft.user.v1.UserService"')]
    return []


def _config_violations(text: str) -> _Violations:
    if not text:
        return []
    if len(text) > MAX_CONFIG:
        return [("service_config", f"is longer than {MAX_CONFIG}")]
    try:
        config.parse(text)
    except ValueError as error:
        # "service config: methodConfig[0].timeout: expected ...", or "service config: not JSON: ..."
        path, _, what = str(error).removeprefix("service config: ").partition(": ")
        return [("service_config", f"{path}: {what}") if " " in path else (f"service_config.{path}", what)]
    return []


def _config_warnings(service: str, text: str) -> tuple[str, ...]:
    """What is unknown in a valid config, and so ignored."""
    if not text:
        return ()
    parsed = config.parse(text)
    return (*parsed.warnings, *unknown_names(parsed, [service]))


def _address_violations(path: str, address: str) -> _Violations:
    if is_local(address):
        return []
    try:
        parsed = parse(address)
    except ValueError as error:
        return [(path, f'must be "host:port", "[ipv6]:port" or "unix:path": {error}')]
    if parsed.is_wildcard:
        return [(path, "must be an address that others can reach, not the wildcard that the server listens on")]
    return []
