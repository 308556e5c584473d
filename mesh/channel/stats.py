"""``channel.stats()``: a snapshot of what a channel knows."""

from __future__ import annotations

import time

import grpc

from mesh.channel.assemble import Assembly
from mesh.channel.pool import Pool
from mesh.channel.subchannel import Subchannel
from mesh.model import Connectivity
from mesh.observe import ChannelStats, EndpointStats


def channel_stats(assembly: Assembly, state: grpc.ChannelConnectivity) -> ChannelStats:
    """A snapshot of ``assembly``'s state. Safe from any thread; each part is consistent in itself."""
    cluster = assembly.cluster
    pool = assembly.pool
    endpoints = () if pool.closed else tuple(_endpoint(pool, each) for each in pool.subchannels())
    return ChannelStats(
        target=assembly.target,
        state=state.name,
        error="" if endpoints else cluster.error or cluster.picker.error,
        endpoints=endpoints,
        panic=cluster.panic,
        ejections=dict(cluster.ejections.counts),
        refusals=dict(cluster.admission.counts),
        outstanding=len(cluster.admission.outstanding),
        retry_budget=cluster.budget.balance(time.monotonic()),
    )


def _endpoint(pool: Pool, subchannel: Subchannel) -> EndpointStats:
    cluster, address = pool.cluster, subchannel.address
    node = cluster.nodes.get(address)  # None: it was removed meanwhile
    # What picks go by, which is core's state as of the last tick; core alone knows the state of what it connects
    # itself.
    state = subchannel.state() if pool.connected_by_core else cluster.states.get(address, Connectivity.IDLE)
    return EndpointStats(
        address=address,
        state=state.name,
        cause=cluster.causes.get(address, "") if state == Connectivity.TRANSIENT_FAILURE else "",
        ejected=cluster.ejections.reasons.get(address, ""),
        in_flight=node.in_flight if node else 0,
        latency=node.latency(time.monotonic()) if node else 0.0,
        weight=node.weight if node else 0.0,
    )
