"""The first calls of a process: they wait for the registry's first answer, and have the config that it gives."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

import mesh
import mesh.aio
from mesh.observe import Explanation
from tests.processes import Process, Spawn, eventually
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

SERVICE = "test.First"
WITHIN = 10.0  # seconds that a call may take


class Handlers(grpc.GenericRpcHandler):
    """``Fail`` is UNAVAILABLE, ``Hold`` answers when ``let_go`` is set; each also as a stream of responses."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        name = handler_call_details.method.removeprefix(f"/{SERVICE}/")
        answer = {"Fail": self._fail, "Hold": self._hold}.get(name.removesuffix("Stream"))
        if answer is None:
            return None
        if not name.endswith("Stream"):
            return grpc.unary_unary_rpc_method_handler(answer)

        def answers(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            yield answer(request, context)

        return grpc.unary_stream_rpc_method_handler(answers)

    def _fail(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNAVAILABLE, "as asked")
        raise AssertionError

    def _hold(self, request: bytes, _: grpc.ServicerContext) -> bytes:
        self.let_go.wait(WITHIN)
        return request


@pytest.fixture
def address() -> Iterator[str]:
    """Of a server."""
    handlers, threads = Handlers(), futures.ThreadPoolExecutor(8)
    server = grpc.server(threads, handlers=[handlers])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    handlers.let_go.set()
    server.stop(None).wait()
    threads.shutdown()


class Registry:
    """A registry that is a process."""

    def __init__(self, spawn: Spawn, port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self._spawn = spawn
        self.process: Process | None = None

    def start(self) -> None:
        self.process = self._spawn.python("-m", "mesh.registry", "--listen", self.address)
        self.process.wait_for("serving on")

    def tell(self, address: str, config: dict[str, object] | None = None) -> None:
        """It knows one instance, and a config."""
        with grpc.insecure_channel(self.address) as channel:
            stub = pb_grpc.RegistryStub(channel)
            instance = pb.Instance(id="a", service=SERVICE, address=address)
            stub.Register(pb.RegisterRequest(instance=instance), timeout=WITHIN)
            text = json.dumps(config) if config else ""
            stub.SetServiceConfig(pb.SetServiceConfigRequest(service=SERVICE, service_config=text), timeout=WITHIN)


@pytest.fixture
def registry(spawn: Spawn, free_port: Callable[[], int]) -> Registry:
    return Registry(spawn, free_port())


def method_config(**policy: object) -> dict[str, object]:
    return {"methodConfig": [{"name": [{}], **policy}]}


RETRIES = method_config(
    retryPolicy={
        "maxAttempts": 3,
        "initialBackoff": "0.001s",
        "maxBackoff": "0.001s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
)
HEDGES = method_config(timeout="1s", hedgingPolicy={"maxAttempts": 3, "hedgingDelay": "0.05s"})
TIMEOUT = method_config(timeout="0.4s")
WAITS = method_config(waitForReady=True)


def fail(channel: Any) -> None:
    """A call of ``Fail``."""
    channel.unary_unary(f"/{SERVICE}/Fail")(b"", timeout=WITHIN)


KINDS = ["blocking", "with_call", "future", "stream", "aio", "aio stream"]


def first_call(
    kind: str, registry: str, method: str, timeout: float = WITHIN, wait_for_ready: bool | None = None
) -> tuple[grpc.StatusCode, Explanation]:
    """How the first call of a channel fails, which is made in the moment that the channel is."""
    target = f"mesh://{registry}/{SERVICE}"
    path = f"/{SERVICE}/{method}{'Stream' if 'stream' in kind else ''}"
    given: dict[str, Any] = {"timeout": timeout, "wait_for_ready": wait_for_ready}
    if kind.startswith("aio"):
        return asyncio.run(_first_aio_call(kind, target, path, given))
    make: dict[str, Callable[[Any], Any]] = {
        "blocking": lambda channel: channel.unary_unary(path)(b"", **given),
        "with_call": lambda channel: channel.unary_unary(path).with_call(b"", **given),
        "future": lambda channel: channel.unary_unary(path).future(b"", **given).result(),
        "stream": lambda channel: next(channel.unary_stream(path)(b"", **given)),
    }
    with mesh.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as raised:
        make[kind](channel)
    error: Any = raised.value
    return error.code(), error.explain()


async def _first_aio_call(
    kind: str, target: str, path: str, given: dict[str, Any]
) -> tuple[grpc.StatusCode, Explanation]:
    async with mesh.aio.insecure_channel(target) as channel:
        begin: Any = channel.unary_unary(path) if kind == "aio" else channel.unary_stream(path)
        call = begin(b"", **given)
        with pytest.raises(grpc.RpcError) as raised:
            await (call if kind == "aio" else call.read())
        error: Any = raised.value
        return error.code(), call.explain()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_call_of_a_process_has_the_registrys_config(kind: str, registry: Registry, address: str) -> None:
    registry.start()
    registry.tell(address, RETRIES)
    code, explanation = first_call(kind, registry.address, "Fail")
    assert code is grpc.StatusCode.UNAVAILABLE
    # (A stream's headers may be read before its end, and then its attempt is final.)
    assert len(explanation.attempts) in ((2, 3) if kind.endswith("stream") else (3,)), "it is retried"

    registry.tell(address, HEDGES)
    code, explanation = first_call(kind, registry.address, "Hold")
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(explanation.attempts) == 3, "it is hedged"

    registry.tell(address, TIMEOUT)
    code, explanation = first_call(kind, registry.address, "Hold")
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert explanation.seconds is not None
    assert explanation.seconds < 2, "it has its method's timeout"

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        registry.tell(f"127.0.0.1:{nobody.getsockname()[1]}")
        assert first_call(kind, registry.address, "Hold")[0] is grpc.StatusCode.UNAVAILABLE
        registry.tell(f"127.0.0.1:{nobody.getsockname()[1]}", WAITS)
        code, _ = first_call(kind, registry.address, "Hold", 0.5)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED, "it waits for ready"
        code, _ = first_call(kind, registry.address, "Hold", wait_for_ready=False)
        assert code is grpc.StatusCode.UNAVAILABLE, "unless the caller says otherwise, as with gRPC"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blocking", "future", "aio"])
def test_a_registry_that_is_silent_for_a_second_is_replaced_by_the_cache_and_its_config(
    kind: str, registry: Registry, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_CACHE", str(tmp_path / "cache"))
    registry.start()
    registry.tell(address, RETRIES)
    with mesh.insecure_channel(f"mesh://{registry.address}/{SERVICE}") as channel:
        with pytest.raises(grpc.RpcError):
            fail(channel)
        eventually(lambda: any((tmp_path / "cache").glob("[!.]*")))
    assert registry.process is not None
    registry.process.kill()
    host, _, port = registry.address.rpartition(":")
    with socket.create_server((host, int(port))):  # it takes connections and says nothing
        code, explanation = first_call(kind, registry.address, "Fail", 8)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert len(explanation.attempts) == 3
    # A second for the registry at the most (none, when its old connection breaks off first); the rest is for a busy
    # machine.
    assert explanation.seconds is not None
    assert explanation.seconds < 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cache_calls_wait_for_a_silent_registry_until_their_deadline(kind: str, registry: Registry) -> None:
    host, _, port = registry.address.rpartition(":")
    with socket.create_server((host, int(port))):
        code, explanation = first_call(kind, registry.address, "Fail", 0.5)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert explanation.attempts == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_registry_that_refuses_connections_fails_calls_and_is_named(kind: str, registry: Registry) -> None:
    code, explanation = first_call(kind, registry.address, "Fail", 8)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert registry.address in explanation.details
    assert explanation.seconds is not None
    assert explanation.seconds < 4
    code, _ = first_call(kind, registry.address, "Fail", 0.5, wait_for_ready=True)
    assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blocking", "future", "aio"])
def test_a_call_that_waits_for_ready_outlasts_a_registry_that_is_away(
    kind: str, registry: Registry, address: str
) -> None:
    with futures.ThreadPoolExecutor(1) as threads:
        calling = threads.submit(first_call, kind, registry.address, "Fail", WITHIN, True)
        assert not futures.wait([calling], 0.3).done
        registry.start()
        registry.tell(address, RETRIES)
        code, explanation = calling.result()
    assert code is grpc.StatusCode.UNAVAILABLE
    # The instance came before its config, so the call may have had none.
    assert len(explanation.attempts) in (1, 3)


@pytest.mark.slow
def test_calls_wait_for_nothing_where_the_program_or_a_file_gives_the_config(
    registry: Registry, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.start()
    registry.tell(address, RETRIES)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TIMEOUT))
    monkeypatch.setenv("MESH_SERVICE_CONFIG", str(file))
    code, explanation = first_call("blocking", registry.address, "Fail")
    assert (code, len(explanation.attempts)) == (grpc.StatusCode.UNAVAILABLE, 1)
    target = f"mesh://{registry.address}/{SERVICE}"
    with mesh.insecure_channel(target, [("grpc.service_config", json.dumps(RETRIES))]) as channel:
        with pytest.raises(grpc.RpcError) as raised:
            fail(channel)
        error: Any = raised.value
        assert len(error.explain().attempts) == 3
