"""Servers that don't keep to the protocol: the call fails with a fitting status, and the channel lives.

The server here writes HTTP/2 frames by hand (RFC 9113; HPACK as literals, RFC 7541 6.2.2), so that it can send what
gRPC's own never would.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh
import mesh.aio
from mesh.background import OLD_CORE
from tests.channel.suite import RESPONSES, UNARY

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x9
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM = 0x0, 0x1, 0x2, 0x7, 0x8, 0xB
LARGEST = 16384  # bytes in a frame, unless more was agreed on

Pair = tuple[str, str]
OK_HEADERS = ((":status", "200"), ("content-type", "application/grpc"))
OK_TRAILERS = (("grpc-status", "0"),)
MESSAGE = b"\x00\x00\x00\x00\x02ok"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def headers(stream: int, pairs: tuple[Pair, ...], *, end: bool = False) -> bytes:
    """A header block: as many frames as it takes."""
    block = b"".join(b"\x10" + _string(name) + _string(value) for name, value in pairs)
    pieces = [block[at : at + LARGEST] for at in range(0, len(block), LARGEST)] or [b""]
    frames = []
    for index, piece in enumerate(pieces):
        flags = (END_HEADERS if index == len(pieces) - 1 else 0) | (END_STREAM if end and index == 0 else 0)
        frames.append(frame(CONTINUATION if index else HEADERS, flags, stream, piece))
    return b"".join(frames)


def _string(text: str) -> bytes:
    data = text.encode("latin-1")
    if len(data) < 127:
        return bytes((len(data),)) + data
    length, rest = bytearray((127,)), len(data) - 127
    while rest >= 128:
        length.append(rest % 128 + 128)
        rest //= 128
    return bytes((*length, rest)) + data


def data(stream: int, payload: bytes = MESSAGE) -> bytes:
    return frame(DATA, 0, stream, payload)


def reset(stream: int, error: int) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", error))


def goaway(last: int, error: int = NO_ERROR) -> bytes:
    return frame(GOAWAY, 0, 0, struct.pack(">II", last, error))


def good(stream: int) -> bytes:
    return headers(stream, OK_HEADERS) + data(stream) + headers(stream, OK_TRAILERS, end=True)


class Last(bytes):
    """What is written before the connection is closed."""


Answer = Callable[[int], bytes]
"""What to write for the request on a stream."""


class RawServer:
    """Answers each request with the next of its answers, and the last of them from then on, over any connection."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.requests = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        for each in (self._socket, *self._connections):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            each.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            stream = connection.makefile("rb")
            if stream.read(len(PREFACE)) != PREFACE:
                return
            connection.sendall(frame(SETTINGS, 0, 0))
            while head := stream.read(9):
                length = int.from_bytes(head[:3], "big")
                kind, flags, number = head[3], head[4], int.from_bytes(head[5:], "big")
                payload = stream.read(length)
                if kind in (SETTINGS, PING) and not flags & ACK:
                    connection.sendall(frame(kind, ACK, 0, payload if kind == PING else b""))
                elif kind == DATA and flags & END_STREAM:
                    answer = self._next()(number)
                    connection.sendall(answer)
                    if isinstance(answer, Last):
                        connection.shutdown(socket.SHUT_RDWR)
                        return
        except OSError:
            pass

    def _next(self) -> Answer:
        self.requests += 1
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


Serve = Callable[..., RawServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[RawServer] = []

    def start(*answers: Answer) -> RawServer:
        servers.append(RawServer(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def trailers(*pairs: Pair) -> Answer:
    return lambda stream: headers(stream, OK_HEADERS) + data(stream) + headers(stream, pairs, end=True)


def then(*parts: Answer) -> Answer:
    return lambda stream: b"".join(part(stream) for part in parts)


MEBIBYTE = "x" * 1024 * 1024

# What a server answers, and the statuses that fit. Where core has several it is because a frame that is wrong may
# be dealt with on the stream or on the connection.
GARBAGE: dict[str, tuple[Answer, set[str]]] = {
    "a status that is no number": (trailers(("grpc-status", "fine")), {"UNKNOWN", "INTERNAL"}),
    "a status that is none of gRPC's": (trailers(("grpc-status", "4711")), {"UNKNOWN"}),
    "a negative status": (trailers(("grpc-status", "-1")), {"UNKNOWN", "INTERNAL"}),
    "trailers without a status": (trailers(("x-only", "this")), {"UNKNOWN", "INTERNAL"}),
    "bytes that are no text": (
        trailers(("grpc-status", "9"), ("grpc-message", "\x80\xff%ZZ")),
        {"FAILED_PRECONDITION"},
    ),
    "status details that are no base64": (
        trailers(("grpc-status", "9"), ("grpc-status-details-bin", "!!!not base64!!!")),
        {"FAILED_PRECONDITION", "INTERNAL", "UNKNOWN"},
    ),
    "a pushback that is no number": (
        trailers(("grpc-status", "9"), ("grpc-retry-pushback-ms", "soon")),
        {"FAILED_PRECONDITION", "INTERNAL", "UNKNOWN"},
    ),
    "upper-case trailers": (
        trailers(("grpc-status", "9"), ("X-UPPER", "1")),
        {"FAILED_PRECONDITION", "INTERNAL", "UNKNOWN"},
    ),
    "an end without trailers": (
        lambda stream: headers(stream, OK_HEADERS) + frame(DATA, END_STREAM, stream, MESSAGE),
        {"UNKNOWN", "INTERNAL", "UNAVAILABLE"},
    ),
    "headers that are the end": (lambda stream: headers(stream, OK_HEADERS, end=True), {"UNKNOWN", "INTERNAL"}),
    "a web page": (
        lambda stream: headers(stream, ((":status", "502"), ("content-type", "text/html")), end=True),
        {"UNAVAILABLE"},
    ),
    "not found, as HTTP says it": (lambda stream: headers(stream, ((":status", "404"),), end=True), {"UNIMPLEMENTED"}),
    "a message compressed as nobody can": (
        lambda stream: (
            headers(stream, (*OK_HEADERS, ("grpc-encoding", "weird")))
            + data(stream, b"\x01\x00\x00\x00\x02ok")
            + headers(stream, OK_TRAILERS, end=True)
        ),
        {"INTERNAL", "UNIMPLEMENTED", "UNKNOWN"},
    ),
    "a reset": (lambda stream: reset(stream, INTERNAL_ERROR), {"INTERNAL", "UNKNOWN"}),
    "a reset after headers": (
        then(lambda stream: headers(stream, OK_HEADERS), lambda stream: reset(stream, INTERNAL_ERROR)),
        {"INTERNAL", "UNKNOWN"},
    ),
    "a reset as a cancel": (lambda stream: reset(stream, CANCEL), {"CANCELLED"}),
    "a reset for too much": (lambda stream: reset(stream, ENHANCE_YOUR_CALM), {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}),
    "headers of a mebibyte": (
        lambda stream: (
            headers(stream, (*OK_HEADERS, ("x-large", MEBIBYTE)))
            + data(stream)
            + headers(stream, OK_TRAILERS, end=True)
        ),
        {"RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN", "UNAVAILABLE"},
    ),
    "trailers of a mebibyte": (
        trailers(("grpc-status", "9"), ("x-large", MEBIBYTE)),
        {"RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN", "UNAVAILABLE"},
    ),
    "a connection that ends": (lambda stream: Last(), {"UNAVAILABLE", "UNKNOWN"}),
    "a connection that fails": (lambda stream: Last(goaway(stream, INTERNAL_ERROR)), {"UNAVAILABLE", "INTERNAL"}),
    "frames that are none": (lambda stream: b"\xff" * 100, {"UNAVAILABLE", "INTERNAL", "UNKNOWN"}),
    "a header block that is none": (
        lambda stream: frame(HEADERS, END_HEADERS, stream, b"\xff" * 20),
        {"UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED"},
    ),
}

CONNECTION_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
"""How calls end that left over a connection which was just lost: core may give them what the connection died of."""

Failure: Any = grpc.RpcError
AioFailure: Any = grpc.aio.AioRpcError


def lives(call: Callable[[], bytes]) -> bool:
    """Whether a call succeeds, after at most two that left over a connection which was just lost."""
    for _ in range(3):
        try:
            return call() == b"ok"
        except Failure as error:
            assert error.code() in CONNECTION_LOST  # noqa: PT017
    return False


@pytest.mark.parametrize("name", GARBAGE)
def test_a_call_fails_and_the_channel_lives(name: str, serve: Serve) -> None:
    answer, codes = GARBAGE[name]
    server = serve(answer, answer, answer, good)
    channel: Any = mesh.insecure_channel(f"static:///{server.address}")
    with channel:
        unary, stream = channel.unary_unary(UNARY), channel.unary_stream(RESPONSES)
        with pytest.raises(Failure) as caught:
            unary(b"ok", timeout=5, wait_for_ready=True)
        assert caught.value.code().name in codes
        assert len(caught.value.explain().attempts) == 1
        future = unary.future(b"ok", timeout=5, wait_for_ready=True)
        assert future.code().name in codes
        call = stream(b"ok", timeout=5, wait_for_ready=True)
        with pytest.raises(Failure):
            list(call)
        assert call.code().name in codes
        assert lives(lambda: unary(b"ok", timeout=5, wait_for_ready=True))
        assert all(node.in_flight == 0 for node in channel.assembly.cluster.nodes.values())


@pytest.mark.parametrize("name", GARBAGE)
async def test_an_aio_call_fails_and_the_channel_lives(name: str, serve: Serve) -> None:
    if name == "a status that is none of gRPC's" and OLD_CORE:
        pytest.skip("an old grpc.aio raises KeyError for it")
    answer, codes = GARBAGE[name]
    server = serve(answer, answer, good)
    channel: Any = mesh.aio.insecure_channel(f"static:///{server.address}")
    async with channel:
        unary, stream = channel.unary_unary(UNARY), channel.unary_stream(RESPONSES)
        with pytest.raises(AioFailure) as caught:
            await unary(b"ok", timeout=5, wait_for_ready=True)
        assert caught.value.code().name in codes
        call = stream(b"ok", timeout=5, wait_for_ready=True)
        with pytest.raises(AioFailure):
            _ = [message async for message in call]
        assert (await call.code()).name in codes
        for _ in range(3):
            try:
                assert await unary(b"ok", timeout=5, wait_for_ready=True) == b"ok"
                break
            except AioFailure as error:  # it left over the connection that was just lost
                assert error.code() in CONNECTION_LOST  # noqa: PT017
        assert all(node.in_flight == 0 for node in channel.assembly.cluster.nodes.values())


# -- what was refused


def retrying(address: str) -> tuple[str, list[tuple[str, str]]]:
    """A target, and options with a retry policy for every method."""
    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.001s",
        "maxBackoff": "0.001s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
    return f"static:///{address}", [("grpc.service_config", config)]


@pytest.mark.parametrize("future", [False, True])
def test_a_stream_that_was_refused_is_tried_again_as_the_policy_says(future: bool, serve: Serve) -> None:
    server = serve(lambda stream: reset(stream, REFUSED_STREAM), good)
    channel: Any = mesh.insecure_channel(*retrying(server.address))
    with channel:
        unary = channel.unary_unary(UNARY)
        assert (unary.future(b"ok", timeout=5).result() if future else unary(b"ok", timeout=5)) == b"ok"
        assert server.requests == 2


async def test_a_stream_that_was_refused_is_tried_again_in_asyncio_as_the_policy_says(serve: Serve) -> None:
    server = serve(lambda stream: reset(stream, REFUSED_STREAM), good)
    channel: Any = mesh.aio.insecure_channel(*retrying(server.address))
    async with channel:
        assert await channel.unary_unary(UNARY)(b"ok", timeout=5) == b"ok"
        assert server.requests == 2


@pytest.mark.parametrize("library", ["grpc", "mesh"])
def test_a_stream_that_was_refused_fails_a_call_that_may_not_be_retried(library: str, serve: Serve) -> None:
    # Only its text says that it was refused, and a handler could write the same.
    server = serve(lambda stream: reset(stream, REFUSED_STREAM), good)
    channel: Any = (
        mesh.insecure_channel(f"static:///{server.address}")
        if library == "mesh"
        else grpc.insecure_channel(server.address)
    )
    with channel:
        with pytest.raises(Failure) as caught:
            channel.unary_unary(UNARY)(b"ok", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.requests == 1


# -- what core sends again by itself (A6's transparent retries), whatever the policy


@pytest.mark.parametrize("library", ["grpc", "mesh"])
def test_a_call_that_goaway_leaves_out_goes_over_a_new_connection(library: str, serve: Serve) -> None:
    server = serve(lambda stream: goaway(0), good)
    channel: Any = (
        mesh.insecure_channel(f"static:///{server.address}")
        if library == "mesh"
        else grpc.insecure_channel(server.address)
    )
    with channel:
        response, call = channel.unary_unary(UNARY).with_call(b"ok", timeout=5, wait_for_ready=True)
        assert response == b"ok"
        assert server.requests == 2
        assert library == "grpc" or len(call.explain().attempts) == 1


async def test_an_asyncio_call_that_goaway_leaves_out_goes_over_a_new_connection(serve: Serve) -> None:
    server = serve(lambda stream: goaway(0), good)
    channel: Any = mesh.aio.insecure_channel(f"static:///{server.address}")
    async with channel:
        call = channel.unary_unary(UNARY)(b"ok", timeout=5)
        assert await call == b"ok"
        assert server.requests == 2
        assert len(call.explain().attempts) == 1


def test_a_call_in_flight_outlives_goaway(serve: Serve) -> None:
    server = serve(lambda stream: goaway(stream) + good(stream), good)
    channel: Any = mesh.insecure_channel(f"static:///{server.address}")
    with channel:
        unary = channel.unary_unary(UNARY)
        assert unary(b"ok", timeout=5) == b"ok"
        assert unary(b"ok", timeout=5, wait_for_ready=True) == b"ok"
        assert server.requests == 2


def test_a_stream_that_is_refused_again_and_again_is_tried_as_often_as_the_policy_says(serve: Serve) -> None:
    server = serve(lambda stream: reset(stream, REFUSED_STREAM))
    channel: Any = mesh.insecure_channel(*retrying(server.address))
    with channel:
        with pytest.raises(Failure) as caught:
            channel.unary_unary(UNARY)(b"ok", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.requests == 3


# -- what core takes for an answer


NO_MESSAGE: dict[str, Answer] = {
    "no message": lambda stream: headers(stream, OK_HEADERS) + headers(stream, OK_TRAILERS, end=True),
    "a message cut short": lambda stream: (
        headers(stream, OK_HEADERS) + data(stream, b"\x00\x00\x00\x00\x09cut") + headers(stream, OK_TRAILERS, end=True)
    ),
}


@pytest.mark.parametrize("name", NO_MESSAGE)
def test_ok_without_a_message_is_what_grpc_makes_of_it(name: str, serve: Serve) -> None:
    server = serve(NO_MESSAGE[name])
    seen = []
    plain: Any = grpc.insecure_channel(server.address)
    channel: Any = mesh.insecure_channel(f"static:///{server.address}")
    for each in (plain, channel):
        with each:
            seen.append(
                (each.unary_unary(UNARY)(b"ok", timeout=5), list(each.unary_stream(RESPONSES)(b"ok", timeout=5)))
            )
    assert seen[0] == seen[1]
