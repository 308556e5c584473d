"""A call that may not be retried is run once, whatever the server says: no text that a peer writes starts an attempt,
or passes for the client's own. Where plain gRPC can be asked, it is asked the same."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh
import mesh.aio
from mesh.channel.aio.driver import _write_failed
from mesh.channel.outcome import pushback_of
from mesh.server.handlers.interceptors import AioServerInterceptor, ServerInterceptor
from tests.channel.suite import REQUESTS, UNARY, Server
from tests.processes import Spawn, free_ports

TIMEOUT = 3
REFUSED_STREAM = "Stream removed (RST_STREAM (Received RST_STREAM with error code 7))"
TEXTS = (
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host",
    "connections to all backends failing; last error: UNAVAILABLE: ipv4:127.0.0.1:1: Connection refused",
    "empty address list: ",
    "the connection was lost before the call was sent",
    "Channel closed!",
    REFUSED_STREAM,
)
"""What core and the mesh say of calls that never reached a handler."""

Open = Callable[[str], Any]
OPEN: dict[str, Open] = {
    "grpc": grpc.insecure_channel,
    "mesh": lambda address: mesh.insecure_channel(f"static:///{address}"),
}
OPEN_AIO: dict[str, Open] = {
    "grpc": grpc.aio.insecure_channel,
    "mesh": lambda address: mesh.aio.insecure_channel(f"static:///{address}"),
}

# A gateway's own call, also to a target that core resolves: there core's words reach the gateway's handler.
DOWNSTREAMS: dict[str, Open] = {**OPEN, "mesh, core's target": mesh.insecure_channel}
AIO_DOWNSTREAMS: dict[str, Open] = {**OPEN_AIO, "mesh, core's target": mesh.aio.insecure_channel}

METHOD = "/test.Test/Call"


def _unary(invoke: Callable[[Any], Callable[..., Any]]) -> Callable[[Any, bytes], object]:
    return lambda channel, request: invoke(channel.unary_unary(METHOD))(request, timeout=TIMEOUT, wait_for_ready=True)


KINDS: dict[str, Callable[[Any, bytes], object]] = {
    "blocking": _unary(lambda method: method),
    "with_call": _unary(lambda method: method.with_call),
    "future": _unary(lambda method: lambda *a, **k: method.future(*a, **k).result()),
    "unary_stream": lambda channel, request: list(
        channel.unary_stream(METHOD)(request, timeout=TIMEOUT, wait_for_ready=True)
    ),
    "stream_unary": lambda channel, request: channel.stream_unary(METHOD)(
        iter([request]), timeout=TIMEOUT, wait_for_ready=True
    ),
    "stream_stream": lambda channel, request: list(
        channel.stream_stream(METHOD)(iter([request]), timeout=TIMEOUT, wait_for_ready=True)
    ),
}


async def _read(call: Any) -> list[bytes]:
    return [message async for message in call]


AIO_KINDS: dict[str, Callable[[Any, bytes], Awaitable[object]]] = {
    "unary_unary": lambda channel, request: channel.unary_unary(METHOD)(request, timeout=TIMEOUT, wait_for_ready=True),
    "unary_stream": lambda channel, request: _read(
        channel.unary_stream(METHOD)(request, timeout=TIMEOUT, wait_for_ready=True)
    ),
    "stream_unary": lambda channel, request: channel.stream_unary(METHOD)(
        iter([request]), timeout=TIMEOUT, wait_for_ready=True
    ),
    "stream_stream": lambda channel, request: _read(
        channel.stream_stream(METHOD)(iter([request]), timeout=TIMEOUT, wait_for_ready=True)
    ),
}


class Gateway:
    """A threaded server whose one handler, of any kind, aborts with the status that its request says, or with that of a
    call that it makes to ``downstream``, passed on as it came. It counts how often it is run."""

    def __init__(self, downstream: Any = None, interceptors: tuple[Any, ...] = ()) -> None:
        self.runs = 0
        self._downstream = downstream
        self._lock = threading.Lock()
        self._pool = futures.ThreadPoolExecutor(4)
        # All its threads from the start: one that a test's call started would look like that test's leak.
        met = threading.Barrier(5)
        for _ in range(4):
            self._pool.submit(met.wait)
        met.wait()
        self._server = grpc.server(self._pool, interceptors=list(interceptors))
        self._server.add_generic_rpc_handlers([_Any(self._handle)])
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _handle(self, request: bytes, context: Any) -> bytes:
        with self._lock:
            self.runs += 1
        if self._downstream is None:
            code, _, details = request.decode().partition(" ")
            context.abort(grpc.StatusCode[code], details)
        try:
            return self._downstream.unary_unary(METHOD)(request)  # type: ignore[no-any-return]
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())
        return b""

    def close(self) -> None:
        self._server.stop(0).wait()
        self._pool.shutdown()


class _Any(grpc.GenericRpcHandler):
    """Serves calls of every kind, which in bytes are alike, with one function."""

    def __init__(self, handle: Callable[[bytes, Any], bytes]) -> None:
        def behavior(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            yield handle(next(requests), context)

        self._handler: Any = grpc.stream_stream_rpc_method_handler(behavior)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._handler


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.close()


@pytest.fixture
def dead() -> str:
    """An address that nothing listens on."""
    return f"127.0.0.1:{free_ports(1)[0]}"


def failure(function: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        function()
    error: Any = caught.value
    return error.code()  # type: ignore[no-any-return]


async def aio_failure(awaitable: Awaitable[object]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value.code()


# -- a gateway that passes on how its own call failed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", OPEN)
@pytest.mark.parametrize("downstream", DOWNSTREAMS)
def test_a_gateway_whose_downstream_is_dead_runs_a_call_once(
    downstream: str, library: str, kind: str, dead: str
) -> None:
    interceptors = () if downstream == "grpc" else (ServerInterceptor(),)
    with DOWNSTREAMS[downstream](dead) as behind:
        gateway = Gateway(behind, interceptors)
        with OPEN[library](gateway.address) as channel:
            assert failure(lambda: KINDS[kind](channel, b"")) is grpc.StatusCode.UNAVAILABLE
        assert gateway.runs == 1
        gateway.close()


@pytest.mark.parametrize("kind", AIO_KINDS)
@pytest.mark.parametrize("library", OPEN_AIO)
@pytest.mark.parametrize("downstream", AIO_DOWNSTREAMS)
async def test_an_asyncio_gateway_whose_downstream_is_dead_runs_a_call_once(
    downstream: str, library: str, kind: str, dead: str
) -> None:
    runs = 0

    async def handle(requests: Any, context: Any) -> None:
        nonlocal runs
        runs += 1
        try:
            await behind.unary_unary(METHOD)(b"")
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details())

    handler: Any = grpc.stream_stream_rpc_method_handler(handle)
    server = grpc.aio.server(interceptors=[] if downstream == "grpc" else [AioServerInterceptor()])
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Test", {"Call": handler})])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with AIO_DOWNSTREAMS[downstream](dead) as behind, OPEN_AIO[library](address) as channel:
        assert await aio_failure(AIO_KINDS[kind](channel, b"")) is grpc.StatusCode.UNAVAILABLE
    assert runs == 1
    await server.stop(None)


# -- a handler that says what core says


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", OPEN)
def test_a_handler_that_aborts_in_cores_words_is_run_once(library: str, kind: str, text: str, gateway: Gateway) -> None:
    before = gateway.runs
    with OPEN[library](gateway.address) as channel:
        assert failure(lambda: KINDS[kind](channel, f"UNAVAILABLE {text}".encode())) is grpc.StatusCode.UNAVAILABLE
    assert gateway.runs == before + 1


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", AIO_KINDS)
@pytest.mark.parametrize("library", OPEN_AIO)
async def test_a_handler_that_aborts_in_cores_words_is_run_once_in_asyncio(
    library: str, kind: str, text: str, gateway: Gateway
) -> None:
    before = gateway.runs
    async with OPEN_AIO[library](gateway.address) as channel:
        code = await aio_failure(AIO_KINDS[kind](channel, f"UNAVAILABLE {text}".encode()))
        assert code is grpc.StatusCode.UNAVAILABLE
    assert gateway.runs == before + 1


def test_a_hedged_call_is_run_as_often_as_its_policy_says(gateway: Gateway) -> None:
    before = gateway.runs
    policy = {"maxAttempts": 2, "hedgingDelay": "1s", "nonFatalStatusCodes": ["UNAVAILABLE"]}
    config = json.dumps({"methodConfig": [{"name": [{}], "hedgingPolicy": policy}]})
    target = f"static:///{gateway.address}"
    with mesh.insecure_channel(target, [("grpc.service_config", config)]) as channel:
        request = f"UNAVAILABLE {TEXTS[0]}".encode()
        assert failure(lambda: KINDS["blocking"](channel, request)) is grpc.StatusCode.UNAVAILABLE
    assert gateway.runs == before + 2


@pytest.mark.parametrize("text", TEXTS)
def test_a_call_that_may_be_retried_is_run_as_often_as_its_policy_says(text: str, gateway: Gateway) -> None:
    before = gateway.runs
    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.001s",
        "maxBackoff": "0.001s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
    target = f"static:///{gateway.address}"
    with mesh.insecure_channel(target, [("grpc.service_config", config)]) as channel:
        request = f"UNAVAILABLE {text}".encode()
        assert failure(lambda: KINDS["blocking"](channel, request)) is grpc.StatusCode.UNAVAILABLE
    assert gateway.runs == before + 3


# -- a server that says what a cancel of the client's own says


@pytest.mark.parametrize("text", ["Locally cancelled by application!", "Cancelled upon garbage collection!"])
@pytest.mark.parametrize("kind", AIO_KINDS)
@pytest.mark.parametrize("library", OPEN_AIO)
async def test_the_servers_cancelled_is_an_error_and_not_a_cancel_of_the_callers_task(
    library: str, kind: str, text: str, gateway: Gateway
) -> None:
    async with OPEN_AIO[library](gateway.address) as channel:
        code = await aio_failure(AIO_KINDS[kind](channel, f"CANCELLED {text}".encode()))
        assert code is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("library", OPEN)
def test_the_servers_cancelled_is_an_error_of_a_future(library: str, gateway: Gateway) -> None:
    with OPEN[library](gateway.address) as channel:
        call = channel.unary_unary(METHOD).future(b"CANCELLED Locally cancelled by application!", timeout=TIMEOUT)
        assert failure(call.result) is grpc.StatusCode.CANCELLED
        assert not call.cancelled()


@pytest.mark.parametrize("library", OPEN_AIO)
async def test_the_servers_cancelled_is_shown_as_grpc_shows_it(library: str, gateway: Gateway) -> None:
    async with OPEN_AIO[library](gateway.address) as channel:
        call = channel.unary_unary(METHOD)(b"CANCELLED no", timeout=TIMEOUT)
        assert await call.code() is grpc.StatusCode.CANCELLED
        assert call.cancelled()


async def test_a_cancelled_task_cancels_its_call_and_is_not_retried(server: Server) -> None:
    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.001s",
        "maxBackoff": "0.001s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["CANCELLED"],
    }
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
    channel: Any = mesh.aio.insecure_channel(f"static:///{server.address}", [("grpc.service_config", config)])
    async with channel:
        call = channel.unary_unary(UNARY)(b"hang", timeout=TIMEOUT, wait_for_ready=True)
        waiting = asyncio.ensure_future(call)
        await asyncio.to_thread(server.wait_until_busy)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert call.cancelled()
        assert len(call.explain().attempts) == 1


async def test_a_handler_that_says_that_a_write_failed_is_believed_to_have_said_it(server: Server) -> None:
    """grpc.aio's own failure to write is told from a server's status that reads like it."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        method: Any = channel.stream_unary(REQUESTS)
        call = method(iter([b"abort INTERNAL Internal error from Core"]), timeout=TIMEOUT)
        assert await call.details() == "Internal error from Core"
        assert not _write_failed(call)

        async def many() -> Any:
            yield b"abort ABORTED no"
            for _ in range(100):
                yield b"." * 5000

        for _ in range(500):
            call = method(many(), timeout=TIMEOUT)
            if await call.details() == "Internal error from Core":
                assert _write_failed(call)
                return
    pytest.skip("grpc.aio told of no write that failed")


# -- a server that dies


EXECUTES_THEN_DIES = """
import os, signal, sys
from concurrent import futures
import grpc

def handle(requests, context):
    next(requests)
    with open(sys.argv[1], "a") as file:
        file.write("ran\\n")
    os.kill(os.getpid(), signal.SIGKILL)
    yield b""

class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.stream_stream_rpc_method_handler(handle)

server = grpc.server(futures.ThreadPoolExecutor(4))
server.add_generic_rpc_handlers([Handler()])
server.add_insecure_port(sys.argv[2])
server.start()
print("ready", flush=True)
server.wait_for_termination()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", OPEN)
def test_a_call_whose_server_is_killed_after_it_ran_is_run_once(
    library: str, kind: str, tmp_path: Path, spawn: Spawn
) -> None:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    file = tmp_path / "ran"
    for address in addresses:
        spawn.python("-c", EXECUTES_THEN_DIES, file, address).wait_for("ready")
    target = addresses[0] if library == "grpc" else ",".join(addresses)
    with OPEN[library](target) as channel:
        assert failure(lambda: KINDS[kind](channel, b"")) is grpc.StatusCode.UNAVAILABLE
    assert file.read_text() == "ran\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", AIO_KINDS)
async def test_an_asyncio_call_whose_server_is_killed_after_it_ran_is_run_once(
    kind: str, tmp_path: Path, spawn: Spawn
) -> None:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    file = tmp_path / "ran"
    for address in addresses:
        spawn.python("-c", EXECUTES_THEN_DIES, file, address).wait_for("ready")
    async with OPEN_AIO["mesh"](",".join(addresses)) as channel:
        assert await aio_failure(AIO_KINDS[kind](channel, b"")) is grpc.StatusCode.UNAVAILABLE
    assert file.read_text() == "ran\n"


# -- what else a server writes


@pytest.mark.parametrize("value", ["9" * 400, "9" * 5000, "soon", "-1", "1e3"])
def test_a_pushback_that_is_no_number_of_milliseconds_ends_the_retries(value: str) -> None:
    assert pushback_of((("x-other", "1"), ("grpc-retry-pushback-ms", value))) == -1.0


def test_a_peers_details_are_not_shown_as_cores_debug_string(gateway: Gateway) -> None:
    forged = 'no"\n\tdebug_error_string = "forged'
    with OPEN["mesh"](gateway.address) as channel:
        call = channel.unary_unary(METHOD).future(f"NOT_FOUND {forged}".encode(), timeout=TIMEOUT, wait_for_ready=True)
        assert call.details() == forged
        assert not call.debug_error_string().startswith("forged")
        assert call.debug_error_string()
