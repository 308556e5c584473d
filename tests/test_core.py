"""gRPC's own channels: the private names that the mesh uses are there, and instrumentation doesn't reach them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from mesh import core
from mesh.discovery.registry import RegistryResolver
from mesh.server.registration import Registration
from tests.channel.suite import UNARY, Server
from tests.processes import REPOSITORY, eventually
from tests.registry.serving import USER, instance, serving


def test_a_channel_is_grpcs_and_tells_its_state(server: Server) -> None:
    channel: Any = core.channel(server.address)
    with channel:
        assert core.state(channel, True) in range(5)
        assert channel.unary_unary(UNARY)(b"ok", timeout=5) == b"ok"
        eventually(lambda: core.state(channel, False) == grpc.ChannelConnectivity.READY.value[0], within=5)


async def test_an_aio_channel_is_grpcs(server: Server) -> None:
    channel: Any = core.aio_channel(server.address, [("grpc.max_receive_message_length", 1)])
    async with channel:
        with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED"):
            await channel.unary_unary(UNARY)(b"ok", timeout=5)


@pytest.fixture
def server() -> Any:
    server = Server()
    yield server
    server.stop()


INSTRUMENTED = """
import asyncio, sys
import grpc, grpc.aio

plain, aio_plain = grpc.insecure_channel, grpc.aio.insecure_channel
spans = []

class Client(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    def intercept_unary_unary(self, continuation, details, request):
        spans.append(details.method)
        return continuation(details, request)
    intercept_unary_stream = intercept_unary_unary

grpc.insecure_channel = lambda *a, **k: grpc.intercept_channel(plain(*a, **k), Client())
def refuse(*_, **__):
    raise AssertionError("an internal channel is instrumented")
grpc.secure_channel = grpc.aio.insecure_channel = grpc.aio.secure_channel = refuse

import mesh, mesh.aio
target, method = sys.argv[1:]
with mesh.insecure_channel(target) as channel:
    print(channel.unary_unary(method)(b"ok", timeout=5))

own, grpc.insecure_channel = grpc.insecure_channel, mesh.insecure_channel
with grpc.insecure_channel(target) as channel:
    print(channel.unary_unary(method)(b"ok", timeout=5))
grpc.insecure_channel = own

async def main():
    async with mesh.aio.insecure_channel(target) as channel:
        print(await channel.unary_unary(method)(b"ok", timeout=5))

asyncio.run(main())
print(spans)
"""


@pytest.mark.slow
def test_a_channel_works_where_instrumentation_came_first(server: Server) -> None:
    program = [sys.executable, "-c", INSTRUMENTED, f"static:///{server.address}", UNARY]
    done = subprocess.run(program, capture_output=True, text=True, timeout=30, cwd=REPOSITORY, check=False)
    # A blocking call has the one span that it would have on gRPC's own channel, also where the mesh's function has
    # become gRPC's; what can't be read is said.
    assert done.stdout.splitlines() == ["b'ok'", "b'ok'", "b'ok'", f"['{UNARY}', '{UNARY}']"], done.stderr
    assert "calls are not instrumented: can't read the interceptors" in done.stderr


async def test_the_registrys_rpcs_are_not_instrumented(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an internal channel is instrumented")

    async with serving() as registry:
        for name in ("insecure_channel", "secure_channel"):
            monkeypatch.setattr(grpc, name, refuse)
            monkeypatch.setattr(grpc.aio, name, refuse)
        registration = Registration(registry.address, [instance("one")], ttl=10)
        registration.start()
        updates = RegistryResolver(registry.address, USER).updates()
        async with asyncio.timeout(10):
            async for update in updates:
                if update.endpoints:
                    break
        await updates.aclose()
        await registration.close(5)


NAMES = (
    "_channel import Channel",
    "check_connectivity_state",
    " grpc.insecure_channel(",
    " grpc.aio.insecure_channel(",
)


def test_core_channels_are_made_in_one_place() -> None:
    using = {
        path.relative_to(REPOSITORY).as_posix()
        for path in Path(REPOSITORY / "mesh").rglob("*.py")
        if any(name in path.read_text() for name in NAMES)
    }
    assert using == {"mesh/core.py"}
