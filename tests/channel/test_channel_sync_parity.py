"""What ``grpc.Channel`` shows of a call, a mesh channel shows, too: each scenario runs over both, and what it saw is
compared."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

import mesh
from mesh.background import OLD_CORE
from tests.channel.suite import BOTH, REQUESTS, RESPONSES, UNARY, Server, own

Scenario = Callable[[Any, Any], object]

SCENARIOS: dict[str, Scenario] = {}

X = (("x-one", "1"), ("x-two-bin", b"\x00\xff"))
TIMEOUT = 5


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def error(error: Any) -> Any:
    """What an error shows."""
    kinds = tuple(isinstance(error, kind) for kind in (grpc.RpcError, grpc.Call, grpc.Future))
    if not kinds[0]:
        return type(error)
    if not kinds[1]:
        return kinds
    seen = [kinds, error.code(), error.details(), own(error.initial_metadata()), own(error.trailing_metadata())]
    if kinds[2]:
        seen += [error.done(), error.running(), error.cancelled()]
        first, *lines = str(error).splitlines()
        assert first.endswith("of RPC that terminated with:")
        seen += lines[:2]
    return seen


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function returns, or raises."""
    try:
        result = function(*args, **kwargs)
    except BaseException as raised:
        return "raised", error(raised)
    return error(result) if isinstance(result, BaseException) else result


def ending(call: Any) -> object:
    """What a call shows that is over, or is waited for to be."""
    return [
        call.code(),
        call.details(),
        own(call.initial_metadata()),
        own(call.trailing_metadata()),
        call.is_active(),
        call.done(),
        call.running(),
        call.cancelled(),
        *str(call).splitlines()[1:3],
    ]


def future_ending(call: Any) -> object:
    """As ``ending``, with what a future raises."""
    seen = [outcome(call.result, 5), ending(call), outcome(call.exception, 5)]
    try:
        seen.append(call.traceback(5) is not None)
    except BaseException as raised:
        seen.append(type(raised))
    if call.code() is not grpc.StatusCode.OK and not call.cancelled():
        seen.append(call.exception() is call)
    return seen


def read(call: Any) -> Any:
    """All responses, and how they end."""
    messages = []
    try:
        messages.extend(iter(call))
    except BaseException as raised:
        return messages, error(raised), raised is call
    return messages, "end"


def without_texts(seen: Any) -> Any:
    """``seen`` without its strings."""
    if isinstance(seen, list | tuple):
        return [without_texts(item) for item in seen if not isinstance(item, str)]
    return seen


# -- one request, one response


@scenario
def a_response(channel: Any, server: Any) -> object:
    unary = channel.unary_unary(UNARY)
    response, call = unary.with_call(b"ok 2", timeout=TIMEOUT, metadata=X)
    seen = [unary(b"ok 1", timeout=TIMEOUT), response, call.code(), call.details(), own(call.initial_metadata())]
    seen += [own(call.trailing_metadata()), call.is_active(), isinstance(call, grpc.Call)]
    return [*seen, future_ending(unary.future(b"ok 3", timeout=TIMEOUT, metadata=X))]


@scenario
def an_abort(channel: Any, server: Any) -> object:
    unary = channel.unary_unary(UNARY)
    command = "abort NOT_FOUND no such thing é".encode()
    return [
        outcome(unary, command, timeout=TIMEOUT, metadata=X),
        outcome(unary.with_call, command, timeout=TIMEOUT),
        future_ending(unary.future(command, timeout=TIMEOUT, metadata=X)),
    ]


@scenario
def every_status(channel: Any, server: Any) -> object:
    unary = channel.unary_unary(UNARY)
    return [
        outcome(unary, f"{way} {code.name} details".encode(), timeout=TIMEOUT)
        for code in grpc.StatusCode
        if code is not grpc.StatusCode.OK
        for way in ("abort", "status")
    ]


@scenario
def a_handler_that_raises(channel: Any, server: Any) -> object:
    return outcome(channel.unary_unary(UNARY), b"raise", timeout=TIMEOUT)


@scenario
def a_method_that_is_not_there(channel: Any, server: Any) -> object:
    path = "/suite.Suite/Nothing"
    return [
        outcome(channel.unary_unary(path), b"", timeout=TIMEOUT),
        future_ending(channel.unary_unary(path).future(b"", timeout=TIMEOUT)),
        read(channel.unary_stream(path)(b"", timeout=TIMEOUT)),
        outcome(channel.stream_unary(path), iter([b""]), timeout=TIMEOUT),
        read(channel.stream_stream(path)(iter([b""]), timeout=TIMEOUT)),
    ]


@scenario
def the_deadline(channel: Any, server: Any) -> object:
    unary = channel.unary_unary(UNARY)
    unary(b"ok", wait_for_ready=True)
    seen = [
        outcome(unary, b"hang", timeout=0.1),
        future_ending(unary.future(b"hang", timeout=0.1)),
        read(channel.unary_stream(RESPONSES)(b"count 2 hang", timeout=0.3)),
        outcome(channel.stream_unary(REQUESTS), iter([b"hang"]), timeout=0.1),
        read(channel.stream_stream(BOTH)(iter([b"count 2 hang"]), timeout=0.3)),
    ]
    return without_texts(seen)  # core itself has several for this


@scenario
def a_deadline_in_the_past(channel: Any, server: Any) -> object:
    unary = channel.unary_unary(UNARY)
    seen: Any = outcome(unary, b"ok", timeout=-1)
    return seen[1][1]  # the code: of the details the mesh says more


@scenario
def a_future_in_flight(channel: Any, server: Any) -> object:
    call = channel.unary_unary(UNARY).future(b"hang", timeout=TIMEOUT)
    server.wait_until_busy()
    seen = [call.done(), call.running(), call.cancelled(), call.is_active(), 4 < call.time_remaining() <= 5]
    seen += [outcome(call.result, 0.01), outcome(call.exception, 0.01), outcome(call.traceback, 0.01)]
    seen += [outcome(call.result, 0), call.add_callback(lambda: None)]
    seen += [call.cancel(), future_ending(call), call.cancel()]
    return seen


@scenario
def no_deadline_no_time_remaining(channel: Any, server: Any) -> object:
    call = channel.unary_unary(UNARY).future(b"ok")
    return [call.time_remaining(), call.result(5)]


@scenario
def cancelled_at_once(channel: Any, server: Any) -> object:
    call = channel.unary_unary(UNARY).future(b"hang", timeout=TIMEOUT)
    return [call.cancel(), future_ending(call)]


@scenario
def cancelled_after_the_end(channel: Any, server: Any) -> object:
    seen: list[object] = []
    for command in (b"ok", b"abort ABORTED no"):
        call = channel.unary_unary(UNARY).future(command, timeout=TIMEOUT)
        call.exception(5)
        call.cancel()
        seen += [call.cancelled(), call.code()]
    return seen


@scenario
def done_callbacks(channel: Any, server: Any) -> object:
    seen: list[object] = []
    called = threading.Semaphore(0)

    def note(name: str) -> Callable[..., None]:
        def callback(*args: object) -> None:
            seen.append((name, args == (call,) if args else "nothing", call.code()))
            called.release()

        return callback

    def broken(_: object) -> None:
        raise RuntimeError("a callback's own fault")

    call: Any = channel.unary_unary(UNARY).future(b"hang", timeout=TIMEOUT)
    server.wait_until_busy()
    call.add_done_callback(broken)
    call.add_done_callback(note("done"))
    registered = call.add_callback(note("plain"))
    call.cancel()
    assert called.acquire(timeout=5)
    assert called.acquire(timeout=5)
    call.add_done_callback(note("late"))
    return [registered, call.add_callback(note("never")), *seen]


@scenario
def a_request_that_cannot_be_serialised(channel: Any, server: Any) -> object:
    def refuse(_: object) -> bytes:
        raise ValueError("unserialisable")

    stream_unary = channel.stream_unary(REQUESTS, request_serializer=refuse)
    seen = [outcome(channel.unary_unary(UNARY, request_serializer=refuse), b"", timeout=TIMEOUT)]
    seen.append(outcome(channel.unary_unary(UNARY, request_serializer=refuse).future, b"", timeout=TIMEOUT))
    seen.append(outcome(channel.unary_stream(RESPONSES, request_serializer=refuse), b"", timeout=TIMEOUT))
    seen.append(outcome(stream_unary, iter([b""]), timeout=TIMEOUT))
    seen.append(future_ending(stream_unary.future(iter([b""]), timeout=TIMEOUT)))
    seen.append(read(channel.stream_stream(BOTH, request_serializer=refuse)(iter([b""]), timeout=TIMEOUT)))
    return seen


@scenario
def a_response_that_cannot_be_parsed(channel: Any, server: Any) -> object:
    def refuse(_: bytes) -> object:
        raise ValueError("unparseable")

    return [
        outcome(channel.unary_unary(UNARY, None, refuse), b"ok", timeout=TIMEOUT),
        future_ending(channel.unary_unary(UNARY, None, refuse).future(b"ok", timeout=TIMEOUT)),
        read(channel.unary_stream(RESPONSES, None, refuse)(b"count 3", timeout=TIMEOUT)),
        outcome(channel.stream_unary(REQUESTS, None, refuse), iter([b"ok"]), timeout=TIMEOUT),
        read(channel.stream_stream(BOTH, None, refuse)(iter([b"ok"]), timeout=TIMEOUT)),
    ]


@scenario
def messages_of_their_own_types(channel: Any, server: Any) -> object:
    def parse(data: bytes) -> tuple[bytes]:
        return (data,)

    arguments = (str.encode, parse)
    return [
        channel.unary_unary(UNARY, *arguments)("ok", timeout=TIMEOUT),
        read(channel.unary_stream(RESPONSES, *arguments)("count 2", timeout=TIMEOUT)),
        channel.stream_unary(REQUESTS, *arguments)(iter([".", "ok"]), timeout=TIMEOUT),
        read(channel.stream_stream(BOTH, *arguments)(iter(["ok", "count 1"]), timeout=TIMEOUT)),
    ]


@scenario
def empty_and_large_messages(channel: Any, server: Any) -> object:
    unary = channel.unary_unary(UNARY)
    return [
        unary(b"", timeout=TIMEOUT),
        len(unary(b"size 3000000", timeout=TIMEOUT)),
        len(unary(b"ok " + bytes(3_000_000), timeout=TIMEOUT)),
        outcome(unary, b"size 5000000", timeout=TIMEOUT),
        outcome(unary, b"ok " + bytes(5_000_000), timeout=TIMEOUT),
    ]


@scenario
def compressed(channel: Any, server: Any) -> object:
    unary = channel.unary_unary(UNARY)
    return [
        unary(b"ok" * 1000, timeout=TIMEOUT, compression=grpc.Compression.Gzip),
        read(channel.stream_stream(BOTH)(iter([b"ok", b"ok"]), timeout=TIMEOUT, compression=grpc.Compression.Deflate)),
    ]


@scenario
def metadata_that_cannot_be_sent(channel: Any, server: Any) -> object:
    unary = channel.unary_unary(UNARY)
    wrong: list[Any] = [(("Upper", "v"),), (("k", "a\nb"),), ((1, "v"),), (("k", 1),), (("k-bin", "text"),), 42]
    return [
        [outcome(unary, b"ok", timeout=TIMEOUT, metadata=metadata) for metadata in wrong],
        [outcome(unary.future, b"ok", timeout=TIMEOUT, metadata=metadata) for metadata in wrong[2:]],
        future_ending(unary.future(b"ok", timeout=TIMEOUT, metadata=wrong[0])),
        read(channel.unary_stream(RESPONSES)(b"ok", timeout=TIMEOUT, metadata=wrong[0])),
    ]


@scenario
def waiting_for_ready(channel: Any, server: Any) -> object:
    unary = channel.unary_unary(UNARY)
    return [unary(b"ok", timeout=TIMEOUT, wait_for_ready=wait) for wait in (True, False, None)]


# -- streamed responses


@scenario
def responses_to_their_end(channel: Any, server: Any) -> object:
    stream = channel.unary_stream(RESPONSES)
    call = stream(b"count 3", timeout=TIMEOUT, metadata=X)
    seen = [own(call.initial_metadata()), read(call), ending(call), read(call), outcome(next, call)]
    empty = stream(b"count 0", timeout=TIMEOUT, metadata=X)
    return [*seen, read(empty), ending(empty)]


@scenario
def responses_then_an_error(channel: Any, server: Any) -> object:
    seen: list[object] = []
    for count in (0, 2):
        call = channel.unary_stream(RESPONSES)(b"count %d abort ABORTED now" % count, timeout=TIMEOUT, metadata=X)
        seen += [read(call), ending(call), outcome(next, call)]
    return seen


@scenario
def responses_cancelled(channel: Any, server: Any) -> object:
    call: Any = channel.unary_stream(RESPONSES)(b"count 2 hang", timeout=TIMEOUT)
    seen = [next(call), call.is_active(), call.done(), call.running(), call.cancelled(), call.cancel()]
    seen += [ending(call), outcome(next, call), call.cancel()]
    server.wait_until_idle()
    return seen


@scenario
def responses_cancelled_before_any(channel: Any, server: Any) -> object:
    call: Any = channel.unary_stream(RESPONSES)(b"hang", timeout=TIMEOUT)
    return [call.cancel(), ending(call), outcome(next, call)]


@scenario
def responses_cancelled_while_waited_for(channel: Any, server: Any) -> object:
    call: Any = channel.unary_stream(RESPONSES)(b"hang", timeout=TIMEOUT)
    server.wait_until_busy()
    canceller = threading.Thread(target=call.cancel)
    canceller.start()
    seen = outcome(next, call)
    canceller.join()
    return seen


@scenario
def a_stream_as_a_future(channel: Any, server: Any) -> object:
    call: Any = channel.unary_stream(RESPONSES)(b"count 1 abort ABORTED now", timeout=TIMEOUT)
    seen = [next(call), outcome(next, call)]
    return [*seen, outcome(call.exception, 5), outcome(call.result, 5), call.done()]


@scenario
def initial_metadata_before_responses(channel: Any, server: Any) -> object:
    call: Any = channel.unary_stream(RESPONSES)(b"hang", timeout=TIMEOUT, metadata=X)
    seen = [own(call.initial_metadata()), call.is_active()]
    call.cancel()
    return seen


@scenario
def metadata_of_an_error_before_responses(channel: Any, server: Any) -> object:
    call: Any = channel.unary_stream(RESPONSES)(b"abort ABORTED now", timeout=TIMEOUT, metadata=X)
    return [own(call.initial_metadata()), own(call.trailing_metadata()), call.code()]


# -- streamed requests


@scenario
def requests(channel: Any, server: Any) -> object:
    stream = channel.stream_unary(REQUESTS)
    response, call = stream.with_call(iter([b".", b".", b"ok"]), timeout=TIMEOUT, metadata=X)
    seen = [response, call.code(), own(call.initial_metadata()), own(call.trailing_metadata())]
    seen += [stream(iter([]), timeout=TIMEOUT), future_ending(stream.future(iter([b"ok"]), timeout=TIMEOUT))]
    return [*seen, outcome(stream, iter([b"abort ABORTED now"]), timeout=TIMEOUT, metadata=X)]


@scenario
def requests_that_never_end(channel: Any, server: Any) -> object:
    def forever() -> Iterator[bytes]:
        yield from itertools.chain([b"."] * 10, itertools.repeat(b"abort ABORTED enough"))

    return [
        outcome(channel.stream_unary(REQUESTS), forever(), timeout=TIMEOUT),
        read(channel.stream_stream(BOTH)(forever(), timeout=TIMEOUT))[-1],
    ]


@scenario
def requests_that_raise(channel: Any, server: Any) -> object:
    def broken() -> Iterator[bytes]:
        yield b"."
        raise RuntimeError("no more")

    seen = [outcome(channel.stream_unary(REQUESTS), broken(), timeout=TIMEOUT)]
    seen.append(future_ending(channel.stream_unary(REQUESTS).future(broken(), timeout=TIMEOUT)))
    call = channel.stream_stream(BOTH)(broken(), timeout=TIMEOUT)
    seen.append(read(call)[-1])
    server.wait_until_idle()
    return seen


@scenario
def requests_that_are_no_iterator(channel: Any, server: Any) -> object:
    wrong: Any = object()
    return [
        outcome(channel.stream_unary(REQUESTS), wrong, timeout=TIMEOUT),
        future_ending(channel.stream_unary(REQUESTS).future(wrong, timeout=TIMEOUT)),
        read(channel.stream_stream(BOTH)(wrong, timeout=TIMEOUT)),
    ]


@scenario
def requests_that_wait_for_responses(channel: Any, server: Any) -> object:
    may_go = threading.Semaphore(1)

    def asked() -> Iterator[bytes]:
        for index in range(5):
            assert may_go.acquire(timeout=5)
            yield b"ok %d" % index

    seen = []
    for response in channel.stream_stream(BOTH)(asked(), timeout=TIMEOUT):
        seen.append(response)
        may_go.release()
    return seen


@scenario
def requests_cancelled(channel: Any, server: Any) -> object:
    over = threading.Event()

    def slow() -> Iterator[bytes]:
        yield b"."
        over.wait(5)

    call = channel.stream_unary(REQUESTS).future(slow(), timeout=TIMEOUT)
    server.wait_until_busy()
    seen = [call.cancel(), future_ending(call)]
    over.set()
    return seen


@scenario
def both_to_their_end(channel: Any, server: Any) -> object:
    stream = channel.stream_stream(BOTH)
    call = stream(iter([b"ok 1", b"count 2", b"ok 2"]), timeout=TIMEOUT, metadata=X)
    seen = [read(call), ending(call)]
    nothing = stream(iter([]), timeout=TIMEOUT)
    return [*seen, read(nothing), ending(nothing), read(stream(iter([b"ok", b"abort ABORTED now"]), timeout=TIMEOUT))]


# -- interceptors


class Marks(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds its name to the metadata; of all four kinds."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self._name = name
        self._seen = seen

    def _intercept(self, continuation: Any, details: Any, request: Any) -> Any:
        self._seen.append(f"{self._name} {details.method.rpartition('/')[2]} {details.timeout}")
        metadata = (*(details.metadata or ()), (f"x-{self._name}", "was here"))
        return continuation(Details(details.method, details.timeout, metadata, details.credentials), request)

    intercept_unary_unary = intercept_unary_stream = _intercept  # type: ignore[assignment]
    intercept_stream_unary = intercept_stream_stream = _intercept  # type: ignore[assignment]


class Details(grpc.ClientCallDetails):
    def __init__(self, method: str, timeout: float | None, metadata: Any, credentials: Any) -> None:
        self.method = method
        self.timeout = timeout
        self.metadata = metadata
        self.credentials = credentials


@scenario
def interceptors(channel: Any, server: Any) -> object:
    seen: list[Any] = []
    channel = grpc.intercept_channel(channel, Marks("outer", seen), Marks("inner", seen))
    unary = channel.unary_unary(UNARY)
    response, call = unary.with_call(b"ok", timeout=TIMEOUT)
    seen += [response, own(call.initial_metadata())]
    seen.append(outcome(unary, b"abort ABORTED now", timeout=TIMEOUT))
    seen.append(future_ending(unary.future(b"abort ABORTED now", timeout=TIMEOUT)))
    seen.append(future_ending(unary.future(b"ok", timeout=TIMEOUT)))
    stream: Any = channel.unary_stream(RESPONSES)(b"count 1 abort ABORTED now", timeout=TIMEOUT)
    seen += [next(stream), outcome(next, stream), own(stream.initial_metadata())]
    seen.append(outcome(channel.stream_unary(REQUESTS), iter([b"ok"]), timeout=TIMEOUT))
    return [*seen, read(channel.stream_stream(BOTH)(iter([b"ok"]), timeout=TIMEOUT))]


SLOW = {"the_deadline", "empty_and_large_messages"}
CASES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SCENARIOS]


@pytest.fixture(params=["address", "static", "three"])
def target(request: pytest.FixtureRequest, servers: list[Server], server: Server) -> str:
    if request.param == "address":
        return server.address
    if request.param == "static":
        return f"static:///{server.address}"
    # Where each server does the same it doesn't matter which takes a call.
    return "static:///" + ",".join(server.address for server in servers)


class Any3:
    """Three servers as one, for scenarios that wait for what happens there."""

    def __init__(self, servers: list[Server]) -> None:
        self._servers = servers

    def wait_until_idle(self) -> None:
        for server in self._servers:
            server.wait_until_idle()

    def wait_until_busy(self) -> None:
        done = threading.Event()

        def wait(server: Server) -> None:
            with server._changed:
                while not done.is_set() and not server._changed.wait_for(lambda: server.in_flight > 0, 0.01):
                    pass
            done.set()

        threads = [threading.Thread(target=wait, args=(server,)) for server in self._servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_channel_shows_what_grpcs_own_does(
    name: str, target: str, server: Server, servers: list[Server]
) -> None:
    if name == "metadata_that_cannot_be_sent" and OLD_CORE:
        pytest.skip("grpcio before 1.80 raises ValueError where later ones return a call that failed")
    with grpc.insecure_channel(server.address) as channel:
        expected = SCENARIOS[name](channel, server)
    with mesh.insecure_channel(target) as channel:
        seen = SCENARIOS[name](channel, Any3(servers) if "," in target else server)
    assert seen == expected
