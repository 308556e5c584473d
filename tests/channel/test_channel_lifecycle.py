"""A channel's life: states, closing with calls in flight, calls that are dropped, credentials, `explain()`."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh
import mesh.aio
from tests.channel.suite import BOTH, REQUESTS, RESPONSES, UNARY, Server

State = grpc.ChannelConnectivity

# As Any: grpc's stubs can't know the messages of a multicallable without serializers.
insecure_channel: Any = mesh.insecure_channel
secure_channel: Any = mesh.secure_channel
aio_insecure_channel: Any = mesh.aio.insecure_channel
aio_secure_channel: Any = mesh.aio.secure_channel
Failure: Any = grpc.RpcError
AioFailure: Any = grpc.aio.AioRpcError

UNREACHABLE = "static:///127.0.0.1:1"  # nothing listens on port 1


@pytest.fixture(params=["address", "static", "three"])
def target(request: pytest.FixtureRequest, servers: list[Server], server: Server) -> str:
    if request.param == "address":
        return server.address
    return "static:///" + (server.address if request.param == "static" else ",".join(each.address for each in servers))


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; fails after 5 s."""
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.002)


async def eventually_aio(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


def in_flight(channel: Any) -> int:
    return sum(node.in_flight for node in channel.assembly.cluster.nodes.values())


# -- drop-in to the eye


def test_channels_and_multicallables_are_grpcs() -> None:
    with insecure_channel("static:///127.0.0.1:1") as channel:
        assert isinstance(channel, grpc.Channel)
        assert isinstance(channel.unary_unary(UNARY), grpc.UnaryUnaryMultiCallable)
        assert isinstance(channel.unary_stream(UNARY), grpc.UnaryStreamMultiCallable)
        assert isinstance(channel.stream_unary(UNARY), grpc.StreamUnaryMultiCallable)
        assert isinstance(channel.stream_stream(UNARY), grpc.StreamStreamMultiCallable)


async def test_aio_channels_multicallables_and_calls_are_grpcs(server: Server) -> None:
    async with aio_insecure_channel(f"static:///{server.address}") as channel:
        assert isinstance(channel, grpc.aio.Channel)
        kinds: list[Any] = [
            ("unary_unary", UNARY, b"ok", grpc.aio.UnaryUnaryMultiCallable, grpc.aio.UnaryUnaryCall),
            ("unary_stream", RESPONSES, b"count 0", grpc.aio.UnaryStreamMultiCallable, grpc.aio.UnaryStreamCall),
            ("stream_unary", REQUESTS, [], grpc.aio.StreamUnaryMultiCallable, grpc.aio.StreamUnaryCall),
            ("stream_stream", BOTH, [], grpc.aio.StreamStreamMultiCallable, grpc.aio.StreamStreamCall),
        ]
        for kind, path, requests, of, call_of in kinds:
            multicallable: Any = getattr(channel, kind)(path)
            assert isinstance(multicallable, of)
            call = multicallable(requests, timeout=5)
            assert isinstance(call, call_of)
            assert isinstance(call, grpc.aio.Call)
            assert isinstance(call, grpc.aio.RpcContext)
            assert await call.code() is grpc.StatusCode.OK


def test_a_call_explains_itself_in_flight_and_after(server: Server) -> None:
    with insecure_channel(f"static:///{server.address}") as channel:
        call: Any = channel.unary_unary(UNARY).future(b"hang", timeout=5)
        server.wait_until_busy()
        running = call.explain()
        assert (running.code, running.seconds) == ("RUNNING", None)
        assert [(attempt.address, attempt.code) for attempt in running.attempts] == [(server.address, "RUNNING")]
        call.cancel()
        assert call.explain().code == "CANCELLED"
        with pytest.raises(Failure) as caught:
            channel.unary_unary(UNARY)(b"abort ABORTED no", timeout=5)
        error: Any = caught.value
        assert f"attempt 1 to {server.address}" in str(error.explain())
        _, finished = channel.unary_unary(UNARY).with_call(b"ok", timeout=5)
        assert finished.explain().code == "OK"
        stream: Any = channel.unary_stream(RESPONSES)(b"count 1", timeout=5)
        list(stream)
        assert stream.explain().code == "OK"


async def test_an_aio_call_explains_itself(server: Server) -> None:
    async with aio_insecure_channel(f"static:///{server.address}") as channel:
        call: Any = channel.unary_unary(UNARY)(b"abort ABORTED no", timeout=5)
        with pytest.raises(AioFailure) as caught:
            await call
        error: Any = caught.value
        assert error.explain() == call.explain()
        assert [attempt.code for attempt in error.explain().attempts] == ["ABORTED"]


# -- states


def test_nothing_connects_before_it_is_asked_to(target: str) -> None:
    seen: list[State] = []
    with insecure_channel(target) as channel:
        channel.subscribe(seen.append)
        eventually(lambda: seen == [State.IDLE])
        channel.subscribe(seen.append, try_to_connect=True)
        eventually(lambda: State.READY in seen)
        channel.unsubscribe(seen.append)
        assert State.TRANSIENT_FAILURE not in seen


def test_grpcs_ready_future_holds(target: str) -> None:
    called = threading.Event()
    with insecure_channel(target) as channel:
        ready = grpc.channel_ready_future(channel)
        ready.add_done_callback(lambda _: called.set())
        assert ready.result(timeout=5) is None
        assert called.wait(5)
        assert ready.done()


def test_a_channel_to_nowhere_is_never_ready() -> None:
    with insecure_channel(UNREACHABLE) as channel:
        seen: list[State] = []
        channel.subscribe(seen.append, try_to_connect=True)
        eventually(lambda: State.TRANSIENT_FAILURE in seen)
        ready = grpc.channel_ready_future(channel)
        with pytest.raises(grpc.FutureTimeoutError):
            ready.result(timeout=0.01)
        assert ready.cancel()
        assert State.READY not in seen


def test_a_subscribers_error_keeps_no_other_from_its_news(server: Server) -> None:
    seen: list[State] = []

    def broken(_: State) -> None:
        raise RuntimeError("a subscriber's own fault")

    with insecure_channel(f"static:///{server.address}") as channel:
        channel.subscribe(broken)
        channel.subscribe(seen.append, try_to_connect=True)
        eventually(lambda: State.READY in seen)


async def test_the_states_of_an_aio_channel(target: str) -> None:
    channel = aio_insecure_channel(target)
    assert channel.get_state() is State.IDLE
    assert channel.get_state(try_to_connect=True) is State.IDLE
    await asyncio.wait_for(channel.channel_ready(), 5)
    assert channel.get_state() is State.READY
    change = asyncio.ensure_future(channel.wait_for_state_change(State.READY))
    await asyncio.sleep(0)
    await channel.close()
    await asyncio.wait_for(change, 5)
    assert channel.get_state() is State.SHUTDOWN
    assert channel.get_state(try_to_connect=True) is State.SHUTDOWN
    with pytest.raises(grpc.aio.UsageError):
        await channel.wait_for_state_change(State.SHUTDOWN)


async def test_an_aio_channel_to_nowhere() -> None:
    async with aio_insecure_channel(UNREACHABLE) as channel:
        state = channel.get_state(try_to_connect=True)
        while state is not State.TRANSIENT_FAILURE:
            await asyncio.wait_for(channel.wait_for_state_change(state), 5)
            state = channel.get_state()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(channel.channel_ready(), 0.01)


# -- calls that nobody can take


def test_nobody_listens(server: Server) -> None:
    with insecure_channel(UNREACHABLE) as channel:
        unary = channel.unary_unary(UNARY)
        with pytest.raises(Failure) as caught:
            unary(b"ok", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert UNREACHABLE in caught.value.details()
        with pytest.raises(Failure) as caught:
            unary(b"ok", timeout=0.05, wait_for_ready=True)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        waiting = unary.future(b"ok", wait_for_ready=True)
        assert waiting.running()
        assert waiting.cancel()
        with pytest.raises(grpc.FutureCancelledError):
            waiting.result(5)


async def test_nobody_listens_in_asyncio() -> None:
    async with aio_insecure_channel(UNREACHABLE) as channel:
        unary = channel.unary_unary(UNARY)
        with pytest.raises(AioFailure) as caught:
            await unary(b"ok", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(AioFailure) as caught:
            await unary(b"ok", timeout=0.05, wait_for_ready=True)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        waiting = unary(b"ok", wait_for_ready=True)
        assert waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


RETRY = {
    "maxAttempts": 2,
    "initialBackoff": "60s",
    "maxBackoff": "60s",
    "backoffMultiplier": 1,
    "retryableStatusCodes": ["ABORTED"],
}
BACKOFF = "grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": RETRY}]})


def test_cancelled_in_backoff(server: Server) -> None:
    with insecure_channel(f"static:///{server.address}", options=[BACKOFF]) as channel:
        call: Any = channel.unary_unary(UNARY).future(b"abort ABORTED no", timeout=120)
        eventually(lambda: [attempt.code for attempt in call.explain().attempts] == ["ABORTED"])
        assert call.running()
        assert call.cancel()
        with pytest.raises(grpc.FutureCancelledError):
            call.result(5)
        assert call.code() is grpc.StatusCode.CANCELLED
        assert in_flight(channel) == 0


async def test_cancelled_in_backoff_in_asyncio(server: Server) -> None:
    async with aio_insecure_channel(f"static:///{server.address}", options=[BACKOFF]) as channel:
        call: Any = channel.unary_unary(UNARY)(b"abort ABORTED no", timeout=120)
        await eventually_aio(lambda: [attempt.code for attempt in call.explain().attempts] == ["ABORTED"])
        assert call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await call.code() is grpc.StatusCode.CANCELLED


# -- closing


def test_a_closed_channel_takes_no_calls(target: str) -> None:
    channel = insecure_channel(target)
    unary, stream = channel.unary_unary(UNARY), channel.unary_stream(RESPONSES)
    assert unary(b"ok", timeout=5) == b"ok"
    channel.close()
    channel.close()
    for call in (unary, unary.with_call, unary.future, stream):
        with pytest.raises(ValueError, match="closed channel"):
            call(b"ok", timeout=5)


def blocking(outcomes: list[Any], call: Callable[[], Any]) -> threading.Thread:
    def run() -> None:
        try:
            outcomes.append(call())
        except grpc.RpcError as error:
            outcomes.append((error.code(), error.details()))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_closing_cancels_what_is_in_flight(target: str, servers: list[Server]) -> None:
    with insecure_channel(target) as channel:
        outcomes: list[Any] = []
        future = channel.unary_unary(UNARY).future(b"hang", timeout=30)
        stream: Any = channel.unary_stream(RESPONSES)(b"count 1 hang", timeout=30)
        assert next(stream) == b"0"
        thread = blocking(outcomes, lambda: channel.unary_unary(UNARY)(b"hang", timeout=30))
        eventually(lambda: sum(server.in_flight for server in servers) == 3)
    thread.join(5)
    assert outcomes == [(grpc.StatusCode.CANCELLED, "Channel closed!")]
    assert future.code() is grpc.StatusCode.CANCELLED
    assert future.details() == "Channel closed!"
    assert stream.code() is grpc.StatusCode.CANCELLED
    with pytest.raises(grpc.RpcError):
        next(stream)
    for server in servers:
        server.wait_until_idle()


def test_closing_ends_calls_that_wait(server: Server) -> None:
    outcomes: list[Any] = []
    channel = insecure_channel(UNREACHABLE)
    queued = blocking(outcomes, lambda: channel.unary_unary(UNARY)(b"ok", wait_for_ready=True))
    eventually(lambda: bool(channel.assembly.pool._waiting))
    channel.close()
    queued.join(5)
    channel = insecure_channel(f"static:///{server.address}", options=[BACKOFF])
    backing_off = blocking(outcomes, lambda: channel.unary_unary(UNARY)(b"abort ABORTED no", timeout=120))
    eventually(lambda: bool(server.seen) and bool(channel.assembly.pool._waiting))
    channel.close()
    backing_off.join(5)
    assert outcomes == [(grpc.StatusCode.CANCELLED, "Channel closed!")] * 2


async def test_closing_an_aio_channel_cancels_what_is_in_flight(target: str, servers: list[Server]) -> None:
    channel = aio_insecure_channel(target)
    unary = channel.unary_unary(UNARY)(b"hang", timeout=30)
    stream: Any = channel.stream_stream(BOTH)(timeout=30)
    await stream.write(b"count 1 hang")
    assert await stream.read() == b"0"
    await channel.close()
    for call in (unary, stream):
        assert call.cancelled()
        assert await call.code() is grpc.StatusCode.CANCELLED
    with pytest.raises(grpc.aio.UsageError, match="closed"):
        channel.unary_unary(UNARY)(b"ok")
    for server in servers:
        server.wait_until_idle()


async def test_closing_with_grace_lets_calls_end(server: Server) -> None:
    channel = aio_insecure_channel(f"static:///{server.address}")
    stream: Any = channel.stream_stream(BOTH)(timeout=30)
    await stream.write(b"ok 1")
    assert await stream.read() == b"ok 1"
    closing = asyncio.ensure_future(channel.close(grace=30))
    await asyncio.sleep(0)
    with pytest.raises(grpc.aio.UsageError):
        channel.unary_unary(UNARY)(b"ok")
    await stream.write(b"ok 2")
    assert await stream.read() == b"ok 2"
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    await asyncio.wait_for(closing, 5)
    assert await stream.code() is grpc.StatusCode.OK


async def test_closing_with_little_grace_cancels_the_rest(server: Server) -> None:
    channel = aio_insecure_channel(f"static:///{server.address}")
    call = channel.unary_unary(UNARY)(b"hang", timeout=30)
    await asyncio.wait_for(channel.close(grace=0.02), 5)
    assert await call.code() is grpc.StatusCode.CANCELLED
    with pytest.raises(ValueError, match="grace"):
        await aio_insecure_channel(server.address).close(grace=-1)


# -- calls that are dropped


def test_a_call_that_is_dropped_is_cancelled(target: str, servers: list[Server]) -> None:
    with insecure_channel(target) as channel:
        stream: Any = channel.unary_stream(RESPONSES)(b"count 1 hang", timeout=30)
        assert next(stream) == b"0"
        future = channel.unary_unary(UNARY).future(b"hang", timeout=30)
        eventually(lambda: sum(server.in_flight for server in servers) == 2)
        del stream, future
        gc.collect()
        for server in servers:
            server.wait_until_idle()
        eventually(lambda: in_flight(channel) == 0)


async def test_an_aio_call_that_is_dropped_is_cancelled(target: str, servers: list[Server]) -> None:
    async with aio_insecure_channel(target) as channel:
        stream: Any = channel.unary_stream(RESPONSES)(b"count 1 hang", timeout=30)
        assert await stream.read() == b"0"
        del stream
        gc.collect()
        await eventually_aio(lambda: all(server.in_flight == 0 for server in servers))
        await eventually_aio(lambda: in_flight(channel) == 0)


def test_a_channel_that_is_dropped_closes(server: Server) -> None:
    channel = insecure_channel(f"static:///{server.address}")
    unary = channel.unary_unary(UNARY)
    pool: Any = channel.assembly.pool
    del channel
    gc.collect()
    assert unary(b"ok", timeout=5) == b"ok"  # a multicallable keeps its channel
    del unary
    gc.collect()
    eventually(lambda: pool.closed and not pool._subchannels)


def test_every_ending_gives_back_its_place(server: Server) -> None:
    def forever() -> Iterator[bytes]:
        while True:
            yield b"."

    def broken() -> Iterator[bytes]:
        yield b"."
        raise RuntimeError("no more")

    with insecure_channel(f"static:///{server.address}") as channel:
        unary, stream = channel.unary_unary(UNARY), channel.unary_stream(RESPONSES)
        for command in (b"ok", b"raise", b"abort INTERNAL no"):
            unary.future(command, timeout=5).exception(5)
            list_until_error(stream(command, timeout=5))
        list_until_error(stream(b"hang", timeout=0.02))
        half_read: Any = stream(b"count 5", timeout=5)
        next(half_read)
        half_read.cancel()
        never_started: Any = stream(b"hang", timeout=5)
        never_started.cancel()
        list_until_error(channel.stream_stream(BOTH)(broken(), timeout=5))
        channel.stream_unary(REQUESTS).future(forever(), timeout=0.02).code()
        eventually(lambda: in_flight(channel) == 0)


def list_until_error(call: Any) -> None:
    try:
        list(call)
    except grpc.RpcError:
        pass


# -- credentials


@pytest.fixture
def local_server(tmp_path: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server on a socket that only this machine reaches, which is secure enough for call credentials."""
    from concurrent import futures

    seen: list[dict[str, Any]] = []

    def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
        seen.append(dict(context.invocation_metadata()))
        return request

    server = grpc.server(futures.ThreadPoolExecutor(2))
    handlers: dict[str, Any] = {"Unary": grpc.unary_unary_rpc_method_handler(handle)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("suite.Suite", handlers),))
    address = f"unix:{tmp_path}/socket"
    server.add_secure_port(address, grpc.local_server_credentials(grpc.LocalConnectionType.UDS))
    server.start()
    yield address, seen
    server.stop(0).wait()


def test_call_credentials(local_server: tuple[str, list[dict[str, Any]]]) -> None:
    address, seen = local_server
    local = grpc.local_channel_credentials(grpc.LocalConnectionType.UDS)
    for target in (address, f"static:///{address}"):
        with secure_channel(target, local) as channel:
            unary = channel.unary_unary(UNARY)
            token = grpc.access_token_call_credentials("of the call")
            assert unary(b"ok", timeout=5, credentials=token) == b"ok"
            assert seen[-1]["authorization"] == "Bearer of the call"
            assert unary.future(b"ok", timeout=5, credentials=token).result() == b"ok"
            assert seen[-1]["authorization"] == "Bearer of the call"
        both = grpc.composite_channel_credentials(local, grpc.access_token_call_credentials("of the channel"))
        with secure_channel(target, both) as channel:
            assert channel.unary_unary(UNARY)(b"ok", timeout=5) == b"ok"
            assert seen[-1]["authorization"] == "Bearer of the channel"


async def test_call_credentials_in_asyncio(local_server: tuple[str, list[dict[str, Any]]]) -> None:
    address, seen = local_server
    local = grpc.local_channel_credentials(grpc.LocalConnectionType.UDS)
    for target in (address, f"static:///{address}"):
        async with aio_secure_channel(target, local) as channel:
            token = grpc.access_token_call_credentials("of the call")
            assert await channel.unary_unary(UNARY)(b"ok", timeout=5, credentials=token) == b"ok"
            assert seen[-1]["authorization"] == "Bearer of the call"


# -- aio interceptors


class Marks(
    grpc.aio.UnaryUnaryClientInterceptor,
    grpc.aio.UnaryStreamClientInterceptor,
    grpc.aio.StreamUnaryClientInterceptor,
    grpc.aio.StreamStreamClientInterceptor,
):
    """One interceptor of all four kinds, of which grpc's own channel would take the first alone."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self._name = name
        self._seen = seen

    async def _intercept(self, continuation: Any, details: Any, request: Any) -> Any:
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        self._seen.append(f"{self._name} {method.rpartition('/')[2]}")
        return await continuation(details, request)

    intercept_unary_unary = intercept_unary_stream = _intercept  # type: ignore[assignment]
    intercept_stream_unary = intercept_stream_stream = _intercept  # type: ignore[assignment]


async def requests(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def test_aio_interceptors_of_all_kinds_in_one(target: str) -> None:
    seen: list[str] = []
    interceptors: Any = [Marks("outer", seen), Marks("inner", seen)]
    async with aio_insecure_channel(target, interceptors=interceptors) as channel:
        assert await channel.unary_unary(UNARY)(b"ok", timeout=5) == b"ok"
        assert [message async for message in channel.unary_stream(RESPONSES)(b"count 2", timeout=5)] == [b"0", b"1"]
        assert await channel.stream_unary(REQUESTS)(requests(b"ok"), timeout=5) == b"1 ok"
        call: Any = channel.stream_stream(BOTH)(timeout=5)
        await call.write(b"ok")
        await call.done_writing()
        assert [message async for message in call] == [b"ok"]
        with pytest.raises(AioFailure) as caught:
            await channel.unary_unary(UNARY)(b"abort ABORTED no", timeout=5)
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert caught.value.explain().code == "ABORTED"
    kinds = ["Unary", "Responses", "Requests", "Both", "Unary"]
    assert seen == [f"{name} {kind}" for kind in kinds for name in ("outer", "inner")]


async def test_closing_cancels_calls_that_are_with_an_interceptor(server: Server) -> None:
    class Stuck(grpc.aio.UnaryUnaryClientInterceptor):
        async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
            await asyncio.get_running_loop().create_future()

    channel = aio_insecure_channel(f"static:///{server.address}", interceptors=[Stuck()])
    call = channel.unary_unary(UNARY)(b"ok")
    await asyncio.sleep(0)
    await channel.close()
    assert call.cancelled()


def test_only_interceptors_intercept() -> None:
    wrong: Any = [object()]
    with pytest.raises(ValueError, match="must be UnaryUnaryClientInterceptor or"):
        aio_insecure_channel("static:///127.0.0.1:1", interceptors=wrong)


# -- options


@pytest.mark.parametrize("options", [(("key",),), "str", {"foo": "bar"}])
def test_options_that_are_no_pairs(options: Any) -> None:
    for make in (insecure_channel, aio_insecure_channel):
        with pytest.raises(ValueError, match="unpack"):
            make("static:///127.0.0.1:1", options=options)


def test_options_that_core_would_refuse_later() -> None:
    for value, error in ((object(), TypeError), (None, TypeError), (2**40, OverflowError)):
        with pytest.raises(error, match="some_option"):
            insecure_channel("static:///127.0.0.1:1", options=[("grpc.some_option", value)])


def test_options_reach_the_endpoints(target: str) -> None:
    options: Any = [("grpc.max_receive_message_length", 100), (b"grpc.primary_user_agent", "theirs")]
    with insecure_channel(target, options=options) as channel:
        assert len(channel.unary_unary(UNARY)(b"size 50", timeout=5)) == 50
        with pytest.raises(Failure) as caught:
            channel.unary_unary(UNARY)(b"size 200", timeout=5)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_compression_of_the_whole_channel(target: str) -> None:
    with insecure_channel(target, compression=grpc.Compression.Gzip) as channel:
        message = b"ok" * 1000
        assert channel.unary_unary(UNARY)(message, timeout=5) == message
        assert list(channel.stream_stream(BOTH)(iter([message]), timeout=5)) == [message]


def test_single_threaded_unary_streams(target: str) -> None:
    from grpc import experimental

    options = [(experimental.ChannelOptions.SingleThreadedUnaryStream, 1)]
    with insecure_channel(target, options=options) as channel:
        call: Any = channel.unary_stream(RESPONSES)(b"count 3", timeout=5, metadata=(("x-one", "1"),))
        assert ("x-one", "1") in call.initial_metadata()
        assert list(call) == [b"0", b"1", b"2"]
        assert call.code() is grpc.StatusCode.OK
        failing = channel.unary_stream(RESPONSES)(b"count 1 abort ABORTED no", timeout=5)
        assert next(failing) == b"0"
        with pytest.raises(Failure) as caught:
            next(failing)
        assert caught.value.code() is grpc.StatusCode.ABORTED
        hanging: Any = channel.unary_stream(RESPONSES)(b"count 1 hang", timeout=5)
        assert next(hanging) == b"0"
        hanging.cancel()
        with pytest.raises(grpc.RpcError):
            next(hanging)
