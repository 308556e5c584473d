"""A program that makes, uses and drops everything the mesh has, round after round, and says after each what is left.

``python -m tests.soak SECONDS COUNT``: prints one JSON object a round, of COUNT calls of each kind for each channel.
A registry, an asyncio server, a threaded server and both kinds of client are in the one process, so that whatever leaks
is seen. Run by ``tests/faults/test_soak.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

import mesh
import mesh.aio
from mesh.server import aio as aio_server
from mesh.server import sync as sync_server
from mesh.server.settings import ServerSettings
from tests.registry.serving import Serving, serving
from weft.mesh.v1 import registry_pb2 as pb

SERVICE = "soak.Soak"
UNARY, RESPONSES, REQUESTS, BOTH = (f"/{SERVICE}/{name}" for name in ("Unary", "Responses", "Requests", "Both"))
TIMEOUT = 20.0
METHODS = 1000
"""Methods whose handlers a server keeps."""

CONFIGS: tuple[dict[str, Any], ...] = (
    {"methodConfig": [{"name": [{}], "retryPolicy": {
        "maxAttempts": 3, "initialBackoff": "0.001s", "maxBackoff": "0.001s", "backoffMultiplier": 1,
        "retryableStatusCodes": ["ABORTED"]}}]},
    {"methodConfig": [{"name": [{}], "hedgingPolicy": {
        "maxAttempts": 2, "hedgingDelay": "0.001s", "nonFatalStatusCodes": ["ABORTED"]}}]},
    {"loadBalancingConfig": [{"round_robin": {}}]},
)  # fmt: skip
WAITING = [("grpc.service_config", json.dumps(CONFIGS[1]))]


# -- the servers


async def unary(request: bytes, context: Any) -> bytes:
    if request == b"abort":
        await context.abort(grpc.StatusCode.ABORTED, "as told")
    if request == b"slow":
        await asyncio.sleep(TIMEOUT)
    return request


async def responses(request: bytes, context: Any) -> AsyncIterator[bytes]:
    for _ in range(3):
        yield request
    if request == b"slow":
        await asyncio.sleep(TIMEOUT)


async def requests(stream: AsyncIterator[bytes], context: Any) -> bytes:
    return b"%d" % len([request async for request in stream])


async def both(stream: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for request in stream:
        yield request


def sync_unary(request: bytes, context: Any) -> bytes:
    if request == b"abort":
        context.abort(grpc.StatusCode.ABORTED, "as told")
    if request == b"slow":
        over = threading.Event()
        if context.add_callback(over.set):
            over.wait(TIMEOUT)
    return request


def sync_responses(request: bytes, context: Any) -> Iterator[bytes]:
    for _ in range(3):
        yield request


def sync_requests(stream: Iterator[bytes], context: Any) -> bytes:
    return b"%d" % len(list(stream))


def sync_both(stream: Iterator[bytes], context: Any) -> Iterator[bytes]:
    yield from stream


class Anything(grpc.GenericRpcHandler):
    """Takes calls of whatever method is asked for, as a proxy does."""

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method.startswith("/any."):
            return grpc.unary_unary_rpc_method_handler(sync_unary)
        return None


def add(*behaviors: Any) -> Callable[[Any, Any], None]:
    def add_to_server(_: object, server: Any) -> None:
        handlers: dict[str, Any] = {
            "Unary": grpc.unary_unary_rpc_method_handler(behaviors[0]),
            "Responses": grpc.unary_stream_rpc_method_handler(behaviors[1]),
            "Requests": grpc.stream_unary_rpc_method_handler(behaviors[2]),
            "Both": grpc.stream_stream_rpc_method_handler(behaviors[3]),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers), Anything()))
        server.add_registered_method_handlers(SERVICE, handlers)

    return add_to_server


# -- the clients


class Soak:
    """The rounds."""

    def __init__(self, registry: Serving, servers: tuple[str, str], count: int) -> None:
        self._registry = registry
        self._servers = servers
        self._count = count  # of calls of each kind, for each channel
        self._targets = [f"static:///{','.join(servers)}", servers[0]]
        self._number = 0
        self._lasting_sync: Any = mesh.insecure_channel(f"mesh://{registry.address}/{SERVICE}")
        self._lasting_aio: Any = mesh.aio.insecure_channel(f"mesh://{registry.address}/{SERVICE}")

    def _next(self) -> int:
        self._number += 1
        return self._number

    async def fill(self) -> None:
        """Have each server keep as many handlers as it ever does."""
        for server in self._servers:
            async with grpc.aio.insecure_channel(server) as channel:
                for number in range(METHODS):
                    call: Any = channel.unary_unary(f"/any.First{number}/Method")
                    assert await call(b"ok", timeout=TIMEOUT) == b"ok"

    async def round(self) -> None:
        await self._configs()
        states: list[object] = []
        self._lasting_sync.subscribe(states.append)
        self._lasting_sync.unsubscribe(states.append)
        await self._services()
        await self._aio_calls(self._lasting_aio)
        await asyncio.to_thread(self._sync_calls, self._lasting_sync)
        for target in self._targets:
            for options in ((), WAITING):
                channel: Any = mesh.aio.insecure_channel(target, options=options)
                await self._aio_calls(channel)
                await channel.close()
                await asyncio.to_thread(self._sync_channel, target, options)
            # Dropped, and never closed; once with a call that nobody waited for.
            channel = mesh.aio.insecure_channel(target)
            await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT)
            channel.unary_unary(UNARY)(b"slow", timeout=TIMEOUT)
            del channel
            await asyncio.to_thread(self._dropped, target)

    def _sync_channel(self, target: str, options: Any) -> None:
        with mesh.insecure_channel(target, options=options) as channel:
            self._sync_calls(channel)

    def _dropped(self, target: str) -> None:
        channel: Any = mesh.insecure_channel(target)
        channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT)
        channel.unary_unary(UNARY).future(b"slow", timeout=TIMEOUT)

    async def _configs(self) -> None:
        """The registry's config of a service that is used, and of one that never was."""
        for config in (*CONFIGS, None):
            await self._configure(SERVICE, config)
            name = f"soak.Config{self._next()}"
            await self._configure(name, config)
            await self._configure(name, None)

    async def _configure(self, service: str, config: Any) -> None:
        text = json.dumps(config) if config else ""
        request = pb.SetServiceConfigRequest(service=service, service_config=text)
        await self._registry.stub.SetServiceConfig(request, timeout=TIMEOUT)

    async def _services(self) -> None:
        """Services come and go, with a channel each that finds them, and instances that come and go beside it."""
        address = self._servers[0]
        for _ in range(3):
            name = f"soak.Service{self._next()}"
            await self._configure(name, {"healthCheckConfig": {"serviceName": ""}})
            leases = []
            for place in range(3):
                instance = pb.Instance(id=f"i{place}", service=name, address=address if not place else "127.0.0.1:1")
                request = pb.RegisterRequest(instance=instance, ttl=Duration(seconds=60))
                leases.append((await self._registry.stub.Register(request, timeout=TIMEOUT)).lease_id)
            channel: Any = mesh.aio.insecure_channel(f"mesh://{self._registry.address}/{name}")
            await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT, wait_for_ready=True)
            for lease in leases:
                await self._registry.stub.Deregister(pb.DeregisterRequest(lease_id=lease), timeout=TIMEOUT)
            await channel.close()
            await self._configure(name, None)

    async def _aio_calls(self, channel: Any) -> None:
        for _ in range(self._count):
            tag = self._next()
            stub = channel.unary_unary(UNARY, lambda message: message, lambda message: message)
            assert await stub(b"ok", timeout=TIMEOUT, wait_for_ready=True) == b"ok"
            assert await channel.unary_unary(f"/any.Any{tag}/Method")(b"ok", timeout=TIMEOUT) == b"ok"
            with contextlib.suppress(grpc.RpcError):
                await stub(b"abort", timeout=TIMEOUT)
            with contextlib.suppress(grpc.RpcError):
                await stub(b"slow", timeout=0.002)
            cancelled = stub(b"slow", timeout=TIMEOUT)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(_quietly(cancelled))), 0.001)
            cancelled.cancel()
            assert [each async for each in channel.unary_stream(RESPONSES)(b"ok", timeout=TIMEOUT)] == [b"ok"] * 3
            early = channel.unary_stream(RESPONSES)(b"slow", timeout=TIMEOUT)
            assert await early.read() == b"slow"
            early.cancel()
            assert await channel.stream_unary(REQUESTS)(iter([b"1", b"2"]), timeout=TIMEOUT) == b"2"
        stream = channel.stream_stream(BOTH)(timeout=TIMEOUT)
        for _ in range(self._count):
            await stream.write(b"ok")
            assert await stream.read() == b"ok"
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF

    def _sync_calls(self, channel: Any) -> None:
        for _ in range(self._count):
            tag = self._next()
            stub = channel.unary_unary(UNARY, lambda message: message, lambda message: message)
            assert stub(b"ok", timeout=TIMEOUT, wait_for_ready=True) == b"ok"
            assert stub.with_call(b"ok", timeout=TIMEOUT)[0] == b"ok"
            assert stub.future(b"ok", timeout=TIMEOUT).result() == b"ok"
            assert channel.unary_unary(f"/any.Any{tag}/Method")(b"ok", timeout=TIMEOUT) == b"ok"
            with contextlib.suppress(grpc.RpcError):
                stub(b"abort", timeout=TIMEOUT)
            with contextlib.suppress(grpc.RpcError):
                stub(b"slow", timeout=0.002)
            stub.future(b"slow", timeout=TIMEOUT).cancel()
            assert list(channel.unary_stream(RESPONSES)(b"ok", timeout=TIMEOUT)) == [b"ok"] * 3
            early = channel.unary_stream(RESPONSES)(b"ok", timeout=TIMEOUT)
            assert next(early) == b"ok"
            early.cancel()
            assert channel.stream_unary(REQUESTS)(iter([b"1", b"2"]), timeout=TIMEOUT) == b"2"
            assert list(channel.stream_stream(BOTH)(iter([b"1", b"2"]), timeout=TIMEOUT)) == [b"1", b"2"]

    async def close(self) -> None:
        await self._lasting_aio.close()
        self._lasting_sync.close()


async def _quietly(call: Any) -> None:
    with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
        await call


# -- what is left


def measure() -> dict[str, Any]:
    """What there is now: descriptors, threads, tasks, timers, the mesh's objects by class, and memory in MB."""
    loop: Any = asyncio.get_running_loop()
    gc.collect()
    kinds = Counter(type(each).__qualname__ for each in gc.get_objects() if _of_interest(type(each).__module__))
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
        "timers": sum(not timer.cancelled() for timer in loop._scheduled),
        "objects": dict(kinds),
        "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6,
    }


def _of_interest(module: object) -> bool:
    return isinstance(module, str) and module.startswith(
        ("mesh.", "grpc", "weft.", "_asyncio", "asyncio", "concurrent")
    )


def total(measured: dict[str, Any]) -> int:
    """All that is counted, in one number."""
    counts = (measured[name] for name in ("descriptors", "threads", "tasks", "timers"))
    return int(sum(counts) + sum(measured["objects"].values()))


async def settled() -> dict[str, Any]:
    """What is left once nothing more goes: what ends in the background has a moment for it."""
    measured = measure()
    still = 0
    end = time.monotonic() + 10
    while still < 5 and time.monotonic() < end:
        await asyncio.sleep(0.1)
        again = measure()
        still = still + 1 if total(again) >= total(measured) else 0
        measured = min(measured, again, key=total)
    return measured


async def main(seconds: float, count: int) -> None:
    end = time.monotonic() + seconds
    settings: dict[str, Any] = {"listen": "127.0.0.1:0", "drain_wait": 0.0}
    async with serving(log_size=64) as registry:
        pairs: Any = [(add(unary, responses, requests, both), None)]
        sync_pairs: Any = [(add(sync_unary, sync_responses, sync_requests, sync_both), None)]
        async with aio_server.Server(pairs, ServerSettings(registry=registry.address, **settings)) as first:
            second = sync_server.Server(sync_pairs, ServerSettings(registry=registry.address, **settings))
            second.start()
            servers = f"127.0.0.1:{first.port}", f"127.0.0.1:{second.port}"
            soak = Soak(registry, servers, count)
            await soak.fill()
            rounds = 0
            while rounds < 5 or time.monotonic() < end:
                await soak.round()
                rounds += 1
                print(json.dumps(await settled()), flush=True)
            await soak.close()
            # Not drained: everything was measured, and grpcio-health-checking can deadlock a threaded server's drain
            # when a watcher leaves at the same moment.
            os._exit(0)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # the calls that fail on purpose
    asyncio.run(main(float(sys.argv[1]), int(sys.argv[2])))
