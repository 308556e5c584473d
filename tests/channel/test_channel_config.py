"""Service configs that come and change while a channel is in use: which one holds, and that no call notices."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

import mesh
import mesh.aio
from mesh.channel.sync.channel import Channel
from mesh.errors import AioRpcError
from tests.processes import Spawn, eventually
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

SERVICE = "test.Config"
FAIL, HOLD = f"/{SERVICE}/Fail", f"/{SERVICE}/Hold"
WITHIN = 10.0  # seconds that a call may take


class Handlers(grpc.GenericRpcHandler):
    """``Fail`` is UNAVAILABLE; ``Hold`` answers when ``let_go`` is set."""

    def __init__(self) -> None:
        self.holding = threading.Event()
        self.let_go = threading.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        found = {FAIL: self._fail, HOLD: self._hold}.get(handler_call_details.method)
        return grpc.unary_unary_rpc_method_handler(found) if found else None

    def _fail(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNAVAILABLE, "as asked")
        raise AssertionError

    def _hold(self, request: bytes, _: grpc.ServicerContext) -> bytes:
        self.holding.set()
        self.let_go.wait(WITHIN)
        return request


class Served:
    """A server of this process."""

    def __init__(self) -> None:
        self.handlers = Handlers()
        self.threads = futures.ThreadPoolExecutor(4)
        self.server = grpc.server(self.threads, handlers=[self.handlers])
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.handlers.let_go.set()
    served.server.stop(None).wait()
    served.threads.shutdown()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "config.json"
    monkeypatch.setenv("MESH_SERVICE_CONFIG", str(file))
    return file


def attempts(number: int, **further: object) -> dict[str, object]:
    """A config with so many attempts for each call."""
    retry = {
        "maxAttempts": number,
        "initialBackoff": "0.001s",
        "maxBackoff": "0.001s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    # The budget is for as many retries as the tests' calls may make while they wait for a change.
    return {"methodConfig": [{"name": [{}], "retryPolicy": retry}], "retryBudget": {"ratio": 10}, **further}


def option(config: dict[str, object]) -> list[tuple[str, str]]:
    return [("grpc.service_config", json.dumps(config))]


def write(file: Path, config: object) -> None:
    """Put the file in its place at once, as a careful operator does."""
    beside = file.with_suffix(".new")
    beside.write_text(config if isinstance(config, str) else json.dumps(config))
    beside.replace(file)


def attempted(channel: Any) -> int:
    """How many attempts a failing call is given."""
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(FAIL)(b"", timeout=WITHIN)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    return len(raised.value.explain().attempts)  # type: ignore[attr-defined]


# which one holds


def test_the_first_call_already_has_what_the_file_says(served: Served, file: Path) -> None:
    write(file, attempts(2))
    with mesh.insecure_channel(f"static:///{served.address}") as channel:
        assert attempted(channel) == 2


@pytest.mark.slow
@pytest.mark.parametrize("target", ["static:///{}", "{}"])
def test_a_file_that_changes_holds_from_then_on(served: Served, file: Path, target: str) -> None:
    write(file, attempts(2))
    with mesh.insecure_channel(target.format(served.address)) as channel:
        assert attempted(channel) == 2
        write(file, attempts(4))
        eventually(lambda: attempted(channel) == 4)


@pytest.mark.slow
async def test_so_it_does_in_asyncio(served: Served, file: Path) -> None:
    write(file, attempts(2))
    async with mesh.aio.insecure_channel(f"static:///{served.address}") as channel:
        call: Any = channel.unary_unary(FAIL)
        for number in (2, 4):
            write(file, attempts(number))
            seen = 0
            async with asyncio.timeout(WITHIN):
                while seen != number:
                    await asyncio.sleep(0.01)  # between two looks
                    with pytest.raises(AioRpcError) as raised:
                        await call(b"", timeout=WITHIN)
                    seen = len(raised.value.explain().attempts)


def test_the_channels_option_goes_before_the_file(served: Served, file: Path) -> None:
    write(file, attempts(2))
    with mesh.insecure_channel(f"static:///{served.address}", option(attempts(3))) as channel:
        assert attempted(channel) == 3


@pytest.mark.slow
def test_one_file_serves_many_services(served: Served, file: Path) -> None:
    target = f"static:///{served.address}"
    write(file, {"services": {target: attempts(2), "another": attempts(3), "*": attempts(4)}})
    with mesh.insecure_channel(target) as channel, mesh.insecure_channel(served.address) as other:
        assert attempted(channel) == 2
        assert attempted(other) == 4

        write(file, {"services": {"another": attempts(3)}})
        eventually(lambda: attempted(channel) == 1, what="a file that says nothing of it leaves it the default")


# bad updates


BAD = [
    ({"methodConfig": [{"name": [{}], "timeout": "soon"}]}, "methodConfig[0].timeout: expected a duration"),
    ("{", "config.json: not JSON: "),
    ([], "expected an object"),
    ({"services": []}, "services: expected an object of configs by service"),
    ({"services": {"*": {"retryBudget": {"ratio": -1}}}}, "retryBudget.ratio: expected a number of 0 or more"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("bad", "complaint"), BAD)
def test_a_bad_file_is_named_once_with_the_fields_path_and_what_was_good_holds(
    served: Served, file: Path, caplog: pytest.LogCaptureFixture, bad: object, complaint: str
) -> None:
    write(file, attempts(2))
    with mesh.insecure_channel(f"static:///{served.address}") as channel:
        assert attempted(channel) == 2
        write(file, bad)
        eventually(lambda: complaint in caplog.text)
        assert attempted(channel) == 2
        write(file, attempts(3))
        eventually(lambda: attempted(channel) == 3)
    assert [record.levelno for record in caplog.records if record.name == "mesh.config"] == [logging.ERROR]


@pytest.mark.slow
def test_a_file_that_is_away_takes_nothing_away(served: Served, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mesh.insecure_channel(f"static:///{served.address}") as channel:
        assert attempted(channel) == 1, "it isn't there yet"
        assert "from the file rejected; none is in use: " in caplog.text
        assert "No such file" in caplog.text
        write(file, attempts(2))
        eventually(lambda: attempted(channel) == 2)
        file.unlink()
        eventually(lambda: caplog.text.count("No such file") == 2)
        assert "from the file rejected; keeping the previous one: " in caplog.text
        assert attempted(channel) == 2


# what a change leaves alone


@pytest.mark.slow
def test_a_change_of_policy_keeps_every_nodes_memory_and_disturbs_no_call(served: Served, file: Path) -> None:
    write(file, attempts(2, loadBalancingConfig=[{"round_robin": {}}]))
    with mesh.insecure_channel(f"static:///{served.address}") as channel:
        assert isinstance(channel, Channel)
        cluster = channel.assembly.cluster
        held = channel.unary_unary(HOLD).future(b"held", timeout=WITHIN)
        assert served.handlers.holding.wait(WITHIN)
        node, budget = cluster.nodes[served.address], cluster.budget
        assert node.in_flight == 1

        write(file, attempts(3, loadBalancingConfig=[{"peak_ewma": {}}]))
        eventually(lambda: attempted(channel) == 3)
        assert cluster.nodes[served.address] is node
        assert node.in_flight == 1
        assert cluster.budget is budget

        served.handlers.let_go.set()
        assert held.result() == b"held"
        assert len(held.explain().attempts) == 1


@pytest.mark.slow
def test_the_registrys_config_holds_unless_the_file_has_one(
    served: Served, file: Path, spawn: Spawn, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = f"127.0.0.1:{free_port()}"
    process = spawn.python("-m", "mesh.registry", "--listen", registry)
    process.wait_for("serving on")
    write(file, {"services": {}})
    with grpc.insecure_channel(registry) as plain:
        stub = pb_grpc.RegistryStub(plain)
        instance = pb.Instance(id="a", service=SERVICE, address=served.address)
        stub.Register(pb.RegisterRequest(instance=instance), timeout=WITHIN)

        def set_config(config: dict[str, object]) -> None:
            request = pb.SetServiceConfigRequest(service=SERVICE, service_config=json.dumps(config))
            stub.SetServiceConfig(request, timeout=WITHIN)

        set_config(attempts(2))
        with mesh.insecure_channel(f"mesh://{registry}/{SERVICE}") as channel:
            eventually(lambda: attempted(channel) == 2)
            set_config(attempts(3))
            eventually(lambda: attempted(channel) == 3)
            write(file, {"services": {SERVICE: attempts(4)}})
            eventually(lambda: attempted(channel) == 4)
            set_config(attempts(2))
            write(file, {"services": {}})
            eventually(lambda: attempted(channel) == 2)
            process.kill()
            assert attempted(channel) == 2, "and stays while the registry is away"
