"""Balancing and outlier detection over a cluster of replicas: ``python -m benchmarks.cluster``, or ``make
bench-cluster``.

The mesh and gRPC core call the same replicas, concurrently or in turns, in one run. ``--quick`` runs for a shorter
time; ``--only NAME`` runs one part: decisions, slow, failing, halves, work, even, connections, memory, cost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

import mesh
import mesh.aio
from benchmarks.call import REQUEST, UNARY, calling, service_config
from benchmarks.harness import Row, interleaved, ratio, replicas, table
from benchmarks.replica import RETRY
from mesh.config.parse import parse
from mesh.config.settings import BalancerConfig, Idempotency, ServiceConfig
from mesh.discovery.probation import Probation
from mesh.discovery.registry import PROBATION
from mesh.discovery.roster import Roster
from mesh.model import CallSpec, Connectivity, Endpoint
from mesh.policy.cluster.cluster import Cluster
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

DO, COUNT = "/bench.Work/Do", "/bench.Work/Count"
TIMEOUT = 5.0
MANY, FEW = 10_000, 10

Options = list[tuple[str, Any]]

OUTLIERS = {
    "interval": "1s",
    "baseEjectionTime": "30s",
    "maxEjectionPercent": 50,
    "successRateEjection": {"minimumHosts": 3, "requestVolume": 10},
    "failurePercentageEjection": {"threshold": 30, "minimumHosts": 3, "requestVolume": 10},
}
REPORTS = {"blackoutPeriod": "1s", "weightUpdatePeriod": "0.1s"}


def balanced(policy: str, settings: object = None, **more: object) -> Options:
    """Channel options with a balancing policy and retries."""
    return service_config({"retryPolicy": RETRY}, loadBalancingConfig=[{policy: settings or {}}], **more)


@contextlib.contextmanager
def workers(*arguments: str) -> Iterator[list[list[int]]]:
    """Run a worker for each string of arguments; yields their ports."""
    with contextlib.ExitStack() as stack:
        started = []
        for each in arguments:
            command = [sys.executable, "-m", "benchmarks.worker", *each.split()]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            assert process.stdin is not None
            stack.callback(process.stdin.close)
            started.append(process)
        ports = []
        for process in started:
            assert process.stdout is not None
            ports.append([int(port) for port in process.stdout.readline().split()])
        yield ports


def addresses(ports: Sequence[Sequence[int]]) -> str:
    return ",".join(f"127.0.0.1:{port}" for each in ports for port in each)


@dataclass
class Sample:
    """The results of a load: when each call began (seconds into the run) and how long it took; the ports of all
    attempts, if known; and the codes of failed calls."""

    latencies: list[tuple[float, float]] = field(default_factory=list)
    attempts: list[tuple[float, int]] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)

    def p99(self, since: float = 0.0) -> float:
        return statistics.quantiles([latency for at, latency in self.latencies if at >= since], n=100)[98]


async def load(call: Any, rate: float, seconds: float, sample: Sample, seed: int, at: float = 0.0) -> None:
    """Call at random times, ``rate`` per second on average, whether or not earlier calls have ended (open loop)."""
    rng = random.Random(seed)
    begun = time.monotonic()

    async def one(offset: float) -> None:
        sent = time.monotonic()
        made = call(REQUEST, timeout=TIMEOUT)
        try:
            await made
        except grpc.aio.AioRpcError as error:
            sample.failures.append((at + offset, error.code().name))
        # Failed calls count, too.
        sample.latencies.append((at + offset, time.monotonic() - sent))
        if hasattr(made, "explain"):
            attempts = made.explain().attempts
            sample.attempts += [(at + offset, int(each.address.rpartition(":")[2])) for each in attempts]

    offset = 0.0
    async with asyncio.TaskGroup() as calls:
        while (offset := offset + rng.expovariate(rate)) < seconds:
            await asyncio.sleep(begun + offset - time.monotonic())
            calls.create_task(one(offset))


@contextlib.asynccontextmanager
async def both(ports: list[list[int]], through: Options, core: Options) -> AsyncIterator[dict[str, Any]]:
    """``Do`` through the mesh and through gRPC core, both connected to all replicas."""
    async with (
        mesh.aio.insecure_channel(f"static:///{addresses(ports)}", through) as a,
        grpc.aio.insecure_channel(f"ipv4:{addresses(ports)}", core) as b,
    ):
        calls: dict[str, Any] = {"mesh": a.unary_unary(DO), "core": b.unary_unary(DO)}
        for channel in (a, b):
            async with asyncio.timeout(30):
                await channel.channel_ready()
        yield calls


def side_by_side(ports: list[list[int]], through: Options, core: Options, rate: float, seconds: float) -> Any:
    """Run both sides concurrently, at ``rate`` each; returns their samples."""

    async def run() -> dict[str, Sample]:
        samples = {"mesh": Sample(), "core": Sample()}
        async with both(ports, through, core) as calls, asyncio.TaskGroup() as loads:
            for name, call in calls.items():
                loads.create_task(load(call, rate, seconds, samples[name], seed=1))
        return samples

    return asyncio.run(run())


# -- the parts


def ready_cluster(count: int, balancer: BalancerConfig) -> Cluster:
    cluster = Cluster("bench", ServiceConfig(balancer=balancer), random.Random(1), 0.0, threading.Lock)
    cluster.update(endpoints(count))
    cluster.update_states([(address, Connectivity.READY) for address in cluster.nodes])
    return cluster


def endpoints(count: int) -> list[Endpoint]:
    return [Endpoint(f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}:1") for index in range(count)]


def decisions(seconds: float) -> list[Row]:
    """The CPU of picks and endpoint updates with many endpoints, without IO."""
    return [*picks(5_000 if seconds < 1 else 20_000), *changes()]


def picks(times: int) -> list[Row]:
    call = CallSpec(DO, ServiceConfig().method(DO, Idempotency.UNKNOWN), 1e9, [("user", "u")])
    rng = random.Random(1)
    costs: dict[str, float] = {}
    for name in ("round_robin", "least_request", "peak_ewma", "ring_hash"):
        settings = {"requestHashHeader": "user"} if name == "ring_hash" else {}
        balancer = parse(json.dumps({"loadBalancingConfig": [{name: settings}]})).balancer
        assert balancer is not None
        pickers = {str(count): ready_cluster(count, replace(balancer, subset=0)).picker for count in (FEW, MANY)}

        def picking(picker: Any) -> Callable[[int], None]:
            def work(times: int) -> None:
                for index in range(times):
                    call.metadata = (("user", str(index)),)
                    picker.pick(call, index * 1e-4, rng, ())

            return work

        results = interleaved({count: picking(picker) for count, picker in pickers.items()}, times, rounds=9)
        costs[name] = ratio(results, str(MANY), str(FEW))
    ring = costs.pop("ring_hash")
    worst = max(costs, key=lambda name: costs[name])
    return [
        Row(f"a pick among {MANY:,} endpoints (worst: {worst})", f"among {FEW}", costs[worst], 1.5),
        Row("the same, ring_hash", f"among {FEW}", ring, 3.0),
    ]


def changes() -> list[Row]:
    """The CPU of one changed instance among many, from the registry's message to the new picker."""
    service = "bench.Work"
    step = pb.WatchResponse(epoch="e", revision=1)
    for endpoint in endpoints(MANY):
        step.snapshot.instances.add(id=endpoint.address, service=service, address=endpoint.address)
    rows = []
    for subset, what in ((100, "100 of them in use"), (0, "all in use")):
        roster, probation = Roster(service), Probation(PROBATION)
        cluster = Cluster(
            "bench", ServiceConfig(balancer=BalancerConfig(subset=subset)), random.Random(1), 0.0, threading.Lock
        )

        def take(step: pb.WatchResponse, now: float) -> float:
            begun = time.thread_time()
            roster.apply(step, now)  # noqa: B023
            cluster.update(probation.apply(roster.endpoints(), now))  # noqa: B023
            return time.thread_time() - begun

        take(step, 0.0)
        cluster.update_states([(address, Connectivity.READY) for address in cluster.nodes])
        took = []
        for index in range(1, 21):
            change = pb.WatchResponse(epoch="e", revision=1 + index)
            address = f"10.9.9.{index}:1"
            change.delta.upserted.add(id=address, service=service, address=address)
            change.delta.removed_ids.append(f"10.0.0.{index}:1")
            took.append(take(change, index * 10.0))
        label = f"CPU of one endpoint changed among {MANY:,}, {what}"
        rows.append(Row(label, "—", 1000 * statistics.median(took), 20.0, " ms"))
    return rows


def slow(seconds: float) -> list[Row]:
    """One of three replicas is 100 ms slow, yet SERVING."""
    with workers("", "", "--delay 0.1") as ports:
        samples = side_by_side(
            ports, service_config({"retryPolicy": RETRY}), balanced("round_robin"), rate=150, seconds=8 * seconds
        )
    ours, core = samples["mesh"].p99(), samples["core"].p99()
    return [
        Row(
            f"p99, one of 3 replicas 100 ms slow ({1000 * ours:.1f} ms)",
            f"core round_robin ({1000 * core:.1f} ms)",
            ours / core,
            0.20,
        )
    ]


def failing(seconds: float) -> list[Row]:
    """One of three replicas fails all its calls immediately."""
    with workers("", "", "--fail 1") as ports:
        samples = side_by_side(
            ports, service_config({"retryPolicy": RETRY}), balanced("round_robin"), rate=150, seconds=1 + 6 * seconds
        )
    ours: Sample = samples["mesh"]
    late = [port for at, port in ours.attempts if at >= 1.0]
    return [
        Row(
            "attempts to a replica that fails immediately, after 1 s",
            "core round_robin: 0.33",
            Counter(late)[ports[2][0]] / len(late),
            0.02,
        ),
        Row("failed calls", "—", len(ours.failures), 0.0),
    ]


def halves(seconds: float) -> list[Row]:
    """One of five replicas fails half its calls. Both sides use round_robin: peak_ewma would call it too rarely to
    eject it."""
    with workers("", "", "", "", "--fail 0.5") as ports:
        bad = ports[4][0]

        async def run() -> tuple[dict[str, Sample], float]:
            samples = {"mesh": Sample(), "core": Sample()}
            outliers = {**OUTLIERS, "childPolicy": [{"round_robin": {}}]}
            options = balanced("outlier_detection_experimental", outliers)
            through: Any = mesh.aio.insecure_channel(f"static:///{addresses(ports)}", options)
            ejected = float("inf")
            async with through, grpc.aio.insecure_channel(f"ipv4:{addresses(ports)}", options) as core:
                for channel in (through, core):
                    await channel.channel_ready()
                begun = time.monotonic()

                async def watch() -> None:
                    nonlocal ejected
                    out = through.assembly.cluster.ejections.ejected
                    while f"127.0.0.1:{bad}" not in out and time.monotonic() - begun < 15 * seconds:
                        await asyncio.sleep(0.01)
                        out = through.assembly.cluster.ejections.ejected
                    if f"127.0.0.1:{bad}" in out:
                        ejected = time.monotonic() - begun

                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(watch())
                    for name, channel in (("mesh", through), ("core", core)):
                        tasks.create_task(load(channel.unary_unary(DO), 100, 15 * seconds, samples[name], seed=1))
            return samples, ejected

        samples, ejected = asyncio.run(run())
    errors = {name: 100 * len(sample.failures) / len(sample.latencies) for name, sample in samples.items()}
    return [
        Row(
            "failed calls, one of 5 replicas failing half its calls",
            f"core outlier_detection: {errors['core']:.2f} %",
            errors["mesh"],
            0.1,
            " %",
        ),
        Row("time until that replica is ejected", "—", ejected, 10.0, " s"),
    ]


WORK, SHARE, SLOWER, FAST = 0.003, 0.1, 5, 4


def work(seconds: float) -> list[Row]:
    """CPU-bound replicas, each on a tenth of a core and one of them 5 times slower, at 70 % of their total capacity.
    The sides take turns, so that each has all of it."""
    fast = f"--work {WORK} --share {SHARE}"
    capacity = SHARE / WORK * (FAST + 1 / SLOWER)
    sides = {
        "mesh": (mesh.aio.insecure_channel, "static:///", service_config({"retryPolicy": RETRY})),
        "round_robin": (grpc.aio.insecure_channel, "ipv4:", balanced("round_robin")),
        "weighted_round_robin": (grpc.aio.insecure_channel, "ipv4:", balanced("weighted_round_robin", REPORTS)),
    }
    samples = {name: Sample() for name in sides}
    turn, settle = 5 * seconds, 1.5 * seconds

    async def run(ports: list[list[int]]) -> None:
        async with contextlib.AsyncExitStack() as stack:
            calls: dict[str, Any] = {}
            for name, (make, scheme, options) in sides.items():
                channel: Any = await stack.enter_async_context(make(scheme + addresses(ports), options))
                await channel.channel_ready()
                calls[name] = channel.unary_unary(DO)
            for round_ in range(4):
                for name, call in calls.items():
                    sample = Sample()
                    await load(call, 0.7 * capacity, turn, sample, seed=round_)
                    if round_:  # the first is for warming up
                        samples[name].latencies += [each for each in sample.latencies if each[0] >= settle]
                        samples[name].failures += sample.failures

    with workers(*[fast] * FAST, f"--work {WORK * SLOWER} --share {SHARE}") as ports:
        asyncio.run(run(ports))
    p99 = {name: sample.p99() for name, sample in samples.items()}
    better = min(("round_robin", "weighted_round_robin"), key=lambda name: p99[name])
    return [
        Row(
            f"p99, CPU work, one of 5 replicas 5 × slower ({1000 * p99['mesh']:.0f} ms)",
            f"core {other} ({1000 * p99[other]:.0f} ms)",
            p99["mesh"] / p99[other],
            0.5,
        )
        for other in (better, *(name for name in p99 if name not in (better, "mesh")))
    ]


def even(seconds: float) -> list[Row]:
    """How evenly calls are spread over equal replicas."""
    times = 10_000 if seconds >= 1 else 3_000
    with (
        workers("", "", "") as ports,
        mesh.insecure_channel(f"static:///{addresses(ports)}") as channel,
    ):
        call: Any = channel.unary_unary(DO)
        shares = Counter(call(REQUEST, timeout=TIMEOUT) for _ in range(times))
    largest = max(shares.values()) / (times / len(ports))
    return [Row(f"largest over mean share, equal replicas, {times:,} calls", "—", largest, 1.05)]


def connections(_: float) -> list[Row]:
    """Threads and connections of a sync channel with 100 endpoints."""
    with workers("--ports 100") as ports:
        before = set(threading.enumerate())
        with mesh.insecure_channel(f"static:///{addresses(ports)}") as channel:
            call: Any = channel.unary_unary(DO)
            call(REQUEST, timeout=TIMEOUT)
            made = settled(lambda: established(ports[0]), 100)
            for _ in range(200):
                call(REQUEST, timeout=TIMEOUT)
            # The background loop's thread may exist from earlier parts.
            threads = {thread for thread in threading.enumerate() if thread not in before or "mesh" in thread.name}
    return [
        Row("threads with 100 endpoints, sync", "grpc's own", len(threads), 1),
        Row(f"connections with 100 endpoints, sync ({made}): off by", "—", abs(made - 100), 0),
    ]


def settled(measure: Callable[[], int], least: int) -> int:
    """The measured value once it is at least ``least``, or after 10 s."""
    end = time.monotonic() + 10
    while (found := measure()) < least and time.monotonic() < end:
        time.sleep(0.05)
    return found


def established(ports: Sequence[int]) -> int:
    """TCP connections of this machine to these ports."""
    wanted = set(ports)
    lines = [line for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    found = [line.split() for line in lines]
    return sum(line[3] == "01" and int(line[2].rpartition(":")[2], 16) in wanted for line in found)


def memory(seconds: float) -> list[Row]:
    """Growth of memory over endpoint updates from a registry, during calls."""
    times = 1_000 if seconds >= 1 else 300
    service = "bench.Work"
    with workers("", "") as ports, registry() as at, grpc.insecure_channel(at) as plain:
        stub = pb_grpc.RegistryStub(plain)

        def register(port: int, **labels: str) -> str:
            instance = pb.Instance(id=str(port), service=service, address=f"127.0.0.1:{port}", metadata=labels)
            request = pb.RegisterRequest(instance=instance, ttl=Duration(seconds=300))
            return stub.Register(request, timeout=TIMEOUT).lease_id

        for (port,) in ports:
            register(port)
        with mesh.insecure_channel(f"mesh://{at}/{service}") as channel:
            call: Any = channel.unary_unary(DO)

            def update(count: int) -> None:
                for turn in range(count):
                    # Labels change, and unreachable instances come and go.
                    register(ports[0][0], turn=str(turn))
                    lease_id = register(10 + turn % 50)
                    call(REQUEST, timeout=TIMEOUT)
                    stub.Deregister(pb.DeregisterRequest(lease_id=lease_id), timeout=TIMEOUT)

            update(times // 2)
            before = resident()
            update(times)
            grown = resident() - before
    return [Row(f"growth of memory over {3 * times:,} endpoint updates", "—", grown / 2**20, 2.0, " MiB")]


@contextlib.contextmanager
def registry() -> Iterator[str]:
    """Run a registry; yields its address."""
    command = [sys.executable, "-m", "mesh.registry", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield "127.0.0.1:" + process.stdout.readline().rpartition(":")[2].strip()
        finally:
            process.terminate()
            process.stdout.read()


def resident() -> int:
    """The resident set of this process, in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def everything() -> Options:
    """Channel options with every policy enabled."""
    return service_config(
        {"retryPolicy": RETRY, "timeout": "10s"},
        loadBalancingConfig=[
            {"outlier_detection": {**OUTLIERS, "childPolicy": [{"peak_ewma": {"loadReports": REPORTS}}]}}
        ],
        retryThrottling={"maxTokens": 100, "tokenRatio": 0.1},
        slowStart={"window": "10s"},
        zoneAwareness={},
        overload={"maxOutstanding": 1024, "adaptiveThrottle": {}},
    )


def cost(seconds: float) -> list[Row]:
    """The CPU of a call with every policy enabled."""
    times, rounds = (100, 5) if seconds < 1 else (400, 12)
    core_options = balanced("round_robin")
    with replicas(3) as ports:
        at = addresses([ports])
        with (
            mesh.insecure_channel(f"static:///{at}", everything()) as a,
            grpc.insecure_channel(f"ipv4:{at}", core_options) as b,
        ):
            sides = {"mesh": calling(a.unary_unary(UNARY)), "core": calling(b.unary_unary(UNARY))}
            sync = interleaved(sides, times, rounds)

        async def measure() -> dict[str, list[float]]:
            async with (
                mesh.aio.insecure_channel(f"static:///{at}", everything()) as a,
                grpc.aio.insecure_channel(f"ipv4:{at}", core_options) as b,
            ):
                calls: dict[str, Any] = {"mesh": a.unary_unary(UNARY), "core": b.unary_unary(UNARY)}
                results: dict[str, list[float]] = {name: [] for name in calls}
                for turn in range(rounds + 1):
                    for name, call in calls.items():
                        begun = time.process_time()
                        for _ in range(times):
                            await call(REQUEST, timeout=TIMEOUT)
                        if turn:  # the first is for warming up
                            results[name].append((time.process_time() - begun) / times)
                return results

        aio = asyncio.run(measure())
    against = "core round_robin + retryPolicy"
    return [
        Row("CPU of a unary call with every policy on, sync", against, ratio(sync, "mesh", "core"), 1.05),
        Row("the same, aio", against, ratio(aio, "mesh", "core"), 1.10),
    ]


PARTS: dict[str, Callable[[float], list[Row]]] = {
    part.__name__: part for part in (decisions, slow, failing, halves, work, even, connections, memory, cost)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a shorter run")
    parser.add_argument("--only", choices=PARTS, help="one part")
    arguments = parser.parse_args()
    seconds = 0.4 if arguments.quick else 1.0
    rows: list[Row] = []
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            print(name, file=sys.stderr, flush=True)
            rows += part(seconds)
    table("A cluster through the mesh", rows)


if __name__ == "__main__":
    main()
