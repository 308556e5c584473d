"""Connections that grow old, addresses that nobody can reach, watchers that never read, and a wall clock that jumps."""

from __future__ import annotations

import ast
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import mesh
from tests.processes import HOST, REPOSITORY, Process, Spawn, eventually, free_ports
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

SERVING = REPOSITORY / "tests" / "server" / "serving.py"
NAME = "test.Sleeper"


@pytest.fixture(params=["aio", "sync"])
def world(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def registry(spawn: Spawn) -> str:
    address = f"{HOST}:{free_ports(1)[0]}"
    spawn.python("-m", "mesh.registry", "--listen", address).wait_for("serving on")
    return address


@pytest.fixture
def unreachable() -> Iterator[str]:
    """An address that takes no connection: its backlog is full, so that whoever tries waits in vain."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"{HOST}:{listener.getsockname()[1]}"
        for filler in fillers:
            filler.close()


def serving(spawn: Spawn, world: str, **environment: str) -> tuple[Process, str]:
    address = f"{HOST}:{free_ports(1)[0]}"
    told = {"MESH_LISTEN": address, "MESH_DRAIN_WAIT": "0.1", **environment}
    process = spawn.python(SERVING, world, environment=told)
    process.wait_for("serving test.Sleeper")
    return process, address


def connections(address: str) -> set[str]:
    """The client's ends of the connections that stand to ``address``, as Linux names them."""
    host, _, port = address.rpartition(":")
    (number,) = struct.unpack("=I", socket.inet_aton(host))
    remote = f"{number:08X}:{int(port):04X}"
    # gRPC's sockets are of IPv6 where there is any; an IPv4 address is the end of theirs.
    tables = [path.read_text() for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.exists()]
    lines = [line.split() for table in tables for line in table.splitlines()[1:]]
    return {line[1] for line in lines if line[2].endswith(remote) and line[3] == "01"}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="connections are counted where Linux lists them")
def test_a_connection_that_is_old_is_renewed_and_no_call_fails(spawn: Spawn, world: str) -> None:
    process, address = serving(spawn, world, MESH_CONNECTION_AGE="0.3")
    seen: set[str] = set()
    with mesh.insecure_channel(f"static:///{address}") as channel:
        call: Any = channel.unary_unary(f"/{NAME}/Nap")

        def called() -> bool:
            # Its method isn't marked idempotent: one that was lost with its connection wouldn't be tried again.
            assert call(b"1", timeout=10) == b"rested"
            seen.update(connections(address))
            return len(seen) >= 4

        eventually(called, 30, "the client's connection is renewed three times")
    assert process.end() == 0


@pytest.mark.parametrize("how", ["refuses", "silent"])
def test_an_instance_at_an_address_that_nobody_can_reach_costs_no_call(
    spawn: Spawn, world: str, registry: str, unreachable: str, how: str
) -> None:
    told = unreachable if how == "silent" else f"{HOST}:{free_ports(1)[0]}"
    good = [serving(spawn, world, MESH_REGISTRY=registry)[1] for _ in range(2)]
    serving(spawn, world, MESH_REGISTRY=registry, MESH_ADVERTISE=told)
    with grpc.insecure_channel(registry) as channel:
        stub = pb_grpc.RegistryStub(channel)

        def listed() -> bool:
            answer = stub.ListInstances(pb.ListInstancesRequest(service=NAME), timeout=5)
            return {each.address for each in answer.instances} == {*good, told}

        eventually(listed, 20, "all three are registered")
    with mesh.insecure_channel(f"mesh://{registry}/{NAME}") as channel:
        call: Any = channel.unary_unary(f"/{NAME}/Nap")
        assert [call(b"0", timeout=5) for _ in range(100)] == [b"rested"] * 100


def test_a_watcher_that_never_reads_holds_up_neither_registrations_nor_other_watchers(registry: str) -> None:
    count = 2000
    own = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(registry, own) as deaf, grpc.insecure_channel(registry, own) as channel:
        never_read = pb_grpc.RegistryStub(deaf).Watch(pb.WatchRequest(service=NAME))
        never_read.initial_metadata()  # it watches
        stub = pb_grpc.RegistryStub(channel)
        watch = stub.Watch(pb.WatchRequest(service=NAME), timeout=60)
        next(watch)
        labels = {"padding": "x" * 1000}  # together more than any window of the deaf one's connection holds
        for number in range(count):
            instance = pb.Instance(id=str(number), service=NAME, address=f"{HOST}:{number + 1}", metadata=labels)
            stub.Register(pb.RegisterRequest(instance=instance), timeout=5)
        known: set[str] = set()
        while len(known) < count:
            answer = next(watch)
            known.update(each.id for each in answer.snapshot.instances)
            known.update(each.id for each in answer.delta.upserted)
        watch.cancel()
        never_read.cancel()


def wall_clocks(source: str) -> set[str]:
    """What in ``source`` tells the time of day."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name for name in names if name in ("time.time", "time.time_ns", "time.gmtime", "time.localtime")}
        found |= {name for name in names if name.endswith((".now", ".utcnow", ".today"))}
    return found


def test_a_wall_clock_that_jumps_changes_no_lease_and_no_deadline() -> None:
    # Nothing there can, as nothing there asks for the time of day.
    assert wall_clocks("import time\ntime.time()") == {"time.time"}
    assert wall_clocks("from time import time") == {"time.time"}
    sources = [
        path for part in ("registry", "server", "channel") for path in (REPOSITORY / "mesh" / part).glob("**/*.py")
    ]
    assert len(sources) > 20
    assert {str(path): clocks for path in sources if (clocks := wall_clocks(path.read_text()))} == {}
