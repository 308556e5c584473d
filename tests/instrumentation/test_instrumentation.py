"""OpenTelemetry and Sentry in processes of their own, which set them up as any program does: servers and clients of
the mesh work, and each call of a user gets its span."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import mesh
from tests.instrumentation.calls import BOUND, CALLED, CONFIG, EXPECTED, sync_calls
from tests.instrumentation.frameworks import FRAMEWORKS
from tests.processes import Process, Spawn, free_ports

pytestmark = pytest.mark.slow

WITHOUT_STREAMED_REQUESTS = ("Unary", "Flaky", "Responses", "Threaded")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry's address."""
    spawn = Spawn(tmp_path_factory.mktemp("registry"))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    spawn.python("-m", "mesh.registry", environment={"MESH_REGISTRY_LISTEN": address}).wait_for("serving on")
    yield address
    spawn.close()


def complaints(process: Process) -> list[str]:
    """What the mesh and gRPC have logged of trouble."""
    return [line for line in process.said.splitlines() if line.startswith(("WARNING:mesh", "ERROR:mesh", "ERROR:grpc"))]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("world", ["aio", "sync"])
@pytest.mark.parametrize("name", ["opentelemetry", "sentry"])
def test_calls_of_all_kinds_work_and_each_has_one_client_span(
    name: str, world: str, order: str, spawn: Spawn, registry: str
) -> None:
    """``order``: instrumentation before or after ``import mesh``. A call that is retried has one span, too, and its
    attempts have one each on the server. What the mesh asks for itself (Registry, health) has none."""
    program = spawn.python(
        "-m", "tests.instrumentation.program", name, world, order, environment={"MESH_REGISTRY": registry}
    )
    assert program.wait() == 0, program.said
    told = json.loads(next(line for line in program.said.splitlines() if line.startswith('{"seen"')))
    assert told["seen"] == EXPECTED
    framework = FRAMEWORKS[name]
    spans = told["spans"]
    methods = CALLED if framework.streams else WITHOUT_STREAMED_REQUESTS
    assert Counter(spans["client"]) == {f"/test.Echo/{method}": CALLED[method] for method in methods}
    served = Counter(span for span in spans["server"] if span.startswith("/test.Echo/"))
    assert served["/test.Echo/Unary"] == 3
    assert served["/test.Echo/Flaky"] == 2
    # Each of the server's spans belongs to the trace of its caller's.
    assert [span for span in spans["apart"] if span.startswith("/test.Echo/")] == []
    assert complaints(program) == []


def instrumented(spawn: Spawn, *arguments: str, **environment: str) -> Process:
    """A Python program under ``opentelemetry-instrument``, which prints its spans."""
    exporters = {f"OTEL_{kind}_EXPORTER": "none" for kind in ("METRICS", "LOGS")} | {"OTEL_TRACES_EXPORTER": "console"}
    instrument = Path(sys.executable).with_name("opentelemetry-instrument")
    return spawn(instrument, sys.executable, *arguments, environment={**exporters, **environment})


def test_a_registry_works_under_opentelemetry_instrument(spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    registry = instrumented(spawn, "-m", "mesh.registry", MESH_REGISTRY_LISTEN=address)
    registry.wait_for("serving on")
    monkeypatch.setenv("MESH_REGISTRY", address)
    server = spawn.python("-m", "tests.instrumentation.serving", "sync", environment={"MESH_LISTEN": "127.0.0.1:0"})
    server.wait_for("serving test.Echo")
    with mesh.insecure_channel("mesh:///test.Echo", [("grpc.service_config", CONFIG)]) as channel:
        grpc.channel_ready_future(channel).result(BOUND)
        assert sync_calls(channel, mesh.explain) == EXPECTED
    assert complaints(server) == []
    assert registry.end() == 0
    assert "TypeError" not in registry.said


@pytest.mark.parametrize("world", ["aio", "sync"])
def test_an_unchanged_server_works_under_opentelemetry_instrument(
    world: str, spawn: Spawn, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "MESH_REGISTRY": registry,
        "MESH_LISTEN": "127.0.0.1:0",
        "MESH_DRAIN_WAIT": "0",
    }
    server = instrumented(spawn, "-m", "tests.instrumentation.serving", world, **settings)
    server.wait_for("serving test.Echo")
    monkeypatch.setenv("MESH_REGISTRY", registry)
    with mesh.insecure_channel("mesh:///test.Echo", [("grpc.service_config", CONFIG)]) as channel:
        grpc.channel_ready_future(channel).result(BOUND)
        assert sync_calls(channel, mesh.explain) == EXPECTED
    assert server.end() == 0
    for method in CALLED:
        assert f'"name": "/test.Echo/{method}"' in server.said
    assert complaints(server) == []
