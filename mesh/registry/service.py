"""``weft.mesh.v1.Registry`` over a ``Book``, for an asyncio server.

The book decides; this file validates, keeps the time and carries the news. A watcher is a coroutine that holds the
revision it was last sent: when its service changes it is woken, and when its stream can take a message it reads from
the book what it has missed, a message of bounded size at a time. So a watcher that is slow, or never reads, costs no
more memory than one message, no registration waits for it, and after a while it is dropped.
"""

# ruff: noqa: N802 - a servicer's methods have the names of its contract
from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from mesh import lines
from mesh.registry import checks, memory, paging
from mesh.registry.book import Book, Delta
from mesh.registry.limits import MAX_LEASE_IDS, MAX_PARTS, MAX_SETTING, STALLED, STEP_BYTES
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

TRIM_PERIOD = 1.0
"""How long after a watcher left unread messages memory is given back, once for all that do meanwhile. Seconds."""

_Context = grpc.aio.ServicerContext[Any, Any]

_log = logging.getLogger(__name__)


class RegistryService(pb_grpc.RegistryServicer):
    """The registry's servicer. It belongs to the event loop that its server runs on.

    ``state``: where service configs are kept across restarts, if anywhere. ``stalled``: how long a watcher may take to
    receive a message.
    """

    def __init__(self, book: Book, stalled: float = STALLED) -> None:
        self._book = book
        self._stalled = stalled
        self.state: State | None = None
        self._parsing = asyncio.Lock()
        self._waiting = 0  # calls that wait for it, or have it
        self._configuring = asyncio.Lock()
        self._watchers: dict[str, set[asyncio.Event]] = {}
        # The parts of watched services' snapshots as they are now, by the id before each.
        self._parts: dict[str, dict[str, tuple[pb.WatchResponse, bool]]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._streams: set[asyncio.Task[Any]] = set()
        self._sending: set[asyncio.Task[Any]] = set()  # those of them that wait for a watcher to receive a message
        self._expiry: asyncio.TimerHandle | None = None
        self._trimming: asyncio.TimerHandle | None = None
        self._heard = -QUIET  # when the last keep-alive came
        self._quiet_until = -QUIET  # when the last quiet time ended
        self._closed = False

    async def Register(self, request: pb.RegisterRequest, context: _Context) -> pb.RegisterResponse:
        # A copy of what is known in it: a part of a message keeps the whole message in memory.
        request.instance.DiscardUnknownFields()
        instance = pb.Instance()
        instance.CopyFrom(request.instance)
        await _refuse(context, checks.instance(instance, context.peer()))
        if full := self._book.refusal(instance):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, full)
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
                if len(request.lease_ids) > MAX_LEASE_IDS:
                    many = f"has {len(request.lease_ids)} ids; the limit is {MAX_LEASE_IDS}"
                    await _refuse(context, [("lease_ids", many)])
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

    async def ListInstances(self, request: pb.ListInstancesRequest, context: _Context) -> pb.ListInstancesResponse:
        answer = paging.page(self._book, request)
        if not isinstance(answer, pb.ListInstancesResponse):
            await _refuse(context, answer)
            raise AssertionError("a refused call ends")
        return answer

    async def Watch(self, request: pb.WatchRequest, context: _Context) -> AsyncIterator[pb.WatchResponse]:
        await _refuse(context, checks.service("service", request.service))
        # Sent now, a status may follow while a message still waits for the watcher.
        await context.send_initial_metadata(())
        # None: has seen nothing of this book, or not all of a snapshot.
        since = request.revision if request.revision and request.epoch == self._book.epoch else None
        answered = False
        async with self._stream(context):
            with self._watcher(request.service) as changed:
                while True:
                    changed.clear()
                    delta = None if since is None else self._book.changes(request.service, since, STEP_BYTES)
                    if delta is None:
                        since = self._book.revision
                        for step in self._snapshot(request.service):
                            with self._receiving(request.service, context):
                                yield step
                        # What changed while its parts were sent.
                        answered = not step.more
                    # The first answer comes even when there is nothing to tell: the watcher learns that it is up to
                    # date.
                    elif delta or not answered:
                        with self._receiving(request.service, context):
                            yield self._delta(delta)
                        since = delta.revision
                        answered = True
                    else:
                        since = self._book.revision
                        await changed.wait()

    async def SetServiceConfig(
        self, request: pb.SetServiceConfigRequest, context: _Context
    ) -> pb.SetServiceConfigResponse:
        if self._waiting >= MAX_SETTING:
            text = f"{MAX_SETTING} service configs are being set, the registry's limit; try again"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self._waiting += 1
        try:
            # In a thread, one at a time: a large config takes a tenth of a second, and nobody else is to wait for it.
            async with self._parsing:
                violations, warnings = await asyncio.to_thread(
                    checks.service_config, request.service, request.service_config
                )
        finally:
            self._waiting -= 1
        await _refuse(context, violations)
        # A caller that leaves meanwhile must not leave behind a config that is on disk and not in the book.
        try:
            full = await asyncio.shield(self._configure(request.service, request.service_config))
        except OSError as error:
            _log.error("%s: the config can't be kept in %r: %s", request.service, self.state, error)
            await context.abort(
                grpc.StatusCode.INTERNAL,
                f"the registry can't keep the config on disk ({error.strerror}); the one before still holds",
            )
        if full:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, full)
        what = "set" if request.service_config else "removed"
        ignored = f"; ignored in it: {'; '.join(warnings[:3])}" if warnings else ""
        lines.info(_log, "config", "%s: service config %s%s", request.service, what, ignored)
        return pb.SetServiceConfigResponse(warnings=warnings)

    async def _configure(self, service: str, text: str) -> str:
        """Set a config, or return the limit that it would exceed."""
        async with self._configuring:
            if full := self._book.config_refusal(service, text):
                return full
            if self.state is not None:
                configs = self._book.configs()
                configs[service] = text
                kept = {name: each for name, each in configs.items() if each}
                await asyncio.to_thread(self.state.save, kept)
            self._book.configure(service, text)
            self._tell(service)
            return ""

    async def GetServiceConfig(self, request: pb.GetServiceConfigRequest, _: _Context) -> pb.GetServiceConfigResponse:
        return pb.GetServiceConfigResponse(service_config=self._book.config(request.service))

    def close(self) -> None:
        """End all streams with UNAVAILABLE, so that their clients look elsewhere, and end no more leases.

        To be followed by the server's ``stop``.
        """
        self._closed = True
        if self._expiry is not None:
            self._expiry.cancel()
        if self._trimming is not None:
            self._trimming.cancel()
        # A stream that is sending ends after that: a cancel would end it without a status.
        for stream in self._streams - self._sending:
            stream.cancel()

    def __repr__(self) -> str:
        return f"<RegistryService {self._book!r} streams={len(self._streams)}>"

    def _snapshot(self, service: str) -> Iterator[pb.WatchResponse]:
        """All of a service: one message, or parts, which are complete with the delta that follows them.

        Each part is read from the book when it is sent, and is one for all watchers until the service changes.
        """
        after, last = "", False
        while not last:
            parts = self._parts.setdefault(service, {})
            found = parts.get(after)
            if found is None:
                if len(parts) >= MAX_PARTS:
                    parts.clear()
                found = parts[after] = self._part(service, after)
            step, last = found
            yield step
            if not last:
                after = (step.delta.upserted if after else step.snapshot.instances)[-1].id

    def _part(self, service: str, after: str) -> tuple[pb.WatchResponse, bool]:
        """The part of a snapshot with the instances after this id, and whether it is the last; the first part has the
        config, too."""
        config = "" if after else self._book.config(service)
        instances, more = self._book.page(service, after, STEP_BYTES - len(config.encode()))
        # With revision 0 a watcher that is cut off between parts begins again.
        step = pb.WatchResponse(epoch=self._book.epoch, revision=0 if after or more else self._book.revision)
        step.more = bool(after) or more
        if after:
            step.delta.upserted.extend(instances)
        else:
            step.snapshot.CopyFrom(pb.Snapshot(instances=instances, service_config=config))
        return step, not more

    def _delta(self, delta: Delta) -> pb.WatchResponse:
        step = pb.WatchResponse(epoch=self._book.epoch, revision=delta.revision)
        step.delta.CopyFrom(
            pb.Delta(upserted=delta.upserted, removed_ids=delta.removed_ids, service_config=delta.config)
        )
        return step

    @contextlib.contextmanager
    def _receiving(self, service: str, context: _Context) -> Iterator[None]:
        """End the call if its watcher takes too long to receive the message that is sent meanwhile."""
        task = asyncio.current_task()
        assert task is not None
        timer = asyncio.get_running_loop().call_later(self._stalled, self._drop, service, context, task)
        self._sending.add(task)
        try:
            yield
        except BaseException:
            # The watcher left, or was dropped. Of hundreds of them, what they didn't read is tens of megabytes.
            if self._trimming is None and not self._closed:
                self._trimming = asyncio.get_running_loop().call_later(TRIM_PERIOD, self._trim)
            raise
        finally:
            timer.cancel()
            self._sending.discard(task)
        if self._closed:
            raise asyncio.CancelledError

    def _trim(self) -> None:
        self._trimming = None
        memory.trim()

    def _drop(self, service: str, context: _Context, task: asyncio.Task[Any]) -> None:
        # A generator may outlive its call, whose context can't be used any more: core crashes.
        if task.done():
            return
        peer = context.peer()
        lines.info(_log, "dropped", "%s: watcher %s read nothing for %g s; dropped", service, peer, self._stalled)
        ending = asyncio.create_task(self._abandon(context, task))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _abandon(self, context: _Context, task: asyncio.Task[Any]) -> None:
        """End a call whose handler waits to send a message."""
        if task.done():
            return
        # First the status, which ends the call, and then the handler.
        asyncio.get_running_loop().call_soon(task.cancel)
        with contextlib.suppress(Exception):  # the call may end meanwhile, in whatever way
            text = f"the watcher read nothing for {self._stalled:g} s; watch again"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)

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
                self._parts.pop(service, None)

    def _tell(self, service: str) -> None:
        self._parts.pop(service, None)
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


async def _refuse(context: _Context, violations: checks.Violations) -> None:
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
