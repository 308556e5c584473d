"""What ``grpc.aio.Channel`` shows of a call, a mesh channel shows, too: each scenario runs over both, and what it saw
is compared."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh.aio
from tests.channel.suite import BOTH, REQUESTS, RESPONSES, UNARY, Server, own

Scenario = Callable[[Any], Awaitable[object]]

SCENARIOS: dict[str, Scenario] = {}

X = (("x-one", "1"), ("x-two-bin", b"\x00\xff"))
TIMEOUT = 5
EOF = grpc.aio.EOF


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def error(error: Any) -> Any:
    """What an error shows."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return type(error)
    assert isinstance(error.debug_error_string(), str)
    text = re.sub(r"(?<=\n>) The call went to endpoint \S+\.$", "", str(error))  # the mesh's own
    lines = [line for line in text.splitlines() if "debug_error_string" not in line]
    return [
        isinstance(error, grpc.RpcError),
        error.code(),
        error.details(),
        own(error.trailing_metadata()),
        type(error.trailing_metadata()),
        *lines,
    ]


async def outcome(awaitable: Any) -> Any:
    """What comes of awaiting, or is raised."""
    try:
        return await awaitable
    except BaseException as raised:
        return "raised", error(raised)


async def waiting(awaitable: Any) -> asyncio.Task[Any]:
    """A task that awaits its outcome, and does so by now."""
    begun = asyncio.Event()

    async def wait() -> Any:
        begun.set()
        return await outcome(awaitable)

    task = asyncio.create_task(wait())
    await begun.wait()
    return task


def refused(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call that can't even be made raises."""
    try:
        return function(*args, **kwargs)
    except BaseException as raised:
        return error(raised)


async def ending(call: Any) -> Any:
    """What a call shows that is over, or is waited for to be."""
    return [
        await call.code(),
        await call.details(),
        own(await call.initial_metadata()),
        own(await call.trailing_metadata()),
        type(await call.initial_metadata()),
        type(await call.trailing_metadata()),
        call.done(),
        call.cancelled(),
    ]


async def read(call: Any) -> Any:
    """All responses, and how they end."""
    messages = []
    try:
        async for message in call:
            messages.append(message)  # noqa: PERF401
    except BaseException as raised:
        return messages, error(raised)
    return messages, "end"


def without_texts(seen: Any) -> Any:
    """``seen`` without its strings."""
    if isinstance(seen, list | tuple):
        return [without_texts(item) for item in seen if not isinstance(item, str)]
    return seen


async def asynchronously(*requests: bytes) -> AsyncIterator[bytes]:
    for request in requests:
        yield request


# -- one request, one response


@scenario
async def a_response(channel: Any) -> object:
    call = channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT, metadata=X)
    seen = [call.done(), call.cancelled(), 4 < call.time_remaining() <= TIMEOUT, await call, await call]
    return [*seen, await ending(call), call.cancel()]


@scenario
async def metadata_as_grpc_has_it(channel: Any) -> object:
    call = channel.unary_unary(UNARY)(b"ok", metadata=grpc.aio.Metadata(*X), timeout=TIMEOUT)
    initial = await call.initial_metadata()
    return [initial["x-one"], initial["x-two-bin"], own(await call.trailing_metadata())]


@scenario
async def an_abort(channel: Any) -> object:
    call = channel.unary_unary(UNARY)("abort NOT_FOUND no such thing é".encode(), timeout=TIMEOUT, metadata=X)
    return [await outcome(call), await outcome(call), await ending(call)]


@scenario
async def every_status(channel: Any) -> object:
    unary = channel.unary_unary(UNARY)
    return [
        await outcome(unary(f"{way} {code.name} details".encode(), timeout=TIMEOUT))
        for code in grpc.StatusCode
        if code is not grpc.StatusCode.OK
        for way in ("abort", "status")
    ]


@scenario
async def nobody_awaits_it(channel: Any) -> object:
    calls = [channel.unary_unary(UNARY)(command, timeout=TIMEOUT) for command in (b"ok", b"abort ABORTED no")]
    return [await ending(call) for call in calls]


@scenario
async def awaited_by_several(channel: Any) -> object:
    call = channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT)

    async def wait() -> Any:
        return await call

    return await asyncio.gather(wait(), wait(), call.code())


@scenario
async def a_method_that_is_not_there(channel: Any) -> object:
    path = "/suite.Suite/Nothing"
    return [
        await outcome(channel.unary_unary(path)(b"", timeout=TIMEOUT)),
        await read(channel.unary_stream(path)(b"", timeout=TIMEOUT)),
    ]


@scenario
async def the_deadline(channel: Any) -> object:
    await channel.unary_unary(UNARY)(b"ok", wait_for_ready=True)
    seen = [
        await outcome(channel.unary_unary(UNARY)(b"hang", timeout=0.1)),
        await read(channel.unary_stream(RESPONSES)(b"count 2 hang", timeout=0.3)),
        await outcome(channel.stream_unary(REQUESTS)(asynchronously(b"hang"), timeout=0.1)),
        await read(channel.stream_stream(BOTH)(asynchronously(b"count 2 hang"), timeout=0.3)),
    ]
    return without_texts(seen)  # core itself has several for this


@scenario
async def no_deadline_no_time_remaining(channel: Any) -> object:
    call = channel.unary_unary(UNARY)(b"ok")
    return [call.time_remaining(), await call]


@scenario
async def cancelled_at_once(channel: Any) -> object:
    call = channel.unary_unary(UNARY)(b"hang", timeout=TIMEOUT)
    seen = [call.cancel(), call.cancelled(), call.done(), call.cancel()]
    return [*seen, await outcome(call), await ending(call)]


@scenario
async def cancelled_in_flight(channel: Any) -> object:
    seen: list[object] = []
    unary = channel.unary_unary(UNARY)(b"hang", timeout=TIMEOUT)
    stream = channel.stream_unary(REQUESTS)(asynchronously(b"hang"), timeout=TIMEOUT)
    await stream.wait_for_connection()
    for call in (unary, stream):
        awaited = await waiting(call)
        seen += [call.cancel(), await awaited, await ending(call)]
    return seen


@scenario
async def its_task_cancelled(channel: Any) -> object:
    call = channel.unary_unary(UNARY)(b"hang", timeout=TIMEOUT)
    task = await waiting(call)
    assert await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT) == b"ok"  # the first has left before this one
    task.cancel()
    return [await task, call.cancelled(), await call.code(), await call.details()]


@scenario
async def in_a_timeout(channel: Any) -> object:
    call = channel.unary_unary(UNARY)(b"hang")
    return [await outcome(asyncio.wait_for(call, 0.05)), call.cancelled(), await call.code()]


@scenario
async def cancelled_after_the_end(channel: Any) -> object:
    seen: list[object] = []
    for command in (b"ok", b"abort ABORTED no"):
        call = channel.unary_unary(UNARY)(command, timeout=TIMEOUT)
        await call.code()
        seen += [call.cancel(), call.cancelled(), await call.code()]
    return seen


@scenario
async def done_callbacks(channel: Any) -> object:
    seen: list[object] = []
    for command in (b"ok", b"abort ABORTED no", b"hang"):
        call: Any = channel.unary_unary(UNARY)(command, timeout=TIMEOUT)
        called = asyncio.Event()

        def note(done: Any, call: Any = call, called: asyncio.Event = called) -> None:
            seen.append((done is call, done.done(), done.cancelled()))
            called.set()

        call.add_done_callback(note)
        if command == b"hang":
            call.cancel()
        await asyncio.wait_for(called.wait(), 5)
        call.add_done_callback(note)
        seen.append(len(seen))
    return seen


@scenario
async def a_request_that_cannot_be_serialised(channel: Any) -> object:
    def refuse(_: object) -> bytes:
        raise ValueError("unserialisable")

    # (grpc logs it, and sends an empty message.)
    return [
        await outcome(channel.unary_unary(UNARY, refuse)(b"ok", timeout=TIMEOUT)),
        await outcome(channel.stream_unary(REQUESTS, refuse)(asynchronously(b"ok"), timeout=TIMEOUT)),
    ]


@scenario
async def a_response_that_cannot_be_parsed(channel: Any) -> object:
    def refuse(_: bytes) -> object:
        raise ValueError("unparseable")

    return [
        without_texts(await outcome(channel.unary_unary(UNARY, None, refuse)(b"ok", timeout=TIMEOUT))),
        await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT),
    ]


@scenario
async def messages_of_their_own_types(channel: Any) -> object:
    def parse(data: bytes) -> tuple[bytes]:
        return (data,)

    arguments = (str.encode, parse)
    return [
        await channel.unary_unary(UNARY, *arguments)("ok", timeout=TIMEOUT),
        await read(channel.unary_stream(RESPONSES, *arguments)("count 2", timeout=TIMEOUT)),
        await channel.stream_unary(REQUESTS, *arguments)(iter([".", "ok"]), timeout=TIMEOUT),
        await read(channel.stream_stream(BOTH, *arguments)(["ok", "count 1"], timeout=TIMEOUT)),
    ]


@scenario
async def empty_and_large_messages(channel: Any) -> object:
    unary = channel.unary_unary(UNARY)
    return [
        await unary(b"", timeout=TIMEOUT),
        len(await unary(b"size 3000000", timeout=TIMEOUT)),
        len(await unary(b"ok " + bytes(3_000_000), timeout=TIMEOUT)),
        await outcome(unary(b"size 5000000", timeout=TIMEOUT)),
    ]


@scenario
async def compressed(channel: Any) -> object:
    unary = channel.unary_unary(UNARY)
    stream = channel.stream_stream(BOTH)
    return [
        await unary(b"ok" * 1000, timeout=TIMEOUT, compression=grpc.Compression.Gzip),
        await read(stream(iter([b"ok", b"ok"]), timeout=TIMEOUT, compression=grpc.Compression.Deflate)),
    ]


@scenario
async def metadata_of_wrong_types(channel: Any) -> object:
    async def call(metadata: Any) -> Any:
        return await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT, metadata=metadata)

    wrong: list[Any] = [((1, "v"),), (("k", 1),), (("k-bin", "text"),), 42, (("k", object()),)]
    return [await outcome(call(metadata)) for metadata in wrong]


@scenario
async def credentials_without_a_secure_channel(channel: Any) -> object:
    credentials = grpc.access_token_call_credentials("token")
    return refused(channel.unary_unary(UNARY), b"ok", credentials=credentials)


@scenario
async def waiting_for_ready(channel: Any) -> object:
    unary = channel.unary_unary(UNARY)
    return [await unary(b"ok", timeout=TIMEOUT, wait_for_ready=wait) for wait in (True, False, None)]


@scenario
async def waiting_for_the_connection(channel: Any) -> object:
    calls = [
        channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT),
        channel.unary_stream(RESPONSES)(b"count 1", timeout=TIMEOUT),
        channel.stream_unary(REQUESTS)(asynchronously(b"ok"), timeout=TIMEOUT),
        channel.stream_stream(BOTH)(asynchronously(b"ok"), timeout=TIMEOUT),
    ]
    seen = [await call.wait_for_connection() for call in calls]
    return [*seen, await calls[0], await read(calls[1]), await calls[2], await read(calls[3])]


# -- streamed responses


@scenario
async def responses_to_their_end(channel: Any) -> object:
    stream = channel.unary_stream(RESPONSES)
    call = stream(b"count 3", timeout=TIMEOUT, metadata=X)
    seen = [own(await call.initial_metadata()), call.done(), await read(call), await ending(call)]
    return [*seen, await read(stream(b"count 0", timeout=TIMEOUT))]


@scenario
async def responses_read_one_by_one(channel: Any) -> object:
    call = channel.unary_stream(RESPONSES)(b"count 2", timeout=TIMEOUT)
    seen = [await call.read() for _ in range(4)]
    return [[message if message is not EOF else "EOF" for message in seen], await ending(call)]


@scenario
async def responses_then_an_error(channel: Any) -> object:
    seen: list[object] = []
    for count in (0, 2):
        command = b"count %d abort ABORTED now" % count
        call = channel.unary_stream(RESPONSES)(command, timeout=TIMEOUT)
        seen += [await read(call), await ending(call), await outcome(call.read())]
        call = channel.unary_stream(RESPONSES)(command, timeout=TIMEOUT)
        seen += [await outcome(call.read()) for _ in range(count + 2)]
    return seen


@scenario
async def iterated_and_read(channel: Any) -> object:
    call = channel.unary_stream(RESPONSES)(b"count 3", timeout=TIMEOUT)
    seen = [await call.read(), refused(aiter, call), await call.read()]
    call = channel.unary_stream(RESPONSES)(b"count 3 hang", timeout=TIMEOUT)
    seen += [await anext(aiter(call)), await outcome(call.read()), await anext(aiter(call)), call.cancel()]
    return seen


@scenario
async def responses_cancelled(channel: Any) -> object:
    call = channel.unary_stream(RESPONSES)(b"count 2 hang", timeout=TIMEOUT)
    seen = [await call.read(), call.done(), call.cancel(), call.cancelled(), await outcome(call.read())]
    return [*seen, await ending(call), call.cancel()]


@scenario
async def responses_cancelled_before_any(channel: Any) -> object:
    call = channel.unary_stream(RESPONSES)(b"hang", timeout=TIMEOUT)
    return [call.cancel(), await outcome(call.read()), await ending(call)]


@scenario
async def responses_cancelled_while_waited_for(channel: Any) -> object:
    seen = []
    takes: list[Callable[[Any], Any]] = [lambda call: call.read(), lambda call: anext(aiter(call))]
    for take in takes:
        call = channel.unary_stream(RESPONSES)(b"count 1 hang", timeout=TIMEOUT)
        await take(call)
        reading = await waiting(take(call))
        seen += [call.cancel(), await reading, await call.code()]
    return seen


@scenario
async def the_reader_cancelled(channel: Any) -> object:
    call = channel.unary_stream(RESPONSES)(b"hang", timeout=TIMEOUT, metadata=X)
    await call.initial_metadata()  # it is at the server
    task = await waiting(call.read())
    task.cancel()
    return [await task, call.cancelled(), await call.code()]


# -- streamed requests


@scenario
async def requests(channel: Any) -> object:
    stream = channel.stream_unary(REQUESTS)
    seen: list[Any] = []
    for source in (asynchronously(b".", b".", b"ok"), iter([b".", b"ok"]), [b"ok"], asynchronously(), []):
        call = stream(source, timeout=TIMEOUT, metadata=X)
        seen += [await call, await ending(call)]
    return [*seen, await outcome(stream(asynchronously(b"abort ABORTED now"), timeout=TIMEOUT, metadata=X))]


@scenario
async def requests_written(channel: Any) -> object:
    call = channel.stream_unary(REQUESTS)(timeout=TIMEOUT, metadata=X)
    seen: list[Any] = [await call.write(b"."), await call.write(b"ok"), await call.done_writing()]
    seen += [await call.done_writing(), await outcome(call.write(b".")), await call, await ending(call)]
    return [*seen, await outcome(call.write(b".")), await outcome(call.done_writing())]


@scenario
async def requests_written_and_iterated(channel: Any) -> object:
    call = channel.stream_unary(REQUESTS)(asynchronously(b"ok"), timeout=TIMEOUT)
    return [await outcome(call.write(b".")), await outcome(call.done_writing()), await call]


@scenario
async def written_to_a_call_that_has_failed(channel: Any) -> object:
    call = channel.stream_unary(REQUESTS)(timeout=TIMEOUT)
    await call.write(b"abort ABORTED now")
    return [await call.code(), await outcome(call.write(b".")), await outcome(call.done_writing()), await outcome(call)]


@scenario
async def requests_that_never_end(channel: Any) -> object:
    async def forever() -> AsyncIterator[bytes]:
        for request in itertools.chain([b"."] * 10, itertools.repeat(b"abort ABORTED enough")):
            yield request
            await asyncio.sleep(0)

    # A short deadline: grpc.aio waits for it before it lets go of such a call.
    # grpc may be told by a failed write sooner than by the status, and then says INTERNAL.
    calls = [channel.stream_unary(REQUESTS)(forever(), timeout=2)]
    calls.append(channel.stream_stream(BOTH)(forever(), timeout=2))
    return [await call.code() in (grpc.StatusCode.ABORTED, grpc.StatusCode.INTERNAL) for call in calls]


@scenario
async def requests_that_raise(channel: Any) -> object:
    async def broken() -> AsyncIterator[bytes]:
        yield b"."
        raise RuntimeError("no more")

    def also_broken() -> Iterator[bytes]:
        yield b"."
        raise RuntimeError("no more")

    seen: list[Any] = []
    for source in (broken, also_broken):
        call = channel.stream_unary(REQUESTS)(source(), timeout=TIMEOUT)
        seen += [await outcome(call), await call.code(), call.cancelled()]
        call = channel.stream_stream(BOTH)(source(), timeout=TIMEOUT)
        seen += [(await read(call))[-1], await call.code(), call.cancelled()]
    return seen


@scenario
async def requests_that_are_cancelled_with_the_call(channel: Any) -> object:
    asked, cancelled = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"."
        asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    call = channel.stream_unary(REQUESTS)(slow(), timeout=TIMEOUT)
    await asyncio.wait_for(asked.wait(), TIMEOUT)
    seen = [call.cancel(), await outcome(call)]
    return [*seen, await asyncio.wait_for(cancelled.wait(), 5)]


@scenario
async def a_conversation(channel: Any) -> object:
    call = channel.stream_stream(BOTH)(timeout=TIMEOUT, metadata=X)
    seen: list[Any] = []
    for index in range(5):
        seen += [await call.write(b"ok %d" % index), await call.read()]
    seen += [await call.done_writing(), await call.read() is EOF, await ending(call)]
    return [*seen, await outcome(call.write(b".")), await call.read() is EOF]


@scenario
async def a_conversation_cut_short(channel: Any) -> object:
    call = channel.stream_stream(BOTH)(timeout=TIMEOUT)
    seen: list[Any] = [await call.write(b"ok"), await call.read(), call.cancel()]
    return [*seen, await outcome(call.write(b"ok")), await outcome(call.read()), await ending(call)]


@scenario
async def a_conversation_the_server_ends(channel: Any) -> object:
    call = channel.stream_stream(BOTH)(timeout=TIMEOUT)
    seen: list[Any] = [await call.write(b"ok"), await call.read(), await call.write(b"abort ABORTED enough")]
    seen += [await outcome(call.read()), await call.code()]
    return [*seen, await outcome(call.write(b"ok")), await outcome(call.done_writing())]


@scenario
async def both_to_their_end(channel: Any) -> object:
    stream = channel.stream_stream(BOTH)
    call = stream(asynchronously(b"ok 1", b"count 2", b"ok 2"), timeout=TIMEOUT, metadata=X)
    seen = [await read(call), await ending(call)]
    nothing = stream(asynchronously(), timeout=TIMEOUT)
    return [*seen, await read(nothing), await read(stream([b"ok", b"abort ABORTED now"], timeout=TIMEOUT))]


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


@pytest.mark.parametrize("name", CASES)
async def test_an_aio_mesh_channel_shows_what_grpcs_own_does(name: str, target: str, server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        expected = await SCENARIOS[name](channel)
    async with mesh.aio.insecure_channel(target) as channel:
        seen = await SCENARIOS[name](channel)
    assert seen == expected
