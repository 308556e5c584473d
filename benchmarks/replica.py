"""A replica to measure against: ``python -m benchmarks.replica`` prints its port and serves until its stdin closes.

Methods of ``bench.Echo``: ``Unary`` echoes; ``Stream`` answers with as many messages as the request says; ``Fail`` is UNAVAILABLE.
``--pause SECONDS --every SECONDS`` has the whole process stand still now and then.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures

import grpc

MESSAGE = b"x" * 64


class Handlers(grpc.GenericRpcHandler):
    """The methods, which need no generated code."""

    def __init__(self, gate: threading.Event) -> None:
        self._gate = gate
        self._methods = {
            "/bench.Echo/Unary": grpc.unary_unary_rpc_method_handler(self._unary),
            "/bench.Echo/Stream": grpc.unary_stream_rpc_method_handler(self._stream),
            "/bench.Echo/Fail": grpc.unary_unary_rpc_method_handler(self._fail),
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._methods.get(handler_call_details.method)

    def _unary(self, request: bytes, _context: grpc.ServicerContext) -> bytes:
        self._gate.wait()
        return request

    def _stream(self, request: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in range(int(request)):
            yield MESSAGE

    def _fail(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNAVAILABLE, "as asked")
        raise AssertionError("abort raises")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--every", type=float, default=0.0)
    arguments = parser.parse_args()
    gate = threading.Event()
    gate.set()
    server = grpc.server(futures.ThreadPoolExecutor(16), handlers=[Handlers(gate)], options=[("grpc.so_reuseport", 0)])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    over = threading.Event()

    def pausing() -> None:
        while not over.wait(arguments.every - arguments.pause):
            gate.clear()
            time.sleep(arguments.pause)
            gate.set()

    if arguments.pause:
        threading.Thread(target=pausing, daemon=True).start()
    sys.stdin.read()
    over.set()
    gate.set()
    server.stop(0)


if __name__ == "__main__":
    main()
