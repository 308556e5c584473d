"""Functions that a program's instrumentation puts in the place of gRPC's, and mesh channels that take over what they
add. The forms are OpenTelemetry's, Sentry's and Datadog's; tests/instrumentation has the real ones."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest

import mesh
import mesh.aio
from mesh.channel.aio.channel import Channel as AioChannel
from mesh.channel.sync.channel import Channel as SyncChannel
from tests.channel.suite import BOTH, REQUESTS, RESPONSES, UNARY, Server
from tests.processes import eventually

Seen = list[tuple[str, str]]

TIMEOUT = 20.0


class Noted(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Notes the calls that go through it, with what it was made for."""

    def __init__(self, name: str, seen: Seen) -> None:
        self._name = name
        self._seen = seen

    def _intercept(self, continuation: Any, details: Any, request: Any) -> Any:
        self._seen.append((self._name, details.method))
        return continuation(details, request)

    intercept_unary_unary = intercept_unary_stream = _intercept  # type: ignore[assignment]
    intercept_stream_unary = intercept_stream_stream = _intercept  # type: ignore[assignment]


def aio_noted(name: str, seen: Seen) -> list[Any]:
    def note(details: Any) -> None:
        method = details.method
        seen.append((name, method.decode() if isinstance(method, bytes) else method))

    class UnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):
        async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
            note(details)
            return await continuation(details, request)

    class UnaryStream(grpc.aio.UnaryStreamClientInterceptor):
        async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
            note(details)
            return await continuation(details, request)

    class StreamUnary(grpc.aio.StreamUnaryClientInterceptor):
        async def intercept_stream_unary(self, continuation: Any, details: Any, requests: Any) -> Any:
            note(details)
            return await continuation(details, requests)

    class StreamStream(grpc.aio.StreamStreamClientInterceptor):
        async def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
            note(details)
            return await continuation(details, requests)

    return [UnaryUnary(), UnaryStream(), StreamUnary(), StreamStream()]


class Proxy:
    """A wrapper that has the attributes of what it wraps, as wrapt's."""

    def __init__(self, wrapped: Any, wrapper: Callable[..., Any]) -> None:
        self._wrapped = wrapped
        self._wrapper = wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(self._wrapped, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def instrument(patch: pytest.MonkeyPatch, name: str, seen: Seen, form: str) -> None:
    """Put interceptors around each channel that gRPC makes from now on, noting into ``seen`` as ``name``."""
    for function in ("insecure_channel", "secure_channel"):
        original, aio_original = getattr(grpc, function), getattr(grpc.aio, function)

        def sync(original: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            return grpc.intercept_channel(original(target, *args, **kwargs), Noted(f"{name} {target}", seen))

        def aio(original: Any, target: Any, *args: Any, interceptors: Any = None, **kwargs: Any) -> Any:
            added = [*aio_noted(f"{name} {target}", seen), *(interceptors or ())]
            return original(target, *args, interceptors=added, **kwargs)

        for module, old, wrapper in ((grpc, original, sync), (grpc.aio, aio_original, aio)):
            if form == "proxy":
                patch.setattr(module, function, Proxy(old, wrapper))
            else:
                patch.setattr(module, function, functools.wraps(old)(functools.partial(wrapper, old)))


@pytest.fixture
def seen() -> Seen:
    return []


@pytest.fixture(params=["proxy", "wraps"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


ONE_EACH = Counter([UNARY, RESPONSES, REQUESTS, BOTH])


def one_of_each(channel: Any) -> None:
    assert channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT) == b"ok"
    assert list(channel.unary_stream(RESPONSES)(b"ok", timeout=TIMEOUT)) == [b"ok"]
    assert channel.stream_unary(REQUESTS)(iter([b"ok"]), timeout=TIMEOUT) == b"1 ok"
    assert list(channel.stream_stream(BOTH)(iter([b"ok"]), timeout=TIMEOUT)) == [b"ok"]


async def aio_one_of_each(channel: Any) -> None:
    assert await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT) == b"ok"
    assert [each async for each in channel.unary_stream(RESPONSES)(b"ok", timeout=TIMEOUT)] == [b"ok"]
    assert await channel.stream_unary(REQUESTS)([b"ok"], timeout=TIMEOUT) == b"1 ok"
    assert [each async for each in channel.stream_stream(BOTH)([b"ok"], timeout=TIMEOUT)] == [b"ok"]


def test_each_call_goes_through_what_instrumentation_adds_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, seen: Seen, form: str
) -> None:
    target = f"static:///{server.address}"
    instrument(monkeypatch, "added", seen, form)
    with mesh.insecure_channel(target) as channel:
        assert isinstance(channel, SyncChannel)
        one_of_each(channel)
    # Made with the channel's own target, which some frameworks put into their spans.
    assert Counter(seen) == {(f"added {target}", method): 1 for method in ONE_EACH}


async def test_each_call_on_a_loop_goes_through_what_instrumentation_adds_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, seen: Seen, form: str
) -> None:
    target = f"static:///{server.address}"
    instrument(monkeypatch, "added", seen, form)
    own = aio_noted("own", seen)
    async with mesh.aio.insecure_channel(target, interceptors=own) as channel:
        assert isinstance(channel, AioChannel)
        await aio_one_of_each(channel)
    noted = (f"added {target}", "own")
    assert Counter(seen) == {(name, method): 1 for method in ONE_EACH for name in noted}
    # In the order that both frameworks keep: theirs around the program's.
    assert [name for name, method in seen if method == UNARY] == list(noted)


def test_an_asyncio_channel_that_is_instrumented_is_made_without_a_loop(
    monkeypatch: pytest.MonkeyPatch, seen: Seen, form: str
) -> None:
    instrument(monkeypatch, "added", seen, form)
    channel = mesh.aio.insecure_channel("static:///127.0.0.1:1")
    channel.unary_unary(UNARY)


def test_two_frameworks_stand_around_each_other(server: Server, monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    instrument(monkeypatch, "inner", seen, "proxy")
    instrument(monkeypatch, "outer", seen, "wraps")
    with mesh.insecure_channel(server.address) as channel:
        unary: Any = channel.unary_unary(UNARY)
        assert unary(b"ok", timeout=TIMEOUT) == b"ok"
    assert seen == [(f"outer {server.address}", UNARY), (f"inner {server.address}", UNARY)]


def test_a_secure_channel_is_instrumented_as_well(monkeypatch: pytest.MonkeyPatch, seen: Seen, form: str) -> None:
    instrument(monkeypatch, "added", seen, form)
    with mesh.secure_channel("static:///127.0.0.1:1", grpc.ssl_channel_credentials()) as channel:
        unary: Any = channel.unary_unary(UNARY)
        with pytest.raises(grpc.RpcError):
            unary(b"ok", timeout=TIMEOUT)
    assert seen == [("added static:///127.0.0.1:1", UNARY)]


def test_a_program_that_makes_the_meshs_function_grpcs_has_each_call_instrumented_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, seen: Seen, form: str
) -> None:
    target = f"static:///{server.address}"
    monkeypatch.setattr(grpc, "insecure_channel", mesh.insecure_channel)
    instrument(monkeypatch, "added", seen, form)
    with grpc.insecure_channel(target) as channel:
        one_of_each(channel)
    assert Counter(method for _, method in seen) == ONE_EACH


@pytest.mark.parametrize("module", [grpc, grpc.aio])
async def test_a_replacement_that_makes_no_grpc_channel_leaves_the_meshs_working(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, module: Any
) -> None:
    def broken(target: str, **kwargs: Any) -> Any:
        raise LookupError("not set up")

    monkeypatch.setattr(module, "insecure_channel", broken)
    if module is grpc:
        with mesh.insecure_channel(server.address) as channel:
            one_of_each(channel)
    else:
        async with mesh.aio.insecure_channel(server.address) as aio_channel:
            await aio_one_of_each(aio_channel)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{server.address}: calls are not instrumented")
    assert record.getMessage().endswith("broken adds (LookupError: not set up)")


def test_a_channel_that_a_replacement_shares_stays_open(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = grpc.insecure_channel(server.address)
    monkeypatch.setattr(grpc, "insecure_channel", lambda target: shared)
    with shared:
        with mesh.insecure_channel(server.address) as channel:
            one_of_each(channel)
        one_of_each(shared)


def test_a_channel_is_not_kept_by_what_stands_around_its_calls(
    server: Server, monkeypatch: pytest.MonkeyPatch, seen: Seen, form: str
) -> None:
    instrument(monkeypatch, "added", seen, form)
    channel = mesh.insecure_channel(server.address)
    one_of_each(channel)
    pool = channel.assembly.pool
    del channel
    gc.collect()
    eventually(lambda: pool.closed)


async def test_interceptors_that_are_put_into_an_asyncio_channels_lists_intercept(server: Server, seen: Seen) -> None:
    """As Google's client libraries do with any ``grpc.aio.Channel`` that they are given."""
    channel: Any = mesh.aio.insecure_channel(server.address)
    async with channel:
        unary = channel.unary_unary(UNARY)
        channel._unary_unary_interceptors.append(aio_noted("appended", seen)[0])
        assert await unary(b"ok", timeout=TIMEOUT) == b"ok"
    assert seen == [("appended", UNARY)]


# -- explain


def test_what_an_interceptor_makes_of_a_stream_can_be_explained(server: Server) -> None:
    class Generator(grpc.UnaryStreamClientInterceptor):
        """As OpenTelemetry's: what the caller gets is a generator of its own."""

        def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
            call = continuation(details, request)
            try:
                yield from call
            except grpc.RpcError as error:
                raise RuntimeError("wrapped") from error

    with mesh.insecure_channel(f"static:///{server.address}") as plain:
        channel = grpc.intercept_channel(plain, Generator())
        responses: Any = channel.unary_stream(RESPONSES)
        call = responses(b"count 3 abort ABORTED now", timeout=TIMEOUT)
        assert next(call) == b"0"
        running = mesh.explain(call)
        assert (running.method, running.code) == (RESPONSES, "RUNNING")
        assert [attempt.address for attempt in running.attempts] == [server.address]
        with pytest.raises(RuntimeError) as raised:
            list(call)
        assert mesh.explain(raised.value).code == "ABORTED"
        with pytest.raises(TypeError, match="no call of a mesh channel in <generator"):
            mesh.explain(call)


def test_calls_and_errors_that_pass_an_interceptor_can_be_explained(server: Server) -> None:
    with mesh.insecure_channel(f"static:///{server.address}") as plain:
        channel = grpc.intercept_channel(plain, Noted("own", []))
        unary: Any = channel.unary_unary(UNARY)
        _, call = unary.with_call(b"ok", timeout=TIMEOUT)
        assert mesh.explain(call).code == "OK"
        with pytest.raises(grpc.RpcError) as raised:
            unary(b"abort ABORTED now", timeout=TIMEOUT)
        assert mesh.explain(raised.value).code == "ABORTED"
        future = unary.future(b"ok", timeout=TIMEOUT)
        future.result()
        assert mesh.explain(future).code == "OK"
        responses: Any = channel.unary_stream(RESPONSES)
        stream = responses(b"ok", timeout=TIMEOUT)
        list(stream)
        assert mesh.explain(stream).code == "OK"


async def test_asyncio_calls_behind_interceptors_explain_themselves(server: Server) -> None:
    interceptors = aio_noted("own", [])
    async with mesh.aio.insecure_channel(f"static:///{server.address}", interceptors=interceptors) as channel:
        made: Any = channel.unary_unary(UNARY)
        call = made(b"ok", timeout=TIMEOUT)
        assert await call == b"ok"
        assert call.explain() == mesh.explain(call)
        assert call.explain().code == "OK"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await made(b"abort ABORTED now", timeout=TIMEOUT)
        assert mesh.explain(raised.value).code == "ABORTED"
        responses: Any = channel.unary_stream(RESPONSES)
        stream = responses(b"ok", timeout=TIMEOUT)
        assert [each async for each in stream] == [b"ok"]
        assert mesh.explain(stream).code == "OK"


async def test_an_asyncio_call_that_its_interceptors_have_not_made_has_nothing_to_explain(server: Server) -> None:
    async with mesh.aio.insecure_channel(server.address, interceptors=aio_noted("own", [])) as channel:
        unary: Any = channel.unary_unary(UNARY)
        call = unary(b"ok", timeout=TIMEOUT)
        with pytest.raises(asyncio.InvalidStateError, match="the interceptors have not made the call"):
            mesh.explain(call)
        assert await call == b"ok"


def test_what_is_no_call_cannot_be_explained(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        unary: Any = channel.unary_unary(UNARY)
        _, call = unary.with_call(b"ok", timeout=TIMEOUT)
    for other in (call, ValueError("of another kind"), None):
        with pytest.raises(TypeError, match="no call of a mesh channel"):
            mesh.explain(other)
