"""The server that channels of both worlds are tried against, and what a call shows of how it went.

A request is a command: ``ok``, ``abort CODE DETAILS``, ``status CODE DETAILS``, ``raise``, ``hang`` (until the call is
over), ``size N`` (a response of N bytes), ``count N THEN`` (N responses, then the rest as a command). Metadata
with keys that begin with ``x-`` comes back, as initial metadata and as trailing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import Any

import grpc

UNARY = "/suite.Suite/Unary"
RESPONSES = "/suite.Suite/Responses"
REQUESTS = "/suite.Suite/Requests"
BOTH = "/suite.Suite/Both"

WORKERS = 24


class Server:
    """A ``grpc.Server`` on 127.0.0.1 that does as its requests say, and knows what is in flight."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.in_flight = 0
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self._changed = threading.Condition()
        self._pool = futures.ThreadPoolExecutor(WORKERS, thread_name_prefix="suite")
        # All its threads from the start: one that a test's call started would look like that test's leak.
        barrier = threading.Barrier(WORKERS + 1)
        for _ in range(WORKERS):
            self._pool.submit(barrier.wait)
        barrier.wait()
        self._server = grpc.server(self._pool, options=(("grpc.so_reuseport", 0),))
        handlers: dict[str, Any] = {
            "Unary": grpc.unary_unary_rpc_method_handler(self._unary),
            "Responses": grpc.unary_stream_rpc_method_handler(self._responses),
            "Requests": grpc.stream_unary_rpc_method_handler(self._requests),
            "Both": grpc.stream_stream_rpc_method_handler(self._both),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("suite.Suite", handlers),))
        if credentials is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.address = f"127.0.0.1:{self.port}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()
        self._pool.shutdown()

    def wait_until_idle(self) -> None:
        """Wait until no handler runs; fails after 5 s."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.in_flight == 0, 5), f"{self.in_flight} handlers still run"

    def wait_until_busy(self, handlers: int = 1) -> None:
        """Wait until that many handlers run; fails after 5 s."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.in_flight >= handlers, 5)

    # -- the handlers

    def _unary(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        with self._handling(context):
            return self._obey(request.decode(), context)

    def _responses(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        with self._handling(context):
            yield from self._stream(request.decode(), context)

    def _requests(self, requests: Iterable[bytes], context: grpc.ServicerContext) -> bytes:
        with self._handling(context):
            last = b"ok"
            count = 0
            for request in requests:
                count += 1
                if not request.startswith(b"."):
                    last = request
                if request.startswith(b"abort"):
                    break
            return b"%d %s" % (count, self._obey(last.decode(), context))

    def _both(self, requests: Iterable[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        with self._handling(context):
            for request in requests:
                yield from self._stream(request.decode(), context)

    def _stream(self, command: str, context: grpc.ServicerContext) -> Iterator[bytes]:
        word, _, rest = command.partition(" ")
        if word != "count":
            yield self._obey(command, context)
            return
        number, _, then = rest.partition(" ")
        for index in range(int(number)):
            yield b"%d" % index
        if then:
            self._obey(then, context)

    def _obey(self, command: str, context: grpc.ServicerContext) -> bytes:
        word, _, rest = command.partition(" ")
        if word in ("abort", "status"):
            name, _, details = rest.partition(" ")
            if word == "abort":
                context.abort(grpc.StatusCode[name], details)
            context.set_code(grpc.StatusCode[name])
            context.set_details(details)
            return b""
        if word == "raise":
            raise RuntimeError("as it was told")
        if word == "hang":
            over = threading.Event()
            if context.add_callback(over.set):
                over.wait()
            return b""
        if word == "size":
            return bytes(int(rest))
        if word == "peer":
            return str(self.port).encode()
        return command.encode()

    def _handling(self, context: grpc.ServicerContext) -> _Handling:
        metadata = dict(context.invocation_metadata())
        sent = tuple((key, value) for key, value in metadata.items() if key.startswith("x-"))
        if sent:
            context.send_initial_metadata(sent)
            context.set_trailing_metadata(sent)
        self.seen.append((context.peer(), metadata))
        return _Handling(self)


class _Handling:
    def __init__(self, server: Server) -> None:
        self._server = server

    def __enter__(self) -> None:
        with self._server._changed:
            self._server.in_flight += 1
            self._server._changed.notify_all()

    def __exit__(self, *_: object) -> None:
        with self._server._changed:
            self._server.in_flight -= 1
            self._server._changed.notify_all()


def own(metadata: Any) -> tuple[Any, ...]:
    """What of a call's metadata the server sent back."""
    return tuple((key, value) for key, value in metadata or () if key.startswith("x-"))
