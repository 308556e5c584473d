"""The disk cache: a client starts while the registry is away."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

import mesh
from mesh.discovery.cache import Cache
from mesh.discovery.registry import RegistryResolver
from tests.discovery.test_discovery_resolvers import eager, odd_registry, of, user, watching
from tests.processes import Spawn, eventually
from tests.registry.serving import BOUND, USER, serving
from tests.registry.serving import eventually as soon
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

REGISTRY = "127.0.0.1:50050"
ECHO = f"/{USER}/Echo"


def known(*ids: str, config: str = "") -> pb.Snapshot:
    return pb.Snapshot(instances=[user(each) for each in ids], service_config=config)


# the file


def test_what_is_saved_is_loaded_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "when needed"
    Cache(folder, REGISTRY, USER).write(known("a", "b", config="{}"))
    Cache(folder, REGISTRY, USER).write(known("a", config="{}"))

    assert Cache(folder, REGISTRY, USER).read() == known("a", config="{}")
    assert [file.suffix for file in folder.iterdir()] == [".binpb"], "and nothing else is left"


@pytest.mark.parametrize(("registry", "service"), [(REGISTRY, "other"), ("unix:/run/r", USER), ("../" * 99, "..")])
def test_each_registry_and_service_has_a_file_of_its_own(tmp_path: Path, registry: str, service: str) -> None:
    folder = tmp_path / "cache"
    Cache(folder, REGISTRY, USER).write(known("a"))
    Cache(folder, registry, service).write(known("b"))

    assert Cache(folder, REGISTRY, USER).read() == known("a")
    assert Cache(folder, registry, service).read() == known("b")
    assert len(list(folder.iterdir())) == 2


def test_what_is_too_old_or_broken_or_not_there_is_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path, REGISTRY, USER, max_age=60)
    assert cache.read() is None

    cache.write(known("a"))
    (file,) = tmp_path.iterdir()
    old = time.time() - 61
    os.utime(file, (old, old))
    assert cache.read() is None

    file.write_bytes(b"\xff\xff\xff")
    assert cache.read() is None
    assert "can't be read" in caplog.text


def test_a_directory_that_can_not_be_written_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    cache = Cache(in_the_way, REGISTRY, USER)
    cache.write(known("a"))
    cache.write(known("a"))
    assert caplog.text.count("can't be written") == 1


def test_it_is_off_unless_a_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESH_CACHE", raising=False)
    assert Cache.from_environment(REGISTRY, USER) is None
    monkeypatch.setenv("MESH_CACHE", str(tmp_path))
    assert repr(Cache.from_environment(REGISTRY, USER)).startswith(f"<Cache {tmp_path}/{USER}@127.0.0.1%3A50050-")


# the resolver


def resolver_at(address: str, folder: Path) -> RegistryResolver:
    return eager(address, cache=Cache(folder, address, USER))


async def test_what_the_registry_tells_is_kept(tmp_path: Path) -> None:
    async with serving() as registry:
        await registry.register(user("a"))
        await registry.stub.SetServiceConfig(pb.SetServiceConfigRequest(service=USER, service_config="{}"))
        cache = Cache(tmp_path, registry.address, USER)
        async with watching(resolver_at(registry.address, tmp_path)) as updates:
            await updates.until("a")
            await soon(lambda: cache.read() is not None)
    snapshot = cache.read()
    assert snapshot is not None
    assert [(each.id, each.address) for each in snapshot.instances] == [("a", "a:1")]
    assert snapshot.service_config == "{}"


async def test_a_registry_that_is_away_is_replaced_by_what_was_kept(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    Cache(tmp_path, address, USER).write(known("a", "b", config="{}"))
    async with watching(resolver_at(address, tmp_path)) as updates:
        update = await updates.next()
        assert of(update) == "a b"
        assert update.service_config == "{}"
        assert (await updates.next()).error.startswith(f"registry {address}: UNAVAILABLE")


@pytest.mark.slow
async def test_a_registry_that_accepts_and_says_nothing_is_taken_for_away(tmp_path: Path) -> None:
    async def watch(_: bytes, __: Any) -> None:
        await asyncio.get_running_loop().create_future()

    async with odd_registry(watch) as address:
        Cache(tmp_path, address, USER).write(known("a"))
        async with watching(resolver_at(address, tmp_path)) as updates:
            assert of(await updates.next()) == "a"


async def test_a_registry_that_answers_is_believed_and_not_what_was_kept(tmp_path: Path) -> None:
    async with serving() as registry:
        await registry.register(user("new"))
        Cache(tmp_path, registry.address, USER).write(known("old"))
        async with watching(resolver_at(registry.address, tmp_path)) as updates:
            assert of(await updates.next()) == "new"


async def test_a_registry_that_was_restarted_too_and_knows_nobody_yet_evicts_nobody(tmp_path: Path) -> None:
    async with serving() as registry:
        Cache(tmp_path, registry.address, USER).write(known("a", "b"))
        async with watching(resolver_at(registry.address, tmp_path)) as updates:
            assert of(await updates.next()) == "a b"
            await registry.register(user("c"))
            assert of(await updates.next()) == "a b c"


# the flap guard


async def test_a_registry_that_flaps_changes_nothing() -> None:
    async with serving() as registry:
        await registry.register(user("a"))
        lease = await registry.register(user("b"))
        resolver = RegistryResolver(registry.address, USER, probation=BOUND, rng=random.Random(1))
        async with watching(resolver) as updates:
            await updates.until("a b")
            for _ in range(20):
                await registry.stub.Deregister(pb.DeregisterRequest(lease_id=lease))
                lease = await registry.register(user("b"))
            await registry.register(user("c"))
            assert [of(update) for update in await updates.until("a b c")] == ["a b c"]


async def test_an_instance_that_stays_away_is_let_go_without_further_news() -> None:
    async with serving() as registry:
        await registry.register(user("a"))
        lease = await registry.register(user("b"))
        async with watching(eager(registry.address, probation=0.05)) as updates:
            await updates.until("a b")
            await registry.stub.Deregister(pb.DeregisterRequest(lease_id=lease))
            assert of(await updates.next()) == "a"


# whole


@pytest.fixture
def server() -> Iterator[str]:
    """A server that echoes; yields its address."""
    threads = futures.ThreadPoolExecutor(2)
    server = grpc.server(threads)
    echo: Any = grpc.unary_unary_rpc_method_handler(lambda request, _: request)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(USER, {"Echo": echo}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()
    threads.shutdown()


@pytest.mark.slow
def test_a_client_starts_after_the_registry_was_killed(
    server: str,
    spawn: Spawn,
    free_port: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MESH_CACHE", str(folder))
    registry = f"127.0.0.1:{free_port()}"
    process = spawn.python("-m", "mesh.registry", "--listen", registry)
    process.wait_for("serving on")
    with grpc.insecure_channel(registry) as plain:
        instance = pb.Instance(id="a", service=USER, address=server)
        pb_grpc.RegistryStub(plain).Register(pb.RegisterRequest(instance=instance), timeout=BOUND)
    target = f"mesh://{registry}/{USER}"
    with mesh.insecure_channel(target) as channel:
        echo: Any = channel.unary_unary(ECHO)
        assert echo(b"before", timeout=BOUND) == b"before"
        eventually(lambda: list(folder.glob("*.binpb")))

    process.kill()
    with mesh.insecure_channel(target) as channel:
        echo = channel.unary_unary(ECHO)
        assert echo(b"after", timeout=BOUND) == b"after"
