"""The cost of serving, and servers under more load than they can handle: ``python -m benchmarks.server``, or
``make bench-server``.

Servers are separate processes; costs are their CPU seconds, over all threads. Sides that are compared run interleaved.
``--only NAME`` runs one part: cost, overload, rolling, watchers, leases.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

import mesh.aio
import mesh.server.sync
from mesh.policy.server.admission import Mode
from mesh.server.aio import Server
from mesh.server.settings import ServerSettings
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

NAME = "bench.Work"
REQUEST = b"x" * 64
SLOTS, SERVICE_TIME = 8, 0.05
"""A worker's capacity: so many concurrent calls, each taking so many seconds."""

CPU_TIME = 0.01
"""CPU seconds of a call to a CPU-bound handler."""

DEADLINE = 0.5

ONSET = 2.0
"""Seconds that the server takes to detect an overload (decision 0017)."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. ``target``: None: for comparison only."""

    what: str
    measured: float
    target: float | None = None
    unit: str = ""
    at_least: bool = False

    def __str__(self) -> str:
        measured = f"{self.measured:.3g}{self.unit}"
        if self.target is None:
            return f"{self.what:<86} {measured:>10} {'':>10}  for comparison"
        met = self.measured >= self.target if self.at_least else self.measured <= self.target
        target = f"{'≥' if self.at_least else '≤'} {self.target:g}{self.unit}"
        return f"{self.what:<86} {measured:>10} {target:>10}  {'met' if met else 'NOT met'}"


# -- servers ----------------------------------------------------------------------------------------------------------


def add(behavior: Callable[..., Any]) -> Callable[[Any, Any], None]:
    """Adds a servicer with five methods as generated code does: by name and generically."""

    def add_to_server(_: Any, server: Any) -> None:
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(behavior) for name in ("Do", "Get", "List", "Make", "Drop")
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
        server.add_registered_method_handlers(NAME, handlers)

    return add_to_server


async def serve(kind: str) -> None:
    """Print the port and serve as ``kind`` of server."""
    slots = asyncio.Semaphore(SLOTS)

    async def echo(request: bytes, _: Any) -> bytes:
        return request

    async def work(request: bytes, _: Any) -> bytes:
        async with slots:
            await asyncio.sleep(SERVICE_TIME)
        return request

    async def compute(request: bytes, _: Any) -> bytes:
        return spin(request)

    if kind == "replica":
        sys.exit(await mesh.aio.serve([(add(echo), None)]))
    if kind == "bare":
        server = grpc.aio.server()
        add(echo)(None, server)
        print(server.add_insecure_port("127.0.0.1:0"), flush=True)
        await server.start()
        await server.wait_for_termination()
        return
    kind, _, mode = kind.partition("-")
    settings = ServerSettings(listen="127.0.0.1:0", overload=Mode.OFF if mode else Mode.ON)
    behavior = {"mesh": echo, "work": work, "compute": compute}[kind]
    served = Server([(add(behavior), None)], settings)
    await served.start()
    print(served.port, flush=True)
    await served.wait()


def spin(request: bytes) -> bytes:
    """Compute for ``CPU_TIME``."""
    end = time.thread_time() + CPU_TIME
    while time.thread_time() < end:
        pass
    return request


def serve_with_threads(kind: str) -> None:
    """Print the port and serve as ``kind`` of threaded server."""
    slots = threading.Semaphore(SLOTS)

    def work(request: bytes, _: Any) -> bytes:
        with slots:
            time.sleep(SERVICE_TIME)
        return request

    kind, _, mode = kind.removeprefix("threads-").partition("-")
    settings = ServerSettings(listen="127.0.0.1:0", overload=Mode.OFF if mode else Mode.ON)
    behavior = work if kind == "work" else lambda request, _: spin(request)
    served = mesh.server.sync.Server([(add(behavior), None)], settings)
    served.start()
    print(served.port, flush=True)
    served.wait()


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a Python process, and kill it at the end."""
    started = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@contextlib.contextmanager
def serving(kind: str) -> Iterator[tuple[int, int]]:
    """Run a server process; yields its pid and port."""
    with process("-m", "benchmarks.server", "--serve", kind) as started:
        assert started.stdout is not None
        yield started.pid, int(started.stdout.readline())


@contextlib.contextmanager
def registry() -> Iterator[tuple[int, str]]:
    """Run a registry process; yields its pid and address."""
    with process("-m", "mesh.registry", "--listen", "127.0.0.1:0") as started:
        assert started.stdout is not None
        for line in started.stdout:
            if "serving on" in line:
                yield started.pid, line.split()[-1]
                return


def cpu(pid: int) -> float:
    """CPU seconds of a process so far."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


# -- loads ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Result:
    """The results of a load."""

    codes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.codes.total()

    @property
    def success(self) -> float:
        return self.codes["OK"] / self.total

    def quantile(self, share: float) -> float:
        return sorted(self.seconds)[int(share * len(self.seconds))] if self.seconds else float("inf")


async def offer(call: Callable[[], Awaitable[Any]], rate: float, seconds: float) -> Result:
    """Start ``rate`` calls per second, whether or not earlier ones have ended (open loop)."""
    result = Result()

    async def one() -> None:
        begun = time.monotonic()
        try:
            await call()
        except grpc.RpcError as error:
            result.codes[error.code().name] += 1
        else:
            result.codes["OK"] += 1
            result.seconds.append(time.monotonic() - begun)

    tasks: set[asyncio.Task[None]] = set()
    start, begun = time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < seconds:
        for _ in range(int(elapsed * rate) - begun):
            tasks.add(task := asyncio.create_task(one()))
            task.add_done_callback(tasks.discard)
            begun += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    return result


async def saturate(call: Callable[[], Awaitable[Any]], times: int, concurrency: int) -> float:
    """Make calls, ``concurrency`` at a time (closed loop); returns calls per second."""
    left = iter(range(times))

    async def loop() -> None:
        for _ in left:
            await call()

    begun = time.monotonic()
    await asyncio.gather(*(loop() for _ in range(concurrency)))
    return times / (time.monotonic() - begun)


# -- the parts --------------------------------------------------------------------------------------------------------


async def cost() -> list[Row]:
    """The CPU of a served method compared with a bare server's."""
    times, rounds = 400, 40
    with serving("bare") as bare, serving("mesh") as served:
        ratios, spent = [], []
        async with contextlib.AsyncExitStack() as stack:
            sides = []
            for pid, port in (bare, served):
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
                method: Any = channel.unary_unary(f"/{NAME}/Do")
                sides.append((pid, method))
            for turn in range(rounds + 2):
                cpus = [0.0, 0.0]
                for side in (0, 1) if turn % 2 else (1, 0):
                    pid, method = sides[side]
                    before = cpu(pid)
                    await saturate(functools.partial(method, REQUEST, timeout=5), times, 4)
                    cpus[side] = (cpu(pid) - before) / times
                if turn >= 2:  # warmed up
                    ratios.append(cpus[1] / cpus[0])
                    spent.append(cpus[0])
    return [
        Row(
            "CPU per call of a served method, everything on, relative to a bare grpc.aio.server",
            statistics.median(ratios),
            1.08,
        ),
        Row("  the bare server's", statistics.median(spent) * 1e6, unit=" µs"),
    ]


async def overload() -> list[Row]:
    """Twice the capacity, with and without overload protection."""
    seconds = 20.0
    rows = []
    kinds = {
        "work": "asyncio, bound by a downstream",
        "compute": "asyncio, bound by CPU",
        "threads-work": "threads, bound by a downstream",
        "threads-compute": "threads, bound by CPU",
    }
    limited: dict[str, Overload] = {}
    for kind, what in kinds.items():
        with serving(kind) as (_, port):
            limited[kind] = await overloaded(port, seconds)
        with serving(kind + "-off") as (_, port):
            unlimited = await overloaded(port, 5.0)
        rows += [
            Row(
                f"twice the capacity, {what}: goodput relative to capacity", limited[kind].goodput, 0.95, at_least=True
            ),
            Row("  the same without overload protection", unlimited.goodput),
        ]
    with serving("work-off") as (_, port):
        unlimited = await overloaded(port, 10.0)
    critical, sheddable = limited["work"].critical, limited["work"].sheddable
    return [
        *rows,
        Row("the first of these: successful CRITICAL calls after the first 2 s", critical.success, 0.99, at_least=True),
        Row("  in the first 2 s, before the method is limited", limited["work"].onset.success),
        Row("  after the first 2 s, without the limit", unlimited.critical.success),
        Row("  successful SHEDDABLE calls, with the limit", sheddable.success),
        Row("  p99 of successful CRITICAL calls, with the limit", critical.quantile(0.99) * 1e3, unit=" ms"),
        Row("recovery after the overload, to 1.5 times the normal p99", limited["work"].recovery, 2.0, " s"),
        Row("  the same without the limit", unlimited.recovery, unit=" s"),
    ]


@dataclass(frozen=True, slots=True)
class Overload:
    """The results of an overload. ``onset``: CRITICAL calls of the first 2 s; ``critical``, ``sheddable``: later ones.
    ``goodput``: relative to the capacity, from the beginning. ``recovery``: in seconds."""

    onset: Result
    critical: Result
    sheddable: Result
    goodput: float
    recovery: float


async def overloaded(port: int, seconds: float) -> Overload:
    """Offer a server 0.5 times its capacity in CRITICAL calls, and 1.5 times in SHEDDABLE ones."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method: Any = channel.unary_unary(f"/{NAME}/Do")

        def calls(criticality: str) -> Callable[[], Awaitable[Any]]:
            metadata = (("weft-criticality", criticality),)
            return lambda: method(REQUEST, timeout=DEADLINE, metadata=metadata)

        capacity = await saturate(lambda: method(REQUEST), 500, SLOTS)
        normal = await offer(calls("CRITICAL"), capacity / 4, 4)

        async def both(seconds: float) -> tuple[Result, Result]:
            critical = offer(calls("CRITICAL"), capacity / 2, seconds)
            return await asyncio.gather(critical, offer(calls("SHEDDABLE"), capacity * 1.5, seconds))

        beginning = asyncio.create_task(both(ONSET))
        await asyncio.sleep(ONSET)
        critical, sheddable = await both(seconds - ONSET)
        began = await beginning
        goodput = sum(result.codes["OK"] for result in (*began, critical, sheddable)) / seconds / capacity
        recovered = await recovery(method, capacity / 4, normal.quantile(0.99))
        return Overload(began[0], critical, sheddable, goodput, recovered)


async def recovery(method: Any, rate: float, normal: float) -> float:
    """Seconds until the calls of a quarter of a second are as fast as normal."""
    begun = time.monotonic()
    while time.monotonic() - begun < 10:
        now = await offer(lambda: method(REQUEST, timeout=DEADLINE), rate, 0.25)
        if now.codes["OK"] == now.total and now.quantile(0.99) <= 1.5 * normal:
            break
    return time.monotonic() - begun


async def rolling() -> list[Row]:
    """Replace each of three replicas under load."""
    with registry() as (_, address), contextlib.ExitStack() as stack:

        def replica() -> subprocess.Popen[str]:
            environment = {"MESH_LISTEN": "127.0.0.1:0", "MESH_REGISTRY": address}
            return stack.enter_context(process("-m", "benchmarks.server", "--serve", "replica", **environment))

        replicas = [replica() for _ in range(3)]
        async with mesh.aio.insecure_channel(f"mesh://{address}/{NAME}") as channel:
            method: Any = channel.unary_unary(f"/{NAME}/Do")
            await wait_registered(address, 3)
            await method(REQUEST, timeout=20, wait_for_ready=True)
            load = asyncio.create_task(offer(lambda: method(REQUEST, timeout=5), 200, 15))
            for old in replicas:
                replica()
                await wait_registered(address, 4)
                old.send_signal(signal.SIGTERM)
                while old.poll() is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                await wait_registered(address, 3)
            result = await load
    return [
        Row(
            f"rolling restart of 3 replicas at 200 calls/s: failed of {result.total}",
            result.total - result.codes["OK"],
            0,
        )
    ]


async def wait_registered(address: str, count: int) -> None:
    """Wait until the registry lists so many instances."""
    async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(30):
        stub: Any = pb_grpc.RegistryStub(channel)
        while len((await stub.ListInstances(pb.ListInstancesRequest(service=NAME))).instances) != count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def instance(number: int) -> pb.Instance:
    """One of 10,000 instances: ten in each of 1,000 services."""
    return pb.Instance(
        id=f"i{number}", service=f"bench.S{number // 10}", address=f"10.0.{number // 250}.{number % 250}:1"
    )


async def registered(stub: Any) -> list[str]:
    """Register all 10,000; returns their leases."""
    leases: list[str] = []

    async def share(numbers: range) -> None:
        for number in numbers:
            request = pb.RegisterRequest(instance=instance(number))
            request.ttl.seconds = 60
            leases.append((await stub.Register(request)).lease_id)

    await asyncio.gather(*(share(range(start, 10_000, 16)) for start in range(16)))
    return leases


async def watchers() -> list[Row]:
    """How long a change takes to reach 1,000 watchers: of 1,000 services, and all of one service."""
    with registry() as (pid, address):
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = pb_grpc.RegistryStub(channel)
            await registered(stub)
            received_at: dict[str, list[float]] = {"all": [], "each": []}
            arrived = asyncio.Semaphore(0)

            async def watch(service: str, kind: str) -> None:
                stream = stub.Watch(pb.WatchRequest(service=service))
                await stream.read()
                arrived.release()
                while (await stream.read()) is not grpc.aio.EOF:
                    received_at[kind].append(time.monotonic())
                    arrived.release()

            spent = 0.0
            delays: list[float] = []
            for kind, services in (("each", [f"bench.S{n}" for n in range(1000)]), ("all", ["bench.S0"] * 1000)):
                tasks = [asyncio.create_task(watch(service, kind)) for service in services]
                for _ in tasks:
                    await arrived.acquire()
                for change in range(5):
                    changed = instance(0)
                    changed.weight = change + (1 if kind == "each" else 11)
                    before, begun = cpu(pid), time.monotonic()
                    await stub.Register(pb.RegisterRequest(instance=changed))
                    received_at[kind].clear()
                    for _ in range(1 if kind == "each" else 1000):
                        await arrived.acquire()
                    spent = cpu(pid) - before
                    delays += [at - begun for at in received_at[kind]] or [time.monotonic() - begun]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    return [
        Row(
            "registry, 1,000 services × 10, 1,000 watchers: one change to all its watchers, p99",
            sorted(delays)[int(0.99 * len(delays))],
            1.0,
            " s",
        ),
        Row("  the registry's CPU for a change with 1,000 watchers", spent * 1e3, unit=" ms"),
    ]


async def leases() -> list[Row]:
    """10,000 leases, each kept alive on its own stream, as by separate processes."""
    seconds = 10.0
    with registry() as (pid, address):
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = pb_grpc.RegistryStub(channel)
            held = await registered(stub)
            rng = random.Random(1)
            sent = 0

            async def keep(lease: str) -> None:
                nonlocal sent
                stream = stub.KeepAlive()
                await asyncio.sleep(rng.uniform(0, 10 / 3))
                while True:
                    await stream.write(pb.KeepAliveRequest(lease_ids=[lease]))
                    await stream.read()
                    sent += 1
                    await asyncio.sleep(10 / 3)

            tasks = [asyncio.create_task(keep(lease)) for lease in held]
            await asyncio.sleep(8)
            before, sent, begun = cpu(pid), 0, time.monotonic()
            await asyncio.sleep(seconds)
            elapsed = time.monotonic() - begun
            share, rate = (cpu(pid) - before) / elapsed, sent / elapsed
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return [
        # On one machine with the registry, this client may not keep up with all keep-alives.
        Row(
            "keep-alives of 10,000 leases at TTL 10 s, one stream each: cores, at 3,000 per second",
            share * 3000 / rate,
            0.4,
        ),
        Row("  measured at, per second", rate),
    ]


PARTS = {"cost": cost, "overload": overload, "rolling": rolling, "watchers": watchers, "leases": leases}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", default="")
    parser.add_argument("--only", choices=PARTS)
    arguments = parser.parse_args()
    if arguments.serve:
        if arguments.serve.startswith("threads-"):
            serve_with_threads(arguments.serve)
        else:
            asyncio.run(serve(arguments.serve))
        return
    print(f"\n{'what':<86} {'measured':>10} {'target':>10}")
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            for row in asyncio.run(part()):
                print(row, flush=True)


if __name__ == "__main__":
    main()
