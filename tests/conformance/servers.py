"""Servers that do as a script says, attempt by attempt, and remember what reached them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
CASE = "x-case"  # the metadata key that says whose script an attempt follows
PREVIOUS_ATTEMPTS = "grpc-previous-rpc-attempts"
PUSHBACK = "grpc-retry-pushback-ms"
THREADS = 16  # of each server

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Do:
    """What a server does with one attempt: read ``reads`` requests (None: all), send its headers if it has ``initial``
    metadata, then ``messages``, wait for ``delay`` seconds, and end. ``messages`` None: one after the delay, where all
    is well."""

    code: str = "OK"
    delay: float = 0.0
    pushback: str | None = None
    initial: Metadata | None = None
    messages: int | None = None
    trailers: Metadata = ()
    reads: int | None = None


@dataclass
class Attempt:
    """One attempt, as a server saw it. ``remaining``: seconds left for it, when it arrived."""

    server: int
    arrived: float
    previous: list[str]
    remaining: float
    requests: int = 0
    cancelled: bool = False


@dataclass
class Script:
    """What the servers do with the attempts of one call, in the order they arrive in; the last step is repeated."""

    steps: Sequence[Do]
    seen: list[Attempt] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def arrive(self, seen: Attempt) -> Do:
        with self.lock:
            self.seen.append(seen)
            return self.steps[min(len(self.seen), len(self.steps)) - 1]


class Servers:
    """Two servers that share their scripts."""

    def __init__(self) -> None:
        self._scripts: dict[str, Script] = {}
        self._numbers = itertools.count()
        self._pools = [_started_pool() for _ in range(2)]
        self._servers = [
            grpc.server(pool, handlers=[_Handlers(number, self._scripts)]) for number, pool in enumerate(self._pools)
        ]
        self.addresses = [f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}" for server in self._servers]
        for server in self._servers:
            server.start()

    def follow(self, steps: Sequence[Do]) -> tuple[Script, Metadata]:
        """A script for one call, and the metadata that the call is to bring."""
        name = str(next(self._numbers))
        script = self._scripts[name] = Script(steps)
        return script, ((CASE, name),)

    def stop(self) -> None:
        for stopped in [server.stop(None) for server in self._servers]:
            stopped.wait()
        for pool in self._pools:
            pool.shutdown()


def _started_pool() -> ThreadPoolExecutor:
    """A pool whose threads are all there: none begins, and so seems left behind, during a test."""
    pool = ThreadPoolExecutor(THREADS)
    met = threading.Barrier(THREADS)
    for waiting in [pool.submit(met.wait) for _ in range(THREADS)]:
        waiting.result()
    return pool


class _Handlers(grpc.GenericRpcHandler):
    """All kinds of call, named after the kind; bytes in, bytes out."""

    def __init__(self, server: int, scripts: dict[str, Script]) -> None:
        self._server = server
        self._scripts = scripts
        self._methods = {path(kind): self._method(kind) for kind in KINDS}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._methods.get(handler_call_details.method)

    def _method(self, kind: str) -> Any:
        def stream(request: Any, context: Any) -> Iterator[bytes]:
            return self._perform(request if kind.startswith("stream") else (request,), context)

        def unary(request: Any, context: Any) -> bytes:
            return b"".join(stream(request, context))

        behavior: Callable[..., Any] = stream if kind.endswith("stream") else unary
        return getattr(grpc, f"{kind}_rpc_method_handler")(behavior)

    def _perform(self, requests: Iterable[bytes], context: Any) -> Iterator[bytes]:
        metadata = context.invocation_metadata()
        previous = [value for key, value in metadata if key == PREVIOUS_ATTEMPTS]
        seen = Attempt(self._server, time.monotonic(), previous, context.time_remaining())
        do = self._scripts[dict(metadata)[CASE]].arrive(seen)
        over = threading.Event()
        if not context.add_callback(over.set):
            over.set()
        for _ in itertools.islice(requests, do.reads):
            seen.requests += 1
        if do.initial is not None:
            context.send_initial_metadata(do.initial)
        well = do.code == "OK"
        for _ in range(do.messages or 0):
            yield b"message"
        seen.cancelled = over.wait(do.delay) if do.delay else False
        if well and do.messages is None:
            yield b"message"
        context.set_trailing_metadata((*do.trailers, *(((PUSHBACK, do.pushback),) if do.pushback is not None else ())))
        if not well and not seen.cancelled:
            context.abort(getattr(grpc.StatusCode, do.code), "as the script says")


def path(kind: str) -> str:
    """The method of a kind of call."""
    return f"/test.Conformance/{kind}"
