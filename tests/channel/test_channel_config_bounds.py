"""Whatever a registry, a file or the disk cache holds, a new client starts, and its calls go through."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

import mesh
from mesh.discovery.cache import Cache
from tests.registry.serving import serving
from weft.mesh.v1 import registry_pb2 as pb

SERVICE = "test.Bounded"
METHOD = f"/{SERVICE}/Echo"
WITHIN = 10.0  # seconds that anything may take

SURROGATE = r'{"healthCheckConfig": {"serviceName": "\ud800"}}'
NANOSECOND = '{"methodConfig": [{"name": [{}], "timeout": "0.000000001s"}]}'
TWICE = '{"methodConfig": [{"name": [{}], "timeout": "1s", "timeout": "2s"}]}'
LARGE = '{"x": "' + "y" * 300_000 + '"}'
BAD = {
    "a lone surrogate": (SURROGATE, r'healthCheckConfig.serviceName: not valid UTF-8 text, got "\ud800"'),
    "1 ns": (NANOSECOND, 'methodConfig[0].timeout: expected a duration of 0.001s or more, got "0.000000001s"'),
    "a key twice": (TWICE, "methodConfig[0].timeout: duplicate key"),
    "300 kB": (LARGE, "300009 bytes; the limit is 262144"),
}

bad = pytest.mark.parametrize(("text", "why"), BAD.values(), ids=list(BAD))


class Registry(grpc.GenericRpcHandler):
    """One that gives out whatever it is given: an older one, or one that somebody else runs."""

    def __init__(self, snapshot: pb.Snapshot) -> None:
        self._snapshot = snapshot
        self.over = threading.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        serialize = pb.WatchResponse.SerializeToString
        return grpc.unary_stream_rpc_method_handler(self._watch, response_serializer=serialize)

    def _watch(self, _: bytes, __: Any) -> Iterator[pb.WatchResponse]:
        yield pb.WatchResponse(epoch="e", revision=1, snapshot=self._snapshot)
        self.over.wait()


class Echo(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        echo: Any = grpc.unary_unary_rpc_method_handler(lambda request, _: request)
        return echo if handler_call_details.method == METHOD else None


@pytest.fixture
def server() -> Iterator[str]:
    with futures.ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads, handlers=[Echo()])
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield address
        server.stop(None).wait()


@pytest.fixture
def registry_of(server: str) -> Iterator[Callable[[str], str]]:
    with futures.ThreadPoolExecutor(4) as threads:
        registry = grpc.server(threads)
        services: list[Registry] = []

        def start(config: str) -> str:
            instance = pb.Instance(id="a", service=SERVICE, address=server)
            services.append(Registry(pb.Snapshot(instances=[instance], service_config=config)))
            registry.add_generic_rpc_handlers(tuple(services))
            port = registry.add_insecure_port("127.0.0.1:0")
            registry.start()
            return f"127.0.0.1:{port}"

        yield start
        services[0].over.set()
        registry.stop(None).wait()


def called(target: str) -> bytes:
    with mesh.insecure_channel(target) as channel:
        call: Any = channel.unary_unary(METHOD)
        response: bytes = call(b"x", timeout=WITHIN)
        return response


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.ERROR and record.name == "mesh.config"
    ]


@bad
def test_a_new_client_starts_whatever_config_its_registry_gives_out(
    registry_of: Callable[[str], str], caplog: pytest.LogCaptureFixture, text: str, why: str
) -> None:
    assert called(f"mesh://{registry_of(text)}/{SERVICE}") == b"x"
    (error,) = errors(caplog)
    assert "from the registry rejected; none is in use: " in error
    assert why in error


@bad
async def test_the_registry_refuses_such_a_config_with_the_path(text: str, why: str) -> None:
    async with serving() as registry:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await registry.stub.SetServiceConfig(pb.SetServiceConfigRequest(service=SERVICE, service_config=text))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    if text is not LARGE:  # which has words of the registry's own
        assert why in str(caught.value.details())


@bad
def test_a_new_client_starts_whatever_the_file_says(
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    text: str,
    why: str,
) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    monkeypatch.setenv("MESH_SERVICE_CONFIG", str(file))
    assert called(f"static:///{server}") == b"x"
    (error,) = errors(caplog)
    assert why in error


@bad
def test_the_programs_own_option_is_refused_where_it_is_given(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=r"^service config: ") as caught:
        mesh.insecure_channel("static:///127.0.0.1:1", options=[("grpc.service_config", text)])
    assert why in str(caught.value)


def test_a_fifo_for_a_config_file_holds_up_no_call(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    monkeypatch.setenv("MESH_SERVICE_CONFIG", str(fifo))
    assert called(f"static:///{server}") == b"x"
    (error,) = errors(caplog)
    assert f"{fifo}: not a regular file" in error


def test_a_fifo_in_the_disk_cache_holds_up_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free_port: Callable[[], int]
) -> None:
    registry = f"127.0.0.1:{free_port()}"  # nobody listens
    folder = tmp_path / "cache"
    Cache(folder, registry, SERVICE).write(pb.Snapshot())
    (file,) = folder.iterdir()
    file.unlink()
    os.mkfifo(file)
    monkeypatch.setenv("MESH_CACHE", str(folder))
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        called(f"mesh://{registry}/{SERVICE}")
    failure: Any = caught.value
    assert failure.code() is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - began < WITHIN / 2
    assert f"{file} can't be read: not a regular file" in caplog.text
