"""What a caller through the mesh lives through when processes die, stop and come back: nothing, as far as can be.

Real processes throughout: a registry, replicas of the shop's user service, and a small service (``recorder.py``) that
writes down what it runs. While they are mistreated a load of calls goes on in both worlds.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh
import mesh.aio
from tests.faults.load import Load
from tests.processes import HOST, REPOSITORY, Process, Spawn, eventually, free_ports
from weft.mesh.v1 import registry_pb2, registry_pb2_grpc
from weft.user.v1 import user_pb2, user_pb2_grpc

pytestmark = pytest.mark.faults

USER = "weft.user.v1.UserService"
RECORDER = "test.Recorder"
FOLDER = Path(__file__).parent


class Mesh:
    """A registry, and the replicas of services that a test starts, by address."""

    def __init__(self, spawn: Spawn, folder: Path) -> None:
        self.registry = f"{HOST}:{free_ports(1)[0]}"
        self.processes: dict[str, Process] = {}
        self._spawn = spawn
        self._folder = folder
        self._environments: dict[str, dict[str, str]] = {}
        self.start_registry()

    def start_registry(self) -> None:
        self.registry_process = self._spawn.python("-m", "mesh.registry", "--listen", self.registry)

    def user(self, address: str = "", **environment: str) -> str:
        """Start a replica of the user service; returns its address."""
        return self._start(address, "-m", "services.user", MESH_DATA=str(self._folder / "data"), **environment)

    def recorder(self, address: str = "", **environment: str) -> str:
        """Start a recorder; returns its address."""
        address = address or f"{HOST}:{free_ports(1)[0]}"
        return self._start(address, FOLDER / "recorder.py", self._file(address), **environment)

    def _start(self, address: str, *arguments: str | Path, **environment: str) -> str:
        address = address or f"{HOST}:{free_ports(1)[0]}"
        told = {"MESH_LISTEN": address, "MESH_REGISTRY": self.registry, "PYTHONPATH": str(REPOSITORY)}
        # On a busy machine a replica that has just started may rightly refuse calls; that is looked at elsewhere.
        told["MESH_OVERLOAD"] = "off"
        self.processes[address] = self._spawn.python(*arguments, environment={**told, **environment})
        return address

    def recorded(self, address: str, verb: str) -> list[str]:
        """What the recorder at ``address`` wrote down: of whole lines alone, as the last may be on its way."""
        file = self._file(address)
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [rest for word, _, rest in (line.partition(" ") for line in lines) if word == verb]

    def _file(self, address: str) -> Path:
        return self._folder / f"recorded-{address.rpartition(':')[2]}"

    def target(self, service: str) -> str:
        return f"mesh://{self.registry}/{service}"

    def registered(self) -> set[str]:
        """The addresses that the registry knows; none while it is away."""
        with grpc.insecure_channel(self.registry) as channel:
            registry = registry_pb2_grpc.RegistryStub(channel)
            try:
                answer = registry.ListInstances(registry_pb2.ListInstancesRequest(), timeout=5)
            except grpc.RpcError:
                return set()
            return {instance.address for instance in answer.instances}

    def reads(self, timeout: float = 10.0) -> Load:
        """A load of reads of one user."""
        with mesh.insecure_channel(self.target(USER)) as channel:
            users = user_pb2_grpc.UserServiceStub(channel)
            new = user_pb2.CreateUserRequest(name="Ada", email="ada@example.com")
            user = users.CreateUser(new, timeout=30, wait_for_ready=True).user
        return Load(
            self.target(USER),
            lambda channel: user_pb2_grpc.UserServiceStub(channel).GetUser,
            lambda: user_pb2.GetUserRequest(id=user.id),
            timeout=timeout,
        )


def rotation(channel: Any) -> set[str]:
    """The addresses that a channel picks among."""
    return {node.endpoint.address for node in channel.assembly.cluster.picker.nodes}


def in_flight(channel: Any) -> int:
    """The attempts that a channel counts as in flight."""
    return sum(node.in_flight for node in channel.assembly.cluster.nodes.values())


@pytest.fixture
def shop(spawn: Spawn, tmp_path: Path) -> Mesh:
    return Mesh(spawn, tmp_path)


@pytest.fixture
def three_users(shop: Mesh) -> list[str]:
    return [shop.user() for _ in range(3)]


def test_no_call_fails_when_a_replica_is_killed(shop: Mesh, three_users: list[str]) -> None:
    victim, *others = three_users
    with shop.reads() as load:
        load.in_rotation(three_users)
        load.more()
        shop.processes[victim].end(signal.SIGKILL)
        load.in_rotation(others)
        load.more()
    assert load.failed == []


def test_no_call_outlives_its_deadline_when_a_replica_hangs_and_it_is_soon_left_out(
    shop: Mesh, three_users: list[str]
) -> None:
    victim, *others = three_users
    deadline = 2.0
    with shop.reads(timeout=deadline) as load:
        load.in_rotation(three_users)
        load.more()
        shop.processes[victim].send(signal.SIGSTOP)
        load.in_rotation(others, within=5.0)
        later = load.more()
        shop.processes[victim].send(signal.SIGCONT)
        load.in_rotation(three_users)
    assert not any(victim in done.addresses for done in later)
    # Only such fail that were with it when it stopped, or were sent before that could be known: by their deadline, or
    # because too little of it was left when the connection was given up.
    failed = [done for done in load.done if done.why.code != "OK"]
    assert {done.why.code for done in failed} <= {"DEADLINE_EXCEEDED", "UNAVAILABLE"}, load.failed
    assert all(victim in done.addresses for done in failed), load.failed
    assert max(done.seconds for done in load.done) < deadline + 2.0  # far more than a busy machine's timers are late


def test_no_call_fails_when_all_replicas_are_restarted_one_by_one(shop: Mesh, three_users: list[str]) -> None:
    with shop.reads() as load:
        for address in three_users:
            load.in_rotation(three_users)
            load.more()
            assert shop.processes[address].end(signal.SIGTERM) == 0
            shop.user(address)
        load.in_rotation(three_users)
        load.more()
    assert load.failed == []


def test_no_stream_fails_when_all_replicas_are_restarted_one_by_one(shop: Mesh) -> None:
    replicas = [shop.recorder() for _ in range(3)]
    eventually(lambda: shop.registered() == set(replicas), 20, "all have registered")
    ids = itertools.count()
    with Load(
        shop.target(RECORDER),
        lambda channel: channel.unary_stream(f"/{RECORDER}/Count"),
        lambda: b"%d" % next(ids),
        streams=True,
    ) as load:
        for address in replicas:
            load.in_rotation(replicas)
            load.more()
            assert shop.processes[address].end(signal.SIGTERM) == 0
            shop.recorder(address)
        load.in_rotation(replicas)
        load.more()
    assert load.failed == []
    ran = Counter(name for address in replicas for name in shop.recorded(address, "ran"))
    assert set(ran.values()) == {1}


@pytest.mark.timeout(90)
def test_no_call_fails_while_the_registry_is_away_and_the_mesh_heals_when_it_is_back_empty(
    shop: Mesh, three_users: list[str]
) -> None:
    with shop.reads() as load:
        load.in_rotation(three_users)
        shop.registry_process.end(signal.SIGKILL)
        load.go_on_for(10.0)
        assert load.rotation("sync") == load.rotation("aio") == set(three_users)
        shop.start_registry()
        eventually(lambda: shop.registered() == set(three_users), 20, "all have registered again")
        load.in_rotation(three_users)
        fourth = shop.user(MESH_LEASE_TTL="2")
        load.in_rotation([*three_users, fourth])
        eventually(lambda: any(fourth in done.addresses for done in load.more()), what="the new one gets calls")
        shop.processes[fourth].end(signal.SIGKILL)
        load.in_rotation(three_users)
        eventually(lambda: load.known() == set(three_users), 20, "the dead one is forgotten")
        load.more()
    assert load.failed == []


def test_of_calls_that_may_not_be_retried_only_those_with_the_killed_replica_fail_and_none_is_run_twice(
    shop: Mesh,
) -> None:
    replicas = victim, *others = [shop.recorder() for _ in range(3)]
    eventually(lambda: shop.registered() == set(replicas), 20, "all have registered")
    ids = itertools.count()
    with (
        Load(
            shop.target(RECORDER), lambda channel: channel.unary_unary(f"/{RECORDER}/Once"), lambda: b"%d" % next(ids)
        ) as load,
        mesh.insecure_channel(shop.target(RECORDER)) as channel,
    ):
        load.in_rotation(replicas)
        channel.subscribe(lambda state: None, try_to_connect=True)
        eventually(lambda: rotation(channel) == set(replicas), what="all are ready")
        hold: Any = channel.unary_unary(f"/{RECORDER}/Hold")
        calls = {f"held-{n}": hold.future(f"held-{n}".encode(), timeout=30) for n in range(30)}

        def held(address: str) -> set[str]:
            return {name for name in shop.recorded(address, "ran") if name in calls}

        eventually(lambda: sum(len(held(address)) for address in replicas) == len(calls), what="all are being run")
        assert held(victim)
        shop.processes[victim].end(signal.SIGKILL)
        load.in_rotation(others)
        load.more()
        for address in others:
            with grpc.insecure_channel(address) as plain:
                release: Any = plain.unary_unary(f"/{RECORDER}/Release")
                release(b"", timeout=10)
        assert {name for name, call in calls.items() if call.code() is not grpc.StatusCode.OK} == held(victim)
        assert {calls[name].code() for name in held(victim)} == {grpc.StatusCode.UNAVAILABLE}

    for done in load.done:
        # A try that never left the client is free; the one that left is the only one.
        assert len(done.addresses) == 1, done
        assert done.why.code == "OK" or done.addresses == [victim], done
    ran = Counter(name for address in replicas for name in shop.recorded(address, "ran"))
    assert set(ran.values()) == {1}
    assert not {done.request.decode() for done in load.done if done.why.code == "OK"} - set(ran)


def test_an_address_that_another_service_took_over_gets_no_calls(shop: Mesh, three_users: list[str]) -> None:
    victim, *others = three_users
    with shop.reads() as load:
        load.in_rotation(three_users)
        shop.processes[victim].end(signal.SIGKILL)
        shop.recorder(victim, MESH_REGISTRY="")
        # The mesh still believes that it is a user replica, and so connects and asks how it is.
        eventually(lambda: "/grpc.health.v1.Health/Watch" in shop.recorded(victim, "asked"), what="it is asked")
        load.more()
        load.in_rotation(others)
    assert load.failed == []
    assert not [method for method in shop.recorded(victim, "asked") if USER in method]


@pytest.mark.parametrize("world", ["sync", "aio"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_client_that_vanishes_leaves_nothing_in_flight_at_the_server(
    shop: Mesh, spawn: Spawn, world: str, number: signal.Signals
) -> None:
    address = shop.recorder(MESH_REGISTRY="")
    with grpc.insecure_channel(address) as channel:
        ask: Any = channel.unary_unary(f"/{RECORDER}/Held")

        def held() -> int:
            return int(ask(b"", timeout=10, wait_for_ready=True))

        client = spawn.python(FOLDER / "vanishing.py", world, address, "5", environment={"PYTHONPATH": str(REPOSITORY)})
        client.wait_for("waiting")
        client.wait_until(lambda: held() == 10, what="five calls and five streams are in flight")
        client.send(number)
        eventually(lambda: held() == 0, what="the server lets go of them")


def test_what_a_caller_abandons_is_no_longer_in_flight(shop: Mesh) -> None:
    address = shop.recorder(MESH_REGISTRY="")
    with mesh.insecure_channel(f"static:///{address}") as channel:
        hold: Any = channel.unary_unary(f"/{RECORDER}/Hold")
        hold_stream: Any = channel.unary_stream(f"/{RECORDER}/HoldStream")
        call = hold.future(b"call", timeout=30, wait_for_ready=True)
        stream = hold_stream(b"stream", timeout=30, wait_for_ready=True)
        assert next(stream) == b"held"
        eventually(lambda: in_flight(channel) == 2)
        del call, stream
        eventually(lambda: in_flight(channel) == 0)


async def test_what_an_asyncio_caller_abandons_is_no_longer_in_flight(shop: Mesh) -> None:
    address = shop.recorder(MESH_REGISTRY="")
    async with mesh.aio.insecure_channel(f"static:///{address}") as channel:
        hold: Any = channel.unary_unary(f"/{RECORDER}/Hold")
        hold_stream: Any = channel.unary_stream(f"/{RECORDER}/HoldStream")
        call = hold(b"call", timeout=30, wait_for_ready=True)
        stream = hold_stream(b"stream", timeout=30, wait_for_ready=True)
        assert await stream.read() == b"held"
        waiting = asyncio.ensure_future(call)
        assert in_flight(channel) == 2
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        del call, stream, waiting
        gc.collect()
        async with asyncio.timeout(10):
            while in_flight(channel):  # noqa: ASYNC110 - a count has no event
                await asyncio.sleep(0.001)
