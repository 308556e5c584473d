"""A replica to measure with: ``python -m benchmarks.replica`` prints its port and serves until its stdin closes.

Methods of ``bench.Echo``: ``Unary`` echoes; ``Stream`` sends as many messages as the request says; ``Fail`` fails with
UNAVAILABLE, and ``Failed`` returns how many times it did; ``Through`` calls ``Fail`` at ``--through TARGET`` with
retries, as an intermediate service. ``--pause SECONDS --every SECONDS`` freezes the process periodically.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc

import mesh
from mesh.server.handlers.interceptors import ServerInterceptor

MESSAGE = b"x" * 64


RETRY = {
    "maxAttempts": 3,
    "initialBackoff": "0.025s",
    "maxBackoff": "0.25s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


def retrying() -> list[tuple[str, str]]:
    """Channel options with retries for all methods."""
    return [("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": RETRY}]}))]


class Handlers(grpc.GenericRpcHandler):
    """The methods, without generated code."""

    def __init__(self, running: threading.Event, through: str) -> None:
        self._running = running
        self._failed = itertools.count()
        if through:
            self._downstream: Any = mesh.insecure_channel(through, retrying()).unary_unary("/bench.Echo/Fail")
        self._methods: dict[str, Any] = {
            "/bench.Echo/Unary": grpc.unary_unary_rpc_method_handler(self._unary),
            "/bench.Echo/Stream": grpc.unary_stream_rpc_method_handler(self._stream),
            "/bench.Echo/Fail": grpc.unary_unary_rpc_method_handler(self._fail),
            "/bench.Echo/Failed": grpc.unary_unary_rpc_method_handler(self._count),
            "/bench.Echo/Through": grpc.unary_unary_rpc_method_handler(self._through),
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._methods.get(handler_call_details.method)

    def _unary(self, request: bytes, _context: grpc.ServicerContext) -> bytes:
        self._running.wait()
        return request

    def _stream(self, request: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in range(int(request)):
            yield MESSAGE

    def _fail(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        next(self._failed)
        context.abort(grpc.StatusCode.UNAVAILABLE, "on purpose")
        raise AssertionError("abort raises")

    def _count(self, _request: bytes, _context: grpc.ServicerContext) -> bytes:
        return str(next(self._failed)).encode()

    def _through(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return self._downstream(request)  # type: ignore[no-any-return]
        except grpc.RpcError as error:
            context.abort(error.code(), error.details() or "")
            raise AssertionError("abort raises") from None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--every", type=float, default=0.0)
    parser.add_argument("--through", default="")
    arguments = parser.parse_args()
    running = threading.Event()
    running.set()
    server = grpc.server(
        futures.ThreadPoolExecutor(16),
        handlers=[Handlers(running, arguments.through)],
        interceptors=[ServerInterceptor()],
        options=[("grpc.so_reuseport", 0)],
    )
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    stopped = threading.Event()

    def pause_periodically() -> None:
        while not stopped.wait(arguments.every - arguments.pause):
            running.clear()
            time.sleep(arguments.pause)
            running.set()

    if arguments.pause:
        threading.Thread(target=pause_periodically, daemon=True).start()
    sys.stdin.read()
    stopped.set()
    running.set()
    server.stop(0)


if __name__ == "__main__":
    main()
