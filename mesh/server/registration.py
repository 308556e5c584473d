"""Registration: a lease at the registry for each service of a process, for as long as the process serves.

``Leases`` holds the state and decides; ``Registration`` does the IO. One KeepAlive stream renews all leases, with a
message every third of their TTL, with jitter, so that replicas started together don't renew together. Leases that the
registry doesn't know (it restarted, or this process was suspended for too long) are registered again. An unreachable
registry is retried forever, with backoff; serving never waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from mesh import core, lines
from mesh.config.settings import RetryPolicy
from mesh.errors import short_details
from mesh.policy.call.backoff import Backoff
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

LOG = logging.getLogger("mesh.server")

KEEP_ALIVES_PER_TTL = 3
"""Keep-alives that are sent in a lease's TTL: two may be lost."""

REGISTRY_TIMEOUT = 3.0
"""Seconds that the registry gets to respond."""

TTL_FLOOR = 1.0
"""The shortest TTL that keep-alives are timed by, whatever the registry grants: a wrong response must not make its
instances flood it. Seconds."""

BACKOFF = RetryPolicy(max_attempts=2, initial_backoff=0.1, max_backoff=2.0)

_CHANNEL_OPTIONS = [
    # Its own connection, which detects a registry that stopped responding, and reconnects soon after it is back.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.enable_http_proxy", 0),
]


class Leases:
    """Which instances are registered, under which leases. No IO; one instance per service."""

    def __init__(self, instances: Iterable[pb.Instance], ttl: float) -> None:
        self._instances = {instance.service: instance for instance in instances}
        self._held: dict[str, str] = {}  # service -> lease id
        self._ttl = ttl

    @property
    def ttl(self) -> float:
        """Seconds for which leases last without a keep-alive."""
        return self._ttl

    def missing(self) -> list[pb.Instance]:
        """The instances to register."""
        return [instance for service, instance in self._instances.items() if service not in self._held]

    def held(self) -> list[str]:
        """The leases to renew, or to end."""
        return list(self._held.values())

    def granted(self, instance: pb.Instance, lease_id: str, ttl: float) -> None:
        """The registry granted ``instance`` a lease of ``ttl`` seconds, which may be shorter than requested."""
        self._held[instance.service] = lease_id
        if ttl > 0:
            self._ttl = max(TTL_FLOOR, min(self._ttl, ttl))

    def forget(self, lease_ids: Iterable[str]) -> None:
        """The registry doesn't know these leases."""
        unknown = set(lease_ids)
        self._held = {service: lease_id for service, lease_id in self._held.items() if lease_id not in unknown}

    def keep_alive_in(self, rng: random.Random) -> float:
        """Seconds until the next keep-alive: up to a fifth early, never late."""
        return self._ttl / KEEP_ALIVES_PER_TTL * rng.uniform(0.8, 1.0)

    def __repr__(self) -> str:
        return f"<Leases {len(self._held)}/{len(self._instances)} held, ttl={self._ttl:g}s>"


class _RegistryError(Exception):
    """The registry ended a stream, or didn't respond in time."""


class Registration:
    """Keeps ``instances`` registered at ``registry`` from ``start`` to ``close``, on one event loop."""

    def __init__(
        self, registry: str, instances: Sequence[pb.Instance], ttl: float, *, rng: random.Random | None = None
    ) -> None:
        self.leases = Leases(instances, ttl)
        self._registry = registry
        self._ttl = Duration()
        self._ttl.FromNanoseconds(round(ttl * 1e9))
        self._rng = rng or random.Random()
        self._task: asyncio.Task[None] | None = None
        self._channel: grpc.aio.Channel | None = None
        self._registering: asyncio.Task[None] | None = None
        self._logged = ""  # the failure logged last, until the registry responds again
        self._instance_id = instances[0].id if instances else ""

    def start(self) -> None:
        """Start registering in the background."""
        self._channel = core.aio_channel(self._registry, _CHANNEL_OPTIONS)
        self._task = asyncio.get_running_loop().create_task(self._run(pb_grpc.RegistryStub(self._channel)))

    async def close(self, seconds: float) -> None:
        """Deregister, within ``seconds``; leases that are left expire by themselves."""
        if self._task is None or self._channel is None:
            return
        end = time.monotonic() + seconds
        # First stop the keep-alives: they would find the ended leases unknown, and register again.
        task, self._task = self._task, None
        task.cancel()
        await asyncio.wait([task], timeout=seconds)
        # Wait for a lease that is being granted: otherwise nobody would end it before it expires.
        if self._registering is not None and not self._registering.done():
            await asyncio.wait([self._registering], timeout=seconds)
            self._registering.cancel()
            await asyncio.wait([self._registering])
        seconds = max(0.0, end - time.monotonic())
        stub = pb_grpc.RegistryStub(self._channel)
        ended = [stub.Deregister(pb.DeregisterRequest(lease_id=lease), timeout=seconds) for lease in self.leases.held()]
        for outcome in await asyncio.gather(*ended, return_exceptions=True):
            if isinstance(outcome, BaseException):
                why, ttl = _reason(outcome), self.leases.ttl
                LOG.warning("deregistration at %s failed: %s; the lease expires in %g s", self._registry, why, ttl)
                break
        self.leases.forget(self.leases.held())
        await self._channel.close()

    async def _run(self, stub: Any) -> None:
        backoff = Backoff(BACKOFF)
        while True:
            try:
                await self._register(stub)
                backoff.reset()
                await self._renew(stub)
            except Exception as error:  # whatever goes wrong at the registry, the server keeps serving
                if isinstance(error, (grpc.RpcError, _RegistryError)):
                    if _reason(error) != self._logged:
                        self._logged = _reason(error)
                        LOG.warning("registration at %s failed; retrying: %s", self._registry, self._logged)
                else:
                    LOG.exception("registration at %s failed; retrying", self._registry)
            await asyncio.sleep(backoff.delay(self._rng))

    async def _register(self, stub: Any) -> None:
        """Register the instances that have no lease."""
        missing = self.leases.missing()
        for instance in missing:
            self._registering = asyncio.get_running_loop().create_task(self._register_one(stub, instance))
            # Nobody may await it any more when it fails.
            self._registering.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.shield(self._registering)
        if missing:
            self._on_response()
            services = ", ".join(instance.service for instance in missing)
            lines.info(LOG, "registered", "registered at %s as %s: %s", self._registry, self._instance_id, services)

    def _on_response(self) -> None:
        if self._logged:
            self._logged = ""
            lines.info(LOG, "reachable", "registry %s is reachable again", self._registry)

    async def _register_one(self, stub: Any, instance: pb.Instance) -> None:
        request = pb.RegisterRequest(instance=instance, ttl=self._ttl)
        lease = await stub.Register(request, timeout=REGISTRY_TIMEOUT, wait_for_ready=True)
        if not lease.lease_id:
            raise _RegistryError("the registry granted no lease")
        self.leases.granted(instance, lease.lease_id, lease.ttl.seconds + lease.ttl.nanos / 1e9)

    async def _renew(self, stub: Any) -> None:
        """Send keep-alives for all leases on one stream, until it fails."""
        stream = stub.KeepAlive()
        ending = asyncio.ensure_future(stream.code())
        try:
            while True:
                # Immediately on a new stream: after an outage a lease may be about to expire.
                # Not wait_for: in Python 3.11 it loses a cancellation that arrives together with a response.
                async with asyncio.timeout(REGISTRY_TIMEOUT):
                    await stream.write(pb.KeepAliveRequest(lease_ids=self.leases.held()))
                    response = await stream.read()
                if response is grpc.aio.EOF:
                    raise _RegistryError("the registry ended the keep-alive stream")
                self._on_response()
                if response.unknown_lease_ids:
                    LOG.warning(
                        "registry %s restarted, or another process uses the instance id %s; registering again",
                        self._registry,
                        self._instance_id,
                    )
                    self.leases.forget(response.unknown_lease_ids)
                    await self._register(stub)
                # Returns early when the stream ends, rather than find that out at the next write.
                await asyncio.wait([ending], timeout=self.leases.keep_alive_in(self._rng))
                if ending.done():
                    raise _RegistryError(f"{ending.result().name}: {await stream.details()}")
        except TimeoutError:
            raise _RegistryError(f"no response in {REGISTRY_TIMEOUT:g} s") from None
        except asyncio.InvalidStateError:  # the stream ended before the message was written
            raise _RegistryError(f"{(await stream.code()).name}: {await stream.details()}") from None
        finally:
            ending.cancel()
            stream.cancel()


class RegistrationThread:
    """A ``Registration`` for a threaded server, on an event loop in its own thread."""

    def __init__(self, registration: Registration) -> None:
        self._registration = registration
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Event | None = None
        self._timeout = 0.0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="mesh-registration", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._started.wait()

    def close(self, seconds: float) -> None:
        """Like ``Registration.close``."""
        deadline = time.monotonic() + seconds
        if self._loop is not None and self._closing is not None:
            self._timeout = seconds
            with contextlib.suppress(RuntimeError):  # already closed
                self._loop.call_soon_threadsafe(self._closing.set)
            # A little longer than the deregistration gets, for the loop to close.
            self._thread.join(max(0.0, deadline - time.monotonic()) + 1.0)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        try:
            self._registration.start()
        finally:
            self._started.set()
        await self._closing.wait()
        await self._registration.close(self._timeout)


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        # How core ends the calls of a server that stops; cancelling on this side raises no AioRpcError.
        if error.code() is grpc.StatusCode.CANCELLED or error.details() == "Cancelling all calls":
            return "the registry is shutting down"
        return f"{error.code().name}: {short_details(error.details() or '')}"
    return str(error) or type(error).__name__
