"""``channel.stats()``: a snapshot of what a channel knows."""

from __future__ import annotations

import time
from types import MappingProxyType

import grpc

from mesh.channel.assemble import Assembly
from mesh.channel.subchannel import Subchannel
from mesh.observe import ChannelStats, EndpointStats
from mesh.policy.cluster.cluster import Cluster


def channel_stats(assembly: Assembly, state: grpc.ChannelConnectivity) -> ChannelStats:
    """A snapshot of ``assembly``'s state. Safe from any thread; each part is consistent in itself."""
    cluster = assembly.cluster
    endpoints = tuple(_endpoint(each, cluster) for each in assembly.pool.subchannels())
    return ChannelStats(
        target=assembly.target,
        state=state.name,
        error="" if endpoints else cluster.error or cluster.picker.error,
        endpoints=endpoints,
        panic=cluster.panic,
        ejections=MappingProxyType(dict(cluster.ejections.counts)),
        refusals=MappingProxyType(dict(cluster.admission.counts)),
        outstanding=len(cluster.admission.outstanding),
        retry_budget=cluster.budget.balance(time.monotonic()),
    )


def _endpoint(subchannel: Subchannel, cluster: Cluster) -> EndpointStats:
    address = subchannel.address
    node = cluster.nodes.get(address)  # None: it was removed meanwhile
    return EndpointStats(
        address=address,
        state=subchannel.state().name,
        cause=cluster.causes.get(address, ""),
        ejected=cluster.ejections.reasons.get(address, ""),
        in_flight=node.in_flight if node else 0,
        latency=node.latency(time.monotonic()) if node else 0.0,
        weight=node.weight if node else 0.0,
    )
