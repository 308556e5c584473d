"""Assembles a channel, sync or asyncio: the only place that decides the order of its parts.

A call goes through, from the caller's side to the wire:

1. the deadline: above retries, because one deadline covers all attempts;
2. hedges and retries: above the pick, because each attempt goes to another endpoint, and above the budget's count of
   calls, because the budget limits added attempts in proportion to calls;
3. the pick among READY endpoints: above the subchannel, because a subchannel is one address;
4. the subchannel's state, checked just before sending: below the pick, so that an attempt that can't be sent is picked
   again;
5. core's own channel, without core's retries, or attempts would multiply.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf import descriptor_pool

from mesh import context, forking, variables
from mesh.channel.arguments import check_compression, checked_options, checked_text
from mesh.channel.pool import CorePool, Pool
from mesh.channel.resolved_pool import ResolvedPool
from mesh.channel.subchannel import Method, Subchannel
from mesh.codes import Code
from mesh.config.parse import for_core
from mesh.config.settings import NEVER_HEDGE, NEVER_RETRY, Idempotency, MethodPolicy, ServiceConfig
from mesh.config.sources import FILE_POLL_PERIOD, ConfigFile, ConfigSources, Source
from mesh.core import ChannelOptions
from mesh.criticality import CRITICALITY
from mesh.discovery.target import resolver_for, short_target
from mesh.model import CallSpec, Endpoint, Locality, Metadatum, Outcome, Verdict
from mesh.policy.call.deadline import deadline_of
from mesh.policy.call.early import PENDING, EarlyCall, early_flow
from mesh.policy.call.flow import Flow, call_flow
from mesh.policy.cluster.cluster import Cluster
from mesh.tasks import keep_running

# Detects a dead peer within 2.4 s; core needs all three. The mesh's servers permit it; others may not, so it applies to
# mesh:/// targets only.
KEEPALIVE: ChannelOptions = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
)

OpenSubchannel = Callable[
    [str, ChannelOptions, grpc.ChannelCredentials | None, grpc.Compression | None],
    Subchannel,
]


class Assembly:
    """The parts of a channel: its config, its cluster and pool, and the policies of its methods.

    Created without IO, thread or loop; ``run`` starts it.
    """

    def __init__(
        self,
        target: str,
        options: Sequence[tuple[str, Any]] | None,
        credentials: grpc.ChannelCredentials | None,
        compression: grpc.Compression | None,
        open_subchannel: OpenSubchannel,
    ) -> None:
        variables.warn_once()
        target = checked_text("target", target)
        check_compression(compression)
        options = tuple(options or ())
        self._arguments = target, options, credentials, compression, open_subchannel
        self.target = target
        self.secure = credentials is not None
        self.rng = random.Random()
        # Weak: a program may create a stub, or a serializer, for each call.
        self._methods: weakref.WeakValueDictionary[tuple[Any, ...], Method] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()  # a new method must not miss a config that arrives at the same time
        found, resolver = resolver_for(target)
        self.discovers_over_aio = found.scheme == "mesh"  # the registry is watched over grpc.aio, also by sync channels
        given = checked_options(options)
        text = given.pop("grpc.service_config", None)
        self._retries = bool(given.pop("grpc.enable_retries", 1))
        if forking.generation:  # core must not reuse the parent's connection, which has the same options
            given.setdefault("weft.forks", forking.generation)
        name = short_target(target)
        self._configs = ConfigSources(name, service=found.health_service or "", balanced_by_core=resolver is None)
        self._configs.update(Source.OPTION, text or "")
        # Whether calls wait for a config that the resolver provides.
        self._config_pending = resolver is not None and resolver.configures and not text
        # With a config in the options the other sources are never read.
        self._config_file = None if text else ConfigFile.from_environment(found.health_service or target)
        source = resolver.source if resolver is not None else ""
        self.cluster = Cluster(name, self.config, self.rng, time.monotonic(), threading.Lock, source)
        self.cluster.locality = Locality(
            *(os.environ.get(f"MESH_{each}", "") for each in ("REGION", "ZONE", "SUB_ZONE"))
        )
        self.pool: Pool
        if resolver is None:
            if text:
                given["grpc.service_config"] = for_core(text)
            subchannel = open_subchannel(target, tuple(given.items()), credentials, compression)
            self.pool = CorePool(self.cluster, Endpoint(target), subchannel)
        else:
            keepalive = dict(KEEPALIVE) if found.scheme == "mesh" else {}
            core = {**keepalive, **_authority(found.authority, given), **given}

            def open_endpoint(address: str) -> Subchannel:
                health_service = self.config.health_service
                core_config = _endpoint_config(found.health_service if health_service is None else health_service)
                arguments = (*core.items(), ("grpc.service_config", core_config))
                return open_subchannel(address, arguments, credentials, compression)

            configured = functools.partial(self._apply_config, Source.REGISTRY)
            self.pool = ResolvedPool(self.cluster, resolver, open_endpoint, configured)

    def for_child(self) -> Assembly:
        """A copy with new connections for a forked child, which takes over the multicallables' methods."""
        child = Assembly(*self._arguments)
        for method in list(self._methods.values()):
            method.policy = child._policy(method.kind, method.path)
        child._methods = self._methods
        return child

    @property
    def config(self) -> ServiceConfig:
        """The current service config."""
        return self._configs.current

    def run(self) -> Coroutine[Any, Any, None]:
        """The channel's one task, until it is cancelled. Reads the config file first, so that the first call has it."""
        if self._config_file is None:
            return self.pool.run()
        self._read(self._config_file)
        return self._run(self._config_file)

    async def _run(self, config_file: ConfigFile) -> None:
        reading = asyncio.create_task(
            keep_running(
                "reading the config file",
                functools.partial(self._watch_config_file, config_file),
                where=self.cluster.name,
            )
        )
        try:
            await self.pool.run()
        finally:
            reading.cancel()
            await asyncio.wait([reading])

    async def _watch_config_file(self, config_file: ConfigFile) -> None:
        while True:
            await asyncio.sleep(FILE_POLL_PERIOD)
            self._read(config_file)

    def _read(self, config_file: ConfigFile) -> None:
        try:
            text = config_file.poll()
        except ValueError as error:
            self._configs.reject(Source.FILE, str(error))
        else:
            if text is not None:
                self._apply_config(Source.FILE, text)

    def _apply_config(self, source: Source, text: str) -> None:
        """Apply a config from the next call on, if ``text`` changes it. Calls in flight keep theirs."""
        with self._lock:
            changed = self._configs.update(source, text)
            first = self._config_pending and (changed or source is Source.REGISTRY)
            if not (changed or first):
                return
            self._config_pending = False
            for method in list(self._methods.values()):
                method.policy = self._policy(method.kind, method.path)
        # This wakes up calls that wait for their policy, or else the endpoints that follow do.
        if changed:
            self.pool.reconfigure(self.config)

    def _policy(self, kind: str, path: str) -> MethodPolicy:
        if self._config_pending:
            return PENDING
        policy = self.config.method(path, idempotency_of(path))
        if not self._retries:
            return replace(policy, retry=NEVER_RETRY, hedge=NEVER_HEDGE)
        if policy.retry is None:
            return policy
        if kind.endswith("stream"):  # once responses have begun, a stream may last longer
            return replace(policy, receive_timeout=policy.retry.receive_timeout)
        return replace(policy, attempt_timeout=min(policy.attempt_timeout, policy.retry.receive_timeout))

    def method(self, kind: str, path: str, serializer: Any, deserializer: Any, registered: bool) -> Method:
        """The method of a multicallable; shared by all multicallables that are alike."""
        path = checked_text("method", path)
        key = (kind, path, serializer, deserializer, registered)
        with self._lock:
            found = self._methods.get(key)
            if found is None:
                found = Method(kind, path, serializer, deserializer, registered, self._policy(kind, path))
                self._methods[key] = found
            return found

    def call(
        self,
        method: Method,
        now: float,
        timeout: float | None,
        metadata: Sequence[Metadatum] | None,
        wait_for_ready: bool | None,
    ) -> CallSpec:
        """A new call, with what it inherits from the inbound call that is being handled."""
        if metadata and type(metadata) is not tuple:
            metadata = tuple(metadata)  # it is read more than once, and may be an iterator
        policy = method.policy
        if policy is PENDING:
            return self._early_call(method, now, timeout, metadata, wait_for_ready)
        if wait_for_ready is None:
            wait_for_ready = bool(policy.wait_for_ready)
        scope = context.current()
        if scope is None:
            return CallSpec(method.path, policy, deadline_of(now, timeout, None, policy), metadata, wait_for_ready)
        deadline = deadline_of(now, timeout, scope.deadline, policy)
        return CallSpec(
            method.path, policy, deadline, _with_criticality(metadata, scope), wait_for_ready, not scope.is_retry
        )

    def _early_call(
        self,
        method: Method,
        now: float,
        timeout: float | None,
        metadata: Sequence[Metadatum] | None,
        wait_for_ready: bool | None,
    ) -> EarlyCall:
        """A call made before the first resolution."""
        scope = context.current()
        inherited = None if scope is None else scope.deadline

        def apply_policy(call: EarlyCall) -> None:
            policy = method.policy
            if policy is not PENDING:
                call.policy = policy
                call.deadline = deadline_of(now, timeout, inherited, policy)
                call.wait_for_ready = bool(policy.wait_for_ready if wait_for_ready is None else wait_for_ready)

        return EarlyCall(
            method.path,
            PENDING,
            deadline_of(now, timeout, inherited, PENDING),
            metadata if scope is None else _with_criticality(metadata, scope),
            bool(wait_for_ready),
            scope is None or not scope.is_retry,
            apply_policy=apply_policy,
        )

    def flow(self, call: CallSpec, now: float) -> Flow:
        """The flow of ``call``. Raises TypeError for metadata for which grpc raises it."""
        if call.metadata and not _sendable(call.metadata):
            return _invalid_metadata(call, now)
        if type(call) is EarlyCall:
            return early_flow(call, self.cluster, self.rng, now)
        return call_flow(call, self.cluster, self.rng, now)

    def note_failure(self, call: CallSpec, verdict: Verdict, scope: context.Scope | None) -> None:
        """A call made for ``scope`` has ended. If it failed although it was allowed to retry, the callers above should
        not retry."""
        retry = call.policy.retry
        if scope is not None and call.may_retry and retry is not None and retry.max_attempts > 1:
            scope.exhausted |= verdict.outcome.code in retry.retryable_codes

    def __repr__(self) -> str:
        return f"<Assembly {self.target} {self.cluster!r}>"


def _with_criticality(metadata: Sequence[Metadatum] | None, scope: context.Scope) -> Sequence[Metadatum] | None:
    """``metadata``, with the criticality of the inbound call unless it has its own."""
    if scope.criticality and not any(key == CRITICALITY for key, _ in metadata or ()):
        return (*(metadata or ()), (CRITICALITY, scope.criticality))
    return metadata


_KEY = re.compile(r"[0-9a-z_.-]+")
_VALUE = re.compile(r"[\x20-\x7e]*")


def _sendable(metadata: Sequence[tuple[Any, Any]]) -> bool:
    """Whether core would send ``metadata``; checked before waiting for an endpoint. Raises TypeError as grpc does."""
    for key, value in metadata:
        name = key.decode("latin-1") if isinstance(key, bytes) else key
        if not isinstance(name, str):
            raise TypeError(f"Expected str, not {type(name)}")
        binary = name.endswith("-bin")
        if binary and not isinstance(value, bytes):
            raise TypeError(f'Binary metadata key="{name}" expected bytes, got {type(value)}')
        text = value.decode("latin-1") if isinstance(value, bytes) else value or ""
        if not isinstance(text, str):
            raise TypeError(f"Expected str, not {type(value)}")
        if not _KEY.fullmatch(name) or not (binary or _VALUE.fullmatch(text)):
            return False
    return True


def _invalid_metadata(call: CallSpec, now: float) -> Flow:
    """The flow of a call whose metadata can't be sent, with core's status for it."""
    call.started = now
    yield from ()
    return Verdict(Outcome(Code.INTERNAL, "Invalid metadata"))


def idempotency_of(path: str) -> Idempotency:
    """The ``idempotency_level`` of ``/package.Service/Method``, if its descriptor is loaded in this process."""
    name = path.removeprefix("/").replace("/", ".")
    try:
        descriptor = descriptor_pool.Default().FindMethodByName(name)
    except KeyError:
        return Idempotency.UNKNOWN
    return Idempotency(descriptor.GetOptions().idempotency_level)


def _endpoint_config(health_service: str | None) -> str:
    if health_service is None:
        return "{}"  # pick_first: one connection for an address, also when it is a name with several
    # round_robin, because pick_first ignores health (docs/correctness.md, C1).
    return json.dumps(
        {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": health_service}}
    )


_AUTHORITY_OPTIONS = ("grpc.default_authority", "grpc.ssl_target_name_override")


def _authority(name: str | None, given: Mapping[str, Any]) -> dict[str, str]:
    """Options that use the service's name instead of the endpoints' addresses in TLS and in ``:authority``. As in gRPC,
    a name that the user gave applies to both: core derives each of the two options from the other if only one is
    set."""
    if name is None or not given.keys().isdisjoint(_AUTHORITY_OPTIONS):
        return {}
    return {"grpc.default_authority": name, "grpc.ssl_target_name_override": re.sub(r":\d+$", "", name)}
