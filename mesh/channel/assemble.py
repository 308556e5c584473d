"""Puts a channel together, the same for both worlds: the one place where order is imposed.

A call goes through, from the caller's side to the wire:

1. the deadline: above retries, because one deadline holds over all attempts;
2. hedges and retries: above the pick, because each attempt goes to another endpoint, and above the budget's count of
   calls, because what they add is measured against what was asked for;
3. the pick among READY endpoints: above the subchannel, because a subchannel is one address;
4. the subchannel's state, looked at just before sending: below the pick, so that an attempt that can't leave is
   picked again;
5. core's own channel, without retries of its own, or attempts would multiply.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf import descriptor_pool

from mesh import config, context
from mesh.channel.subchannels import ChannelOptions, Method, OwnPool, Pool, ResolvedPool, Subchannel
from mesh.discovery.target import resolver_for
from mesh.model import CallSpec, Endpoint, Idempotency, Metadatum, Verdict
from mesh.policy.cluster import Cluster
from mesh.policy.deadline import deadline_of

# A dead peer is noticed within 2.4 s: core needs all three. Servers of the mesh allow it; others may not, so it is for
# mesh:/// targets alone.
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
    """What stands behind a channel: its cluster and pool, and the policies of its methods.

    Made without IO, thread or loop. ``pool.run`` brings it to life.
    """

    def __init__(
        self,
        target: str,
        options: Sequence[tuple[str, Any]] | None,
        credentials: grpc.ChannelCredentials | None,
        compression: grpc.Compression | None,
        open_subchannel: OpenSubchannel,
    ) -> None:
        self.target = target
        self.secure = credentials is not None
        self.rng = random.Random()
        self._methods: dict[tuple[Any, ...], Method] = {}
        found, resolver = resolver_for(target)
        given = _checked(options or ())
        text = given.pop("grpc.service_config", None)
        self._retries = bool(given.pop("grpc.enable_retries", 1))
        self.config = config.parse(text, balanced_by_core=resolver is None) if text else config.ServiceConfig()
        health_service = found.health_service if self.config.health_service is None else self.config.health_service
        self.cluster = Cluster(target, self.config, self.rng, time.monotonic(), threading.Lock)
        self.pool: Pool
        if resolver is None:
            if text:
                given["grpc.service_config"] = config.for_core(text)
            subchannel = open_subchannel(target, tuple(given.items()), credentials, compression)
            self.pool = OwnPool(self.cluster, Endpoint(target), subchannel)
        else:
            keepalive = dict(KEEPALIVE) if found.scheme == "mesh" else {}
            arguments = {**keepalive, **_authority(found.authority), **given}
            arguments["grpc.service_config"] = _endpoint_config(health_service)
            core = tuple(arguments.items())
            self.pool = ResolvedPool(
                self.cluster, resolver, lambda address: open_subchannel(address, core, credentials, compression)
            )

    def method(self, kind: str, path: str, serializer: Any, deserializer: Any, registered: bool) -> Method:
        """The method of a multicallable; the same one for all that are alike."""
        key = (kind, path, serializer, deserializer, registered)
        found = self._methods.get(key)
        if found is None:
            policy = self.config.method(path, idempotency_of(path))
            if not self._retries:
                policy = replace(policy, retry=config.NEVER_RETRY, hedge=config.NEVER_HEDGE)
            found = Method(kind, path, serializer, deserializer, registered, policy)
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
        """A new call, with what it inherits from the inbound call being handled."""
        policy = method.policy
        if wait_for_ready is None:
            wait_for_ready = bool(policy.wait_for_ready)
        scope = context.current()
        if scope is None:
            return CallSpec(method.path, policy, deadline_of(now, timeout, None, policy), metadata, wait_for_ready)
        deadline = deadline_of(now, timeout, scope.deadline, policy)
        if scope.criticality and not any(key == context.CRITICALITY for key, _ in metadata or ()):
            metadata = (*(metadata or ()), (context.CRITICALITY, scope.criticality))
        return CallSpec(method.path, policy, deadline, metadata, wait_for_ready, not scope.is_retry)

    def failed(self, call: CallSpec, verdict: Verdict, scope: context.Scope | None) -> None:
        """A call made for ``scope`` is over. If it failed though it was allowed to retry, the callers above need not
        try again."""
        retry = call.policy.retry
        if scope is not None and call.may_retry and retry is not None and retry.max_attempts > 1:
            scope.exhausted |= verdict.outcome.code in retry.codes

    def __repr__(self) -> str:
        return f"<Assembly {self.target} {self.cluster!r}>"


def _checked(options: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The options by name. What core would refuse is refused here, because core sees it only when a call is made."""
    given = {}
    for name, value in options:
        if not isinstance(value, str | bytes) and not hasattr(value, "__int__"):
            raise TypeError(f"channel option {name!r}: expected a string, bytes or a number, got {value!r}")
        if isinstance(value, int) and not -(2**31) <= value < 2**31:
            raise OverflowError(f"channel option {name!r}: {value} is beyond 32 bits")
        given[name.decode() if isinstance(name, bytes) else name] = value
    return given


def idempotency_of(path: str) -> Idempotency:
    """What the descriptor of ``/package.Service/Method`` says, if one is loaded in this process."""
    name = path.removeprefix("/").replace("/", ".")
    try:
        descriptor = descriptor_pool.Default().FindMethodByName(name)
    except KeyError:
        return Idempotency.UNKNOWN
    return Idempotency(descriptor.GetOptions().idempotency_level)


def _endpoint_config(health_service: str | None) -> str:
    # round_robin, because pick_first ignores health (A17); over one address they pick alike.
    core: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if health_service is not None:
        core["healthCheckConfig"] = {"serviceName": health_service}
    return json.dumps(core)


def _authority(name: str | None) -> dict[str, str]:
    # The service's name and not the address: TLS then verifies the service.
    if name is None:
        return {}
    return {"grpc.default_authority": name, "grpc.ssl_target_name_override": re.sub(r":\d+$", "", name)}
