"""A server whose handlers wait, and its client, as processes of their own.

``python waiting.py serve mesh|off|plain aio|sync [WORKERS]`` prints its port, and logs to stderr; off: without
overload protection. Method names tell what a handler does: ``Wait-SECONDS``; ``Spin-SECONDS`` computes;
``Slot-SECONDS`` waits so long in one of eight slots; ``Again-LEVELS`` calls its own server, so many levels deep;
``Fan-COUNT`` calls ``Again-1`` so many times at once; ``Via-PORT-PORT`` calls the server at the first port, which calls
the one at the second.

``python waiting.py call PORT METHOD AT_ONCE ROUNDS TIMEOUT`` prints how many calls ended with which status, and the
seconds that it took. ``python waiting.py offer PORT METHOD RATE SECONDS TIMEOUT`` does for calls that begin at a rate,
whatever becomes of them.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio

import mesh.server.aio
import mesh.server.sync
from mesh.policy.server.admission import Mode
from mesh.server.settings import ServerSettings

NAME = "test.Waiting"


def spin(seconds: float) -> None:
    """Compute for so many CPU seconds."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class Handlers(grpc.ServiceRpcHandler):
    """A handler for each method that somebody asks for, in one world."""

    def __init__(self, world: str) -> None:
        self._aio = world == "aio"
        self._make: Any = grpc.aio.insecure_channel if self._aio else grpc.insecure_channel
        self._channels: dict[int, Any] = {}
        self._port = 0
        self._slots: Any = asyncio.Semaphore(8) if self._aio else threading.Semaphore(8)
        self._known: dict[str, Any] = {}

    def listen(self, port: int) -> None:
        """The server listens there: its handlers call it."""
        self._port = port

    def service_name(self) -> str:
        return NAME

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method.rpartition("/")[2]
        if method not in self._known:
            what, _, value = method.partition("-")
            make = self._awaits if self._aio else self._blocks
            self._known[method] = grpc.unary_unary_rpc_method_handler(make(what, value))
        return self._known[method]

    def _callee(self, what: str, value: str) -> tuple[int, Any]:
        """How many calls a handler makes, and of what."""
        if what == "Via":
            port, _, rest = value.partition("-")
            return 1, self._method(int(port), f"Via-{rest}" if rest else "Wait-0.01")
        if what == "Fan":
            return int(value), self._method(self._port, "Again-1")
        return 1, self._method(self._port, f"Again-{int(value) - 1}" if value != "1" else "Wait-0.01")

    def _method(self, port: int, name: str) -> Any:
        if port not in self._channels:
            self._channels[port] = self._make(f"127.0.0.1:{port}")
        return self._channels[port].unary_unary(f"/{NAME}/{name}")

    def _awaits(self, what: str, value: str) -> Any:
        async def handle(request: bytes, context: Any) -> bytes:
            if what == "Wait":
                await asyncio.sleep(float(value))
            elif what == "Spin":
                spin(float(value))
            elif what == "Slot":
                async with self._slots:
                    await asyncio.sleep(float(value))
            else:
                count, method = self._callee(what, value)
                left = context.time_remaining()
                await asyncio.gather(*(method(request, timeout=left) for _ in range(count)))
            return request

        return handle

    def _blocks(self, what: str, value: str) -> Any:
        def handle(request: bytes, context: Any) -> bytes:
            if what == "Wait":
                threading.Event().wait(float(value))
            elif what == "Spin":
                spin(float(value))
            elif what == "Slot":
                with self._slots:
                    threading.Event().wait(float(value))
            else:
                self._callee(what, value)[1](request, timeout=context.time_remaining())
            return request

        return handle


async def serve_aio(kind: str) -> None:
    handlers = Handlers("aio")
    server: Any
    if kind == "plain":
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((handlers,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
    else:
        server = mesh.server.aio.Server(
            [(lambda _, to: to.add_generic_rpc_handlers((handlers,)), None)],
            ServerSettings(listen="127.0.0.1:0", overload=Mode.OFF if kind == "off" else Mode.ON),
        )
        await server.start()
        port = server.port
    handlers.listen(port)
    print(port, flush=True)
    await asyncio.Event().wait()


def serve_threads(kind: str, workers: int) -> None:
    handlers = Handlers("sync")
    server: Any
    if kind == "plain":
        server = grpc.server(ThreadPoolExecutor(workers))
        server.add_generic_rpc_handlers((handlers,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
    else:
        server = mesh.server.sync.Server(
            [(lambda _, to: to.add_generic_rpc_handlers((handlers,)), None)],
            ServerSettings(listen="127.0.0.1:0", max_workers=workers, overload=Mode.OFF if kind == "off" else Mode.ON),
        )
        server.start()
        port = server.port
    handlers.listen(port)
    print(port, flush=True)
    threading.Event().wait()


async def one(multicallable: Any, seconds: float, codes: Counter[str]) -> None:
    try:
        await multicallable(b"x", timeout=seconds)
    except grpc.aio.AioRpcError as error:
        codes[error.code().name] += 1
    else:
        codes["OK"] += 1


async def offer(port: int, method: str, rate: int, duration: int, seconds: float) -> None:
    codes: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, asyncio.TaskGroup() as group:
        multicallable: Any = channel.unary_unary(f"/{NAME}/{method}")
        await channel.channel_ready()
        begun, count = time.monotonic(), 0
        while (elapsed := time.monotonic() - begun) < duration:
            while count < elapsed * rate:
                group.create_task(one(multicallable, seconds, codes))
                count += 1
            await asyncio.sleep(0.002)
    print(*(f"{code}={count}" for code, count in sorted(codes.items())), f"in {time.monotonic() - begun:.2f} s")


async def call(port: int, method: str, at_once: int, rounds: int, seconds: float) -> None:
    codes: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        multicallable: Any = channel.unary_unary(f"/{NAME}/{method}")
        await channel.channel_ready()

        async def caller() -> None:
            for _ in range(rounds):
                await one(multicallable, seconds, codes)

        begun = time.monotonic()
        await asyncio.gather(*(caller() for _ in range(at_once)))
    print(*(f"{code}={count}" for code, count in sorted(codes.items())), f"in {time.monotonic() - begun:.2f} s")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    if sys.argv[1] in ("call", "offer"):
        run = call if sys.argv[1] == "call" else offer
        asyncio.run(run(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6])))
    elif sys.argv[3] == "aio":
        asyncio.run(serve_aio(sys.argv[2]))
    else:
        serve_threads(sys.argv[2], int(sys.argv[4]))
