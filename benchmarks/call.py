"""The cost of a call through the mesh: ``python -m benchmarks.call``, or ``make bench-call``.

All sides run interleaved, in one process, with the same replicas. Costs are CPU seconds of this process; ratios are
medians of the rounds. ``--quick`` runs fewer rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import math
import random
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
import grpc.aio

import mesh
import mesh.aio
from benchmarks.harness import Row, Work, cpu_seconds, interleaved, ratio, replicas, table
from benchmarks.replica import RETRY, retrying
from mesh.config.settings import Idempotency, ServiceConfig
from mesh.model import CallSpec, Connectivity, Ended, Endpoint, Outcome
from mesh.policy.call.flow import call_flow
from mesh.policy.cluster.cluster import Cluster

UNARY, STREAM, FAIL = "/bench.Echo/Unary", "/bench.Echo/Stream", "/bench.Echo/Fail"
THROUGH, FAILED = "/bench.Echo/Through", "/bench.Echo/Failed"
REQUEST = b"x" * 64


def service_config(method: Mapping[str, object], **more: object) -> list[tuple[str, str]]:
    """Channel options with a service config for all methods."""
    return [("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], **method}], **more}))]


def core_config() -> list[tuple[str, str]]:
    """gRPC core configured to do the same: round_robin with retries."""
    return service_config({"retryPolicy": RETRY}, loadBalancingConfig=[{"round_robin": {}}])


def calling(call: Callable[..., Any], timeout: float | None = 5.0) -> Work:
    """Make calls one after another."""

    def work(times: int) -> None:
        for _ in range(times):
            call(REQUEST, timeout=timeout)

    return work


def in_threads(call: Callable[..., Any], count: int) -> Work:
    """Make calls in ``count`` threads."""

    def work(times: int) -> None:
        share = calling(call)
        threads = [threading.Thread(target=share, args=(times // count,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return work


def sync_unary(ports: list[int], times: int, rounds: int) -> tuple[list[Row], float]:
    """Blocking unary calls, in one thread and in eight; also returns the cost of a call on a bare channel."""
    addresses = [f"127.0.0.1:{port}" for port in ports]
    options = service_config({"retryPolicy": RETRY})
    with (
        mesh.insecure_channel("static:///" + ",".join(addresses), options) as through,
        grpc.insecure_channel("ipv4:" + ",".join(addresses), core_config()) as core,
        grpc.insecure_channel(addresses[0]) as bare,
        grpc.insecure_channel(addresses[1]) as second,
        grpc.insecure_channel(addresses[2]) as third,
    ):
        sides = {"mesh": through, "core": core, "bare": bare}
        unary: dict[str, Any] = {name: channel.unary_unary(UNARY) for name, channel in sides.items()}
        turns: Iterator[Any] = itertools.cycle(channel.unary_unary(UNARY) for channel in (bare, second, third))
        unary["three bare"] = lambda request, timeout: next(turns)(request, timeout=timeout)
        one = interleaved({name: calling(call) for name, call in unary.items()}, times, rounds)
        eight = interleaved({name: in_threads(unary[name], 8) for name in ("mesh", "bare")}, times, rounds)
    contention = {name: statistics.median(eight[name]) / statistics.median(one[name]) for name in ("mesh", "bare")}
    return [
        Row(
            "CPU of a unary call, 3 endpoints, sync", "core round_robin + retryPolicy", ratio(one, "mesh", "core"), 1.0
        ),
        Row("the same, sync", "one bare channel", ratio(one, "mesh", "bare"), 1.08),
        Row("three bare channels in rotation, sync", "one bare channel", ratio(one, "three bare", "bare"), math.inf),
        Row(
            "the same, 8 threads over 1", "the bare channel's own ratio", contention["mesh"] / contention["bare"], 1.10
        ),
    ], statistics.median(one["bare"])


def aio_unary(ports: list[int], times: int, rounds: int) -> list[Row]:
    """asyncio unary calls, one after another."""
    addresses = [f"127.0.0.1:{port}" for port in ports]

    async def measure() -> dict[str, list[float]]:
        async with (
            mesh.aio.insecure_channel("static:///" + ",".join(addresses), service_config({"retryPolicy": RETRY})) as a,
            grpc.aio.insecure_channel("ipv4:" + ",".join(addresses), core_config()) as b,
            grpc.aio.insecure_channel(addresses[0]) as c,
        ):
            calls: dict[str, Any] = {
                "mesh": a.unary_unary(UNARY),
                "core": b.unary_unary(UNARY),
                "bare": c.unary_unary(UNARY),
            }

            async def work(call: Any, times: int) -> float:
                begun = time.process_time()
                for _ in range(times):
                    await call(REQUEST, timeout=5.0)
                return (time.process_time() - begun) / times

            results: dict[str, list[float]] = {name: [] for name in calls}
            for call in calls.values():
                await work(call, times // 4)
            for _ in range(rounds):
                for name, call in calls.items():
                    results[name].append(await work(call, times))
            return results

    results = asyncio.run(measure())
    return [
        Row(
            "CPU of a unary call, 3 endpoints, aio",
            "core round_robin + retryPolicy",
            ratio(results, "mesh", "core"),
            1.05,
        ),
        Row("the same, aio", "one bare channel", ratio(results, "mesh", "bare"), 1.08),
    ]


def streams(ports: list[int], times: int, rounds: int) -> list[Row]:
    """Server streams of 1,000 messages, sync and aio."""
    count = b"1000"
    with (
        mesh.insecure_channel(f"static:///127.0.0.1:{ports[0]}") as through,
        grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as bare,
    ):

        def reading(call: Callable[..., Any]) -> Work:
            def work(times: int) -> None:
                for _ in range(times):
                    for _message in call(count):
                        pass

            return work

        sides = {"mesh": reading(through.unary_stream(STREAM)), "bare": reading(bare.unary_stream(STREAM))}
        results = interleaved(sides, times, rounds)

    async def measure() -> dict[str, list[float]]:
        async with (
            mesh.aio.insecure_channel(f"static:///127.0.0.1:{ports[0]}") as a,
            grpc.aio.insecure_channel(f"127.0.0.1:{ports[0]}") as b,
        ):
            both: dict[str, list[float]] = {"mesh": [], "bare": []}
            calls: dict[str, Any] = {"mesh": a.unary_stream(STREAM), "bare": b.unary_stream(STREAM)}
            for _ in range(rounds):
                for name, call in calls.items():
                    begun = time.process_time()
                    for _ in range(times):
                        async for _message in call(count):
                            pass
                    both[name].append(time.process_time() - begun)
            return both

    return [
        Row("CPU of a streamed message, 1,000 a call, sync", "bare channel", ratio(results, "mesh", "bare"), 1.03),
        Row("the same, aio", "bare channel", ratio(asyncio.run(measure()), "mesh", "bare"), 1.03),
    ]


def hedged(ports: list[int], times: int, rounds: int) -> list[Row]:
    """A blocking call with hedging whose first attempt responds in time."""
    policy = {"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "1s", "nonFatalStatusCodes": ["UNAVAILABLE"]}}
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    with (
        mesh.insecure_channel(f"static:///{addresses}", service_config(policy)) as through,
        grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as bare,
    ):
        future: Any = bare.unary_unary(UNARY).future

        def by_future(times: int) -> None:
            for _ in range(times):
                future(REQUEST, timeout=5.0).result()

        sides = {"mesh": calling(through.unary_unary(UNARY)), "bare": by_future}
        results = interleaved(sides, times, rounds)
    return [
        Row(
            "CPU of a hedged sync call, first attempt responds",
            ".future() of a bare channel",
            ratio(results, "mesh", "bare"),
            1.15,
        )
    ]


def flow_alone(bare: float) -> list[Row]:
    """The decisions of a call that succeeds on its first attempt, without any IO."""
    rng = random.Random(1)
    cluster = Cluster("bench", ServiceConfig(), rng, 0.0, threading.Lock)
    cluster.update([Endpoint(f"127.0.0.1:{port}") for port in range(1, 4)])
    cluster.update_states([(address, Connectivity.READY) for address in cluster.nodes])
    policy = ServiceConfig().method(UNARY, Idempotency.IDEMPOTENT)
    answered = Outcome(0)

    def work(times: int) -> None:
        for index in range(times):
            now = index * 0.001
            flow = call_flow(CallSpec(UNARY, policy, now + 5), cluster, rng, now)
            step: Any = next(flow)
            with contextlib.suppress(StopIteration):
                flow.send(Ended(now + 0.0005, step.number, answered))

    work(2000)
    cost = statistics.median(cpu_seconds(work, 20_000) for _ in range(5))
    return [Row(f"call_flow alone ({cost * 1e6:.1f} µs)", "CPU of a bare sync call", 100 * cost / bare, 2.0, " %")]


def attempts_made(call: Callable[..., Any], ports: list[int], seconds: float) -> tuple[float, float]:
    """Attempts per call that the failing replicas received, and calls per second, once the retry budget is used up."""
    channels = [grpc.insecure_channel(f"127.0.0.1:{port}") for port in ports]
    failed: list[Any] = [channel.unary_unary(FAILED) for channel in channels]
    begun = time.monotonic()
    made = [0] * 8

    def load(share: int) -> None:
        for index in range(int(seconds * 1000 / 8)):
            delay = begun + (index * 8 + share) / 1000 - time.monotonic()
            if delay > 0:
                time.sleep(delay)
            with contextlib.suppress(grpc.RpcError):
                call(REQUEST, timeout=5.0)
            made[share] += 1

    threads = [threading.Thread(target=load, args=(share,)) for share in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 3)
    calls, attempts, at = sum(made), sum(int(count(b"")) for count in failed), time.monotonic()
    for thread in threads:
        thread.join()
    calls, attempts = sum(made) - calls, sum(int(count(b"")) for count in failed) - attempts - len(failed)
    for channel in channels:
        channel.close()
    return attempts / calls, calls / (time.monotonic() - at)


def failing(ports: list[int], seconds: float) -> list[Row]:
    """Attempts per call while every replica fails: direct, and through an intermediate service that retries, too."""
    leaves = "static:///" + ",".join(f"127.0.0.1:{port}" for port in ports)
    with mesh.insecure_channel(leaves, retrying()) as one:
        alone, rate = attempts_made(one.unary_unary(FAIL), ports, seconds)
    with replicas(2, "--through", leaves) as intermediate:
        middle = "static:///" + ",".join(f"127.0.0.1:{port}" for port in intermediate)
        with mesh.insecure_channel(middle, retrying()) as two:
            layered, layered_rate = attempts_made(two.unary_unary(THROUGH), ports, seconds)
    return [
        Row(f"attempts per call, every replica failing, {rate:.0f} calls/s", "-", alone, 1.15),
        Row(f"the same through an intermediate service, {layered_rate:.0f} calls/s", "-", layered, 1.21),
    ]


def pausing(seconds: float, rate: int = 100) -> list[Row]:
    """p99 with one of three replicas freezing for 300 ms every 3 s, with and without hedging, side by side.

    Calls start on schedule, whether or not earlier ones have finished (open loop), and are timed from the schedule.
    """
    hedge = {"maxAttempts": 2, "hedgingDelay": "0.03s"}
    round_robin: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    with replicas(2) as steady, replicas(1, "--pause", "0.3", "--every", "3") as unsteady:
        target = "static:///" + ",".join(f"127.0.0.1:{port}" for port in steady + unsteady)
        with (
            mesh.insecure_channel(target, service_config({"hedgingPolicy": hedge}, **round_robin)) as hedging,
            mesh.insecure_channel(target, service_config({}, **round_robin)) as waiting,
        ):
            methods: dict[str, Any] = {"on": hedging.unary_unary(UNARY), "off": waiting.unary_unary(UNARY)}
            latencies: dict[str, list[float]] = {"on": [], "off": []}
            calls: list[Any] = []
            begun = time.monotonic()
            for index in range(int(seconds * rate)):
                due = begun + index / rate
                time.sleep(max(0.0, due - time.monotonic()))
                for name, method in methods.items():
                    call = method.future(REQUEST, timeout=5.0)
                    call.add_done_callback(lambda _, due=due, name=name: latencies[name].append(time.monotonic() - due))
                    if name == "on":
                        calls.append(call)
            attempts = [call.result() and len(call.explain().attempts) for call in calls]
    p99 = {name: statistics.quantiles(values, n=100)[98] for name, values in latencies.items()}
    more = 100 * (sum(attempts) / len(attempts) - 1)
    return [
        Row(
            f"p99, one of 3 replicas pausing, hedged ({p99['on'] * 1000:.0f} ms)",
            f"not hedged ({p99['off'] * 1000:.0f} ms)",
            p99["on"] / p99["off"],
            0.30,
        ),
        Row("additional attempts, hedged", "-", more, 5.0, " %"),
    ]


def memory(ports: list[int], times: int) -> list[Row]:
    """Growth of the resident set over many calls."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    with mesh.insecure_channel(f"static:///{addresses}") as channel:
        work = calling(channel.unary_unary(UNARY))
        work(times // 10)
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work(times)
        gc.collect()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return [Row(f"growth of memory over {times:,} calls", "-", grown, 2.0, " MiB")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    quick = parser.parse_args().quick
    times, rounds = (100, 5) if quick else (400, 16)
    with replicas(3) as ports:
        rows, bare = sync_unary(ports, times, rounds)
        rows += aio_unary(ports, times, rounds)
        rows += streams(ports, 2, rounds)
        rows += hedged(ports, times, rounds)
        rows += flow_alone(bare)
        rows += failing(ports, 3 if quick else 9)
        rows += memory(ports, 2_000 if quick else 100_000)
    rows += pausing(6 if quick else 18)
    table(f"A call through the mesh (a bare sync call costs {bare * 1e6:.0f} µs of CPU here)", rows)


if __name__ == "__main__":
    main()
