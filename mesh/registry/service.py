"""``weft.mesh.v1.Registry`` over a ``Book``, for an asyncio server.

The book decides; this file validates requests, keeps the time and notifies watchers. A watcher is a coroutine that
knows the last revision it sent. It wakes when its service changes, and when its stream can take a message, it reads
from the book what has changed since, one message of bounded size at a time. So a watcher that reads slowly, or not at
all, costs no more memory than one message, no registration waits for it, and after a while it is dropped.
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
from mesh.registry.book import Book
from mesh.registry.limits import MAX_CONFIGS_IN_PROGRESS, MAX_LEASE_IDS, SEND_TIMEOUT, WATCH_MESSAGE_BYTES
from mesh.registry.snapshots import Snapshots
from mesh.registry.state import State
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

try:
    from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
except ImportError:  # pragma: no cover - these come with grpcio-status; without it errors have no details
    _HAVE_DETAILS = False
else:
    _HAVE_DETAILS = True

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Registry"].full_name

DEFAULT_TTL = 10.0
MIN_TTL = 1.0
MAX_TTL = 300.0
"""The bounds of a lease's TTL. Seconds."""

EXPIRY_PERIOD = 0.1
"""Leases expire at most this often, so that thousands of them need few wake-ups. Seconds."""

SUSPENDED_AFTER = 1.0
"""An expiry timer that is this late means that the process was suspended or starved, and read no keep-alives.
Seconds."""

SILENCE = 0.5
"""After this long without any keep-alive, the process may have been suspended for any part of that time. A shorter
suspension lets no lease expire, as keep-alives come every third of a TTL. Seconds."""

TRIM_DELAY = 1.0
"""How long after a watcher left unread messages free memory is returned to the system, once for all watchers that leave
meanwhile. Seconds."""

_Context = grpc.aio.ServicerContext[Any, Any]

_log = logging.getLogger(__name__)


class RegistryService(pb_grpc.RegistryServicer):
    """The registry's servicer, for the event loop that its server runs on.

    ``state``: where service configs are kept across restarts, or None. ``send_timeout``: how long a watcher may take to
    receive a message.
    """

    def __init__(self, book: Book, send_timeout: float = SEND_TIMEOUT) -> None:
        self._book = book
        self._send_timeout = send_timeout
        self.state: State | None = None
        self._parsing = asyncio.Lock()
        self._configs_in_progress = 0  # calls that hold the lock, or wait for it
        self._configuring = asyncio.Lock()
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._snapshots = Snapshots(book)
        self._ending: set[asyncio.Task[None]] = set()
        self._streams: set[asyncio.Task[Any]] = set()
        self._sending: set[asyncio.Task[Any]] = set()  # streams that wait for a watcher to receive a message
        self._expiry: asyncio.TimerHandle | None = None
        self._trimming: asyncio.TimerHandle | None = None
        self._last_keep_alive = -SILENCE
        self._silence_ended = -SILENCE  # when the last period of silence ended
        self._closed = False

    async def Register(self, request: pb.RegisterRequest, context: _Context) -> pb.RegisterResponse:
        # A copy of the known fields: a part of a message keeps the whole message in memory.
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
            # A process that restarted elsewhere; or two with one id, and then this is logged again and again.
            _log.warning(
                "%s: instance %s moved from %s to %s; if this repeats, two processes use the same instance id",
                instance.service,
                instance.id,
                before.address,
                instance.address,
            )
        lease_id = self._book.register(instance, ttl, _now())
        self._notify(instance.service)
        self._schedule()
        granted = Duration(seconds=int(ttl), nanos=int(ttl % 1 * 1e9))
        return pb.RegisterResponse(lease_id=lease_id, ttl=granted)

    # The two streams are async generators, so that interceptors can iterate over them. Requests are read through the
    # context, so that close() can end the wait for one with a status.

    async def KeepAlive(self, _: object, context: _Context) -> AsyncIterator[pb.KeepAliveResponse]:
        async with self._stream(context):
            while (request := await context.read()) is not grpc.aio.EOF:
                if len(request.lease_ids) > MAX_LEASE_IDS:
                    too_many = f"has {len(request.lease_ids)} ids; the limit is {MAX_LEASE_IDS}"
                    await _refuse(context, [("lease_ids", too_many)])
                now = _now()
                self._check_silence(now)
                self._last_keep_alive = now
                unknown = self._book.renew(request.lease_ids, now)
                yield pb.KeepAliveResponse(unknown_lease_ids=unknown)

    async def Deregister(self, request: pb.DeregisterRequest, _: _Context) -> pb.DeregisterResponse:
        instance = self._book.deregister(request.lease_id)
        if instance is not None:
            self._notify(instance.service)
        return pb.DeregisterResponse()

    async def ListInstances(self, request: pb.ListInstancesRequest, context: _Context) -> pb.ListInstancesResponse:
        answer = paging.page(self._book, request)
        if not isinstance(answer, pb.ListInstancesResponse):
            await _refuse(context, answer)
            raise AssertionError("abort raises")
        return answer

    async def Watch(self, request: pb.WatchRequest, context: _Context) -> AsyncIterator[pb.WatchResponse]:
        await _refuse(context, checks.service("service", request.service))
        # Sent now, so that a status can follow while a message still waits for the watcher.
        await context.send_initial_metadata(())
        # None: the watcher has seen nothing of this book, or only part of a snapshot.
        since = request.revision if request.revision and request.epoch == self._book.epoch else None
        is_up_to_date = False
        async with self._stream(context):
            with self._watcher(request.service) as changed:
                while True:
                    changed.clear()
                    delta = None if since is None else self._book.changes(request.service, since, WATCH_MESSAGE_BYTES)
                    if delta is None:
                        since = self._book.revision
                        for message in self._snapshots.snapshot(request.service):
                            with self._receiving(request.service, context):
                                yield message
                        # Next comes what changed while the parts were sent.
                        is_up_to_date = not message.more
                    # The first response is sent even without changes: the watcher learns that it is up to date.
                    elif delta or not is_up_to_date:
                        with self._receiving(request.service, context):
                            yield self._snapshots.delta(delta)
                        since = delta.revision
                        is_up_to_date = True
                    else:
                        since = self._book.revision
                        await changed.wait()

    async def SetServiceConfig(
        self, request: pb.SetServiceConfigRequest, context: _Context
    ) -> pb.SetServiceConfigResponse:
        if self._configs_in_progress >= MAX_CONFIGS_IN_PROGRESS:
            text = f"{MAX_CONFIGS_IN_PROGRESS} service configs are already being set, the registry's limit; try again"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self._configs_in_progress += 1
        try:
            # In a thread, one at a time: a large config takes a tenth of a second, which would block all other calls.
            async with self._parsing:
                violations, warnings = await asyncio.to_thread(
                    checks.service_config, request.service, request.service_config
                )
        finally:
            self._configs_in_progress -= 1
        await _refuse(context, violations)
        # Shielded: a caller that leaves must not cause a config to be on disk but not in the book.
        try:
            full = await asyncio.shield(self._configure(request.service, request.service_config))
        except OSError as error:
            _log.error("%s: can't save the config in %r: %s", request.service, self.state, error)
            await context.abort(
                grpc.StatusCode.INTERNAL,
                f"the registry can't save the config ({error.strerror}); keeping the previous one",
            )
        if full:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, full)
        what = "set" if request.service_config else "removed"
        ignored = f"; ignored: {'; '.join(warnings[:3])}" if warnings else ""
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
            self._notify(service)
            return ""

    async def GetServiceConfig(self, request: pb.GetServiceConfigRequest, _: _Context) -> pb.GetServiceConfigResponse:
        return pb.GetServiceConfigResponse(service_config=self._book.config(request.service))

    def close(self) -> None:
        """End all streams with UNAVAILABLE, so that their clients use another registry, and expire no more leases.

        Call the server's ``stop`` next.
        """
        self._closed = True
        if self._expiry is not None:
            self._expiry.cancel()
        if self._trimming is not None:
            self._trimming.cancel()
        # A stream that is sending ends after that: cancelled now, it would end without a status.
        for stream in self._streams - self._sending:
            stream.cancel()

    def __repr__(self) -> str:
        return f"<RegistryService {self._book!r} streams={len(self._streams)}>"

    @contextlib.contextmanager
    def _receiving(self, service: str, context: _Context) -> Iterator[None]:
        """End the call if its watcher takes too long to receive the message that is sent in this block."""
        task = asyncio.current_task()
        assert task is not None
        timer = asyncio.get_running_loop().call_later(self._send_timeout, self._drop, service, context, task)
        self._sending.add(task)
        try:
            yield
        except BaseException:
            # The watcher left or was dropped. Hundreds of them can leave tens of megabytes unread.
            if self._trimming is None and not self._closed:
                self._trimming = asyncio.get_running_loop().call_later(TRIM_DELAY, self._trim)
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
        # A generator may outlive its call; using the context then crashes core.
        if task.done():
            return
        peer = context.peer()
        lines.info(_log, "dropped", "%s: watcher %s read nothing for %g s; dropped", service, peer, self._send_timeout)
        ending = asyncio.create_task(self._abandon(context, task))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _abandon(self, context: _Context, task: asyncio.Task[Any]) -> None:
        """End a call whose handler waits to send a message."""
        if task.done():
            return
        # Send the status first, which ends the call; then cancel the handler.
        asyncio.get_running_loop().call_soon(task.cancel)
        with contextlib.suppress(Exception):  # the call may have ended by now, in whatever way
            text = f"the watcher read nothing for {self._send_timeout:g} s; watch again"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)

    @contextlib.contextmanager
    def _watcher(self, service: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the service changes."""
        changed = asyncio.Event()
        watchers = self._watchers.setdefault(service, set())
        watchers.add(changed)
        try:
            yield changed
        finally:
            watchers.remove(changed)
            if not watchers:
                del self._watchers[service]
                self._snapshots.forget(service)

    def _notify(self, service: str) -> None:
        self._snapshots.forget(service)
        for changed in self._watchers.get(service, ()):
            changed.set()

    @contextlib.asynccontextmanager
    async def _stream(self, context: _Context) -> AsyncIterator[None]:
        """Run a stream's handler so that ``close`` ends it."""
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
        """Schedule ``_expire`` for when the next lease may expire."""
        due = self._book.next_expiry()
        if due is None or self._closed:
            return
        due = max(due, _now() + EXPIRY_PERIOD)
        if self._expiry is not None:
            if self._expiry.when() <= due:
                return
            self._expiry.cancel()
        self._expiry = asyncio.get_running_loop().call_at(due, self._expire, due)

    def _check_silence(self, now: float) -> None:
        """Note whether a period of silence ends here. (A periodic timer would wake an idle registry.)"""
        if now - self._last_keep_alive > SILENCE:
            self._silence_ended = now

    def _expire(self, due: float) -> None:
        self._expiry = None
        now = _now()
        self._check_silence(now)
        if now - due > SUSPENDED_AFTER:
            _log.warning("this process was suspended or starved for %.1f s; extending all leases", now - due)
            self._book.renew_all(now)
        # Right after a period of silence, keep-alives may have arrived that are not read yet.
        for instance in self._book.expire(now, maybe_suspended=now - self._silence_ended < SILENCE):
            _log.info("%s: lease of instance %s at %s expired", instance.service, instance.id, instance.address)
            self._notify(instance.service)
        self._schedule()


def _now() -> float:
    """The loop's time: monotonic, so that no lease expires when the wall clock jumps."""
    return asyncio.get_running_loop().time()


async def _refuse(context: _Context, violations: checks.Violations) -> None:
    """End the call with INVALID_ARGUMENT if there are violations."""
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
