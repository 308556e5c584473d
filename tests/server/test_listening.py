"""Where servers listen: what is shared, what is refused, and which file is removed, as one suite over both worlds."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from concurrent import futures
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

import mesh
import mesh.server.aio
import mesh.server.sync
from mesh.addresses import parse
from mesh.listening import Listener, bind
from mesh.server.settings import ServerSettings
from tests.processes import Spawn, eventually
from tests.server.serving import NAME, add_to_server, nap, sync_nap


class Threaded:
    """A server with threads."""

    def __init__(self, settings: ServerSettings) -> None:
        self._server = mesh.server.sync.Server([(add_to_server, sync_nap)], settings)
        self._server.start()
        self.port = self._server.port

    def close(self) -> None:
        self._server.drain()


class Asynchronous:
    """A server on an event loop in a thread of its own."""

    def __init__(self, settings: ServerSettings) -> None:
        self._runner = asyncio.Runner()
        self._thread = futures.ThreadPoolExecutor(1)
        self._server = mesh.server.aio.Server([(add_to_server, nap)], settings)
        try:
            self._run(self._server.start)
        except OSError:
            self._end()
            raise
        self.port = self._server.port
        self._stop = asyncio.Event()
        self._serving = self._thread.submit(self._runner.run, self._stop.wait())

    def close(self) -> None:
        self._runner.get_loop().call_soon_threadsafe(self._stop.set)
        self._serving.result(10)
        self._run(self._server.drain)
        self._end()

    def _run(self, work: Callable[[], Any]) -> None:
        self._thread.submit(lambda: self._runner.run(work())).result(20)

    def _end(self) -> None:
        self._thread.submit(self._runner.close).result(10)
        self._thread.shutdown()


class Plain:
    """grpc's own server."""

    def __init__(self, settings: ServerSettings) -> None:
        self._threads = futures.ThreadPoolExecutor(2)
        self._server = grpc.server(self._threads, options=settings.options)
        add_to_server(sync_nap, self._server)
        self.port = self._server.add_insecure_port(settings.listen)
        self._server.start()

    def close(self) -> None:
        self._server.stop(0).wait()
        self._threads.shutdown()


OURS = [Threaded, Asynchronous]


def told(listen: str, *options: tuple[str, int]) -> ServerSettings:
    return ServerSettings(listen=listen, drain_wait=0, grace=1, options=options)


def rests(address: str) -> bool:
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call: Any = channel.unary_unary(f"/{NAME}/Nap")
        return bool(call(b"0", timeout=10) == b"rested")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*OURS, Plain])
def test_servers_that_are_told_to_share_a_port_do(kind: Any, free_port: Callable[[], int]) -> None:
    listen = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        for _ in range(2):
            stack.callback(kind(told(listen, ("grpc.so_reuseport", 1))).close)
        assert rests(listen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OURS)
def test_others_do_not_share_one_by_accident(kind: Any, free_port: Callable[[], int]) -> None:
    listen = f"127.0.0.1:{free_port()}"
    first = kind(told(listen))
    try:
        for options in ((), (("grpc.so_reuseport", 1),)):
            with pytest.raises(OSError, match=f"can't listen on {listen}: Address already in use"):
                kind(told(listen, *options))
    finally:
        first.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("form", ["unix:{}", "unix://{}"])
def test_a_unix_socket_on_which_a_server_listens_is_refused(kind: Any, form: str, tmp_path: Path) -> None:
    listen = form.format(tmp_path / "socket")
    first = kind(told(listen))
    try:
        assert first.port == 0
        with pytest.raises(OSError, match="another server is listening on it"):
            kind(told(listen))
        assert rests(listen)
        assert [file.name for file in tmp_path.iterdir()] == ["socket"]
    finally:
        first.close()
    assert list(tmp_path.iterdir()) == [], "its own file is removed"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*OURS, Plain])
def test_a_unix_socket_that_a_killed_server_left_is_taken_over(kind: Any, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(tmp_path / "socket"))
        killed.listen()
    server = kind(told(f"unix:{tmp_path}/socket"))
    try:
        assert rests(f"unix:{tmp_path}/socket")
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OURS)
def test_a_drain_leaves_the_file_of_another_server(kind: Any, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/socket"
    first = kind(told(listen))
    second = Plain(told(listen))  # which takes any path over
    try:
        first.close()
        assert rests(listen)
    finally:
        second.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OURS)
def test_a_file_that_is_no_socket_is_left_alone(kind: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(OSError, match="the path exists and is not a socket"):
        kind(told(f"unix:{file}"))
    assert file.read_text() == "precious"


@pytest.mark.parametrize("kind", OURS)
def test_a_path_that_no_client_could_connect_to_is_refused(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"the path has \d+ bytes; a socket's has at most 107"):
        kind(told(f"unix:{tmp_path}/{'a' * 107}"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", OURS)
def test_an_abstract_socket_is_served_once(kind: Any) -> None:
    listen = f"unix-abstract:weft-test-{os.getpid()}"
    first = kind(told(listen))
    try:
        assert first.port == 0
        with pytest.raises(OSError, match="Address already in use"):
            kind(told(listen))
        assert rests(listen)
    finally:
        first.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(
    ("listen", "advertise"), [("[::]:0", ""), ("[::1]:0", ""), ("[::1]:0", "::1"), ("[::1]:0", "[::1]")]
)
def test_a_mesh_on_ipv6_works_however_its_addresses_are_written(
    kind: Any, listen: str, advertise: str, spawn: Spawn
) -> None:
    registry = spawn.python("-m", "mesh.registry", "--listen", "[::1]:0")
    at = registry.wait_for("serving on [::1]:").partition("serving on ")[2].split()[0]
    server = kind(ServerSettings(listen=listen, advertise=advertise, registry=at, drain_wait=0))
    try:
        with mesh.insecure_channel(f"mesh://{at}/{NAME}") as channel:
            call: Any = channel.unary_unary(f"/{NAME}/Nap")
            eventually(lambda: answered(call))
            assert call.with_call(b"0", timeout=10)[1].explain().attempts[0].address == f"[::1]:{server.port}"
    finally:
        server.close()


def answered(call: Any) -> bool:
    """Whether it is: the server may not have registered yet."""
    try:
        return bool(call(b"0", timeout=10) == b"rested")
    except grpc.RpcError:
        return False


def test_a_socket_whose_queue_is_full_has_a_server(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, ExitStack() as waiting:
        busy.bind(str(tmp_path / "socket"))
        busy.listen(0)
        for _ in range(2):
            client = waiting.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect_ex(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="another server is listening on it"):
            bind(None, f"unix:{tmp_path}/socket")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"{tmp_path}/none is not a writable folder"):
        bind(None, f"unix:{tmp_path}/none/socket")


def test_its_repr_says_where() -> None:
    assert repr(Listener(80)) == "<Listener 80>"
    assert repr(Listener(path=Path("/nowhere/s"))) == "<Listener /nowhere/s>"


@pytest.mark.slow
def test_a_registry_may_listen_on_a_unix_socket_or_on_ipv6(spawn: Spawn, tmp_path: Path) -> None:
    for listen, address in ((f"unix:{tmp_path}/registry", f"unix:{tmp_path}/registry"), ("[::1]:0", "[::1]:")):
        registry = spawn.python("-m", "mesh.registry", "--listen", listen)
        said = registry.wait_for(f"serving on {address}")
        at = said.partition("serving on ")[2].split()[0]
        if not at.startswith("unix:"):
            assert parse(at).port
        with grpc.insecure_channel(at) as channel:
            grpc.channel_ready_future(channel).result(10)
        assert registry.end() == 0
        eventually(lambda: not (tmp_path / "registry").exists())
