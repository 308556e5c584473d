"""Bad clients, a bad registry and bad luck, against served processes: the rest is served, in both worlds."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from tests.processes import HOST, REPOSITORY, Process, Spawn, eventually, free_ports
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

SERVING = REPOSITORY / "tests" / "server" / "serving.py"
NAME = "test.Sleeper"


@pytest.fixture(params=["aio", "sync"])
def world(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Served:
    """A served process; ``rests`` is a well-behaved client's call."""

    def __init__(self, process: Process, port: int) -> None:
        self.process = process
        self.port = port
        self.address = f"{HOST}:{port}"

    def rests(self, within: float = 10.0) -> None:
        with grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call: Any = channel.unary_unary(f"/{NAME}/Nap")
            assert call(b"0", timeout=within, wait_for_ready=True) == b"rested"


Start = Callable[..., Served]


@pytest.fixture
def start(world: str, spawn: Spawn) -> Start:
    def started(**environment: str) -> Served:
        (port,) = free_ports(1)
        told = {"MESH_LISTEN": f"{HOST}:{port}", "MESH_DRAIN_WAIT": "0.1", **environment}
        served = Served(spawn.python(SERVING, world, environment=told), port)
        served.process.wait_for("serving test.Sleeper")
        return served

    return started


# -- bad clients, as no gRPC library would be: frames by hand (RFC 9113) ----------------------------------------------

HEADERS, RST_STREAM, SETTINGS, END_HEADERS = 1, 3, 4, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(stream: int, method: str) -> bytes:
    """A call's HEADERS: literals without indexing, and nothing compressed (RFC 7541, 6.2.2)."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/{NAME}/{method}",
        ":authority": "test",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in field) for field in fields.items())
    return frame(HEADERS, END_HEADERS, stream, block)


HALF_A_MESSAGE = frame(0, 0, 1, b"\0" + struct.pack(">I", 100) + b"x" * 50)
"""DATA: the prefix says 100 bytes, and 50 come."""


class RawClient:
    """A connection that reads what comes and heeds none of it."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((HOST, port), 10)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0))
        self._reader = threading.Thread(target=self._read, name="raw-client")
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while self.socket.recv(65536):
                pass

    def send(self, data: bytes) -> bool:
        """Whether the server still takes it."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self.socket.close()


@pytest.fixture
def raw() -> Iterator[Callable[[int], RawClient]]:
    clients: list[RawClient] = []

    def connect(port: int) -> RawClient:
        clients.append(RawClient(port))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


class TestBadClients:
    def test_one_that_opens_ten_thousand_streams_and_stalls(
        self, start: Start, raw: Callable[[int], RawClient]
    ) -> None:
        served = start(MESH_GRACE="1")
        for _ in range(10):
            client = raw(served.port)
            client.send(b"".join(headers(2 * number + 1, "Nap") for number in range(1000)))
        served.rests(within=40)  # gRPC's Python accepts them one by one
        served.rests()
        # It ends in good order, too, when its grace is over.
        assert served.process.end(within=40) == 0

    def test_one_that_sends_half_a_message_and_stalls(self, start: Start, raw: Callable[[int], RawClient]) -> None:
        served = start(MESH_GRACE="1")
        for _ in range(400):
            client = raw(served.port)
            client.send(headers(1, "Nap") + HALF_A_MESSAGE)
        served.rests()
        served.rests()
        assert served.process.end(within=40) == 0

    @pytest.mark.parametrize(
        ("limit", "calls_each"),
        [pytest.param("1000", 2**29, id="on-one-connection"), pytest.param("100", 10_000, id="on-many-connections")],
    )
    def test_one_that_floods_with_resets(
        self, start: Start, raw: Callable[[int], RawClient], limit: str, calls_each: int
    ) -> None:
        served = start(MESH_GRACE="1", MESH_MAX_CONNECTION_STREAMS=limit)
        flood = threading.Event()

        def flooding() -> None:
            while not flood.is_set():
                client, stream = raw(served.port), 1
                reset = True
                while reset and not flood.is_set() and stream < 2 * calls_each:
                    burst = range(stream, stream + 200, 2)
                    reset = client.send(
                        b"".join(
                            headers(each, "Nap") + frame(RST_STREAM, 0, each, struct.pack(">I", 8)) for each in burst
                        )
                    )
                    stream += 200
                client.close()

        flooder = threading.Thread(target=flooding, name="flooder")
        flooder.start()
        try:
            for _ in range(500):
                served.rests(within=5)
        finally:
            flood.set()
            flooder.join()
        served.rests()
        assert served.process.end(within=40) == 0

    def test_one_that_talks_nonsense(self, start: Start) -> None:
        served = start()
        for nonsense in (
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\0" * 4096,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096,
        ):
            with socket.create_connection((HOST, served.port), 10) as connection, contextlib.suppress(OSError):
                connection.sendall(nonsense)
                connection.settimeout(2)
                connection.recv(65536)
        served.rests()

    def test_metadata_beyond_the_limit_is_refused_and_the_connection_goes_on(self, start: Start) -> None:
        served = start()
        with grpc.insecure_channel(served.address) as channel:
            call: Any = channel.unary_unary(f"/{NAME}/Nap")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"0", timeout=10, metadata=(("k", "v" * 20_000),))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert call(b"0", timeout=10) == b"rested"


# -- the registry -----------------------------------------------------------------------------------------------------


class Garbage(grpc.GenericRpcHandler):
    """Answers whatever it is asked with bytes that mean nothing."""

    def __init__(self) -> None:
        self.asked = 0

    def service(self, _: grpc.HandlerCallDetails) -> Any:
        return grpc.stream_stream_rpc_method_handler(self._answer)

    def _answer(self, requests: Iterator[bytes], _: Any) -> Iterator[bytes]:
        self.asked += 1
        for number, _request in enumerate(requests):
            yield (b"\xff\xfe\xfd", b"", b"\x0a\x02ab")[number % 3]


def known(registry: str, *addresses: str) -> None:
    """Wait until the registry knows these instances and no others."""

    def listed() -> bool:
        with grpc.insecure_channel(registry, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                answer = pb_grpc.RegistryStub(channel).ListInstances(pb.ListInstancesRequest(service=NAME), timeout=2)
            except grpc.RpcError:
                return False
        return {instance.address for instance in answer.instances} == set(addresses)

    eventually(listed, 30, f"the registry knows {addresses}")


def a_registry(spawn: Spawn, address: str) -> Process:
    process = spawn.python("-m", "mesh.registry", "--listen", address)
    process.wait_for("serving on")
    return process


@pytest.fixture
def registry() -> str:
    return f"{HOST}:{free_ports(1)[0]}"


class TestTheRegistry:
    def test_that_answers_garbage_is_tried_on_and_does_no_harm(self, start: Start, spawn: Spawn, registry: str) -> None:
        garbage = Garbage()
        pool = ThreadPoolExecutor(4)
        server = grpc.server(pool, handlers=[garbage], options=[("grpc.so_reuseport", 0)])
        server.add_insecure_port(registry)
        server.start()
        served = start(MESH_REGISTRY=registry)
        eventually(lambda: garbage.asked >= 3, 20)
        served.rests()
        server.stop(None).wait()
        pool.shutdown()
        a_registry(spawn, registry)
        known(registry, served.address)
        assert served.process.end() == 0
        known(registry)

    def test_that_flaps_finds_the_instance_each_time_it_is_there(
        self, start: Start, spawn: Spawn, registry: str
    ) -> None:
        served = start(MESH_REGISTRY=registry, MESH_LEASE_TTL="1")
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            process = a_registry(spawn, registry)
            known(registry, served.address)
            process.end(number)
            served.rests()

    def test_that_lost_a_lease_while_the_process_stood_still_gets_it_anew(
        self, start: Start, spawn: Spawn, registry: str
    ) -> None:
        a_registry(spawn, registry)
        served = start(MESH_REGISTRY=registry, MESH_LEASE_TTL="1")
        known(registry, served.address)
        served.process.send(signal.SIGSTOP)
        try:
            known(registry)
        finally:
            served.process.send(signal.SIGCONT)
        known(registry, served.address)

    def test_with_two_instances_of_one_id_both_serve_and_one_is_known(
        self, start: Start, spawn: Spawn, registry: str
    ) -> None:
        a_registry(spawn, registry)
        settings = {"MESH_REGISTRY": registry, "MESH_INSTANCE_ID": "twin", "MESH_LEASE_TTL": "1"}
        one, two = start(**settings), start(**settings)
        for served in (one, two, one, two):
            served.rests()
        # They take the id from each other; whoever has lost it says so.
        eventually(lambda: "or another process uses the instance id" in one.process.said + two.process.said, 20)
        assert one.process.end() == 0
        known(registry, two.address)

    def test_a_drain_while_it_registers_leaves_no_lease_behind(self, start: Start, spawn: Spawn, registry: str) -> None:
        process = a_registry(spawn, registry)
        process.send(signal.SIGSTOP)
        served = start(MESH_REGISTRY=registry, MESH_LEASE_TTL="300", MESH_DEREGISTER_TIMEOUT="20")
        served.process.send(signal.SIGTERM)
        process.send(signal.SIGCONT)
        assert served.process.wait() == 0
        known(registry)


def test_a_process_that_dies_without_a_word_is_forgotten(start: Start, spawn: Spawn, registry: str) -> None:
    a_registry(spawn, registry)
    served = start(MESH_REGISTRY=registry, MESH_LEASE_TTL="1")
    known(registry, served.address)
    served.process.end(signal.SIGKILL)
    known(registry)
