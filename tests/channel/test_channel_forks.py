"""Forked children keep the contract of docs/forking.md: a channel works, or raises at once and names the remedy.

Every program runs in a fresh Python; nothing forks in the tests' own process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

import mesh
from mesh import forking
from mesh.background import OLD_CORE
from tests.channel.suite import UNARY, Server
from tests.processes import REPOSITORY, Spawn, eventually
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

pytestmark = pytest.mark.slow

kept_in_use = pytest.mark.skipif(OLD_CORE, reason="before grpcio 1.80 the mesh has a thread that waits in core")

AT_ONCE = 1.0
"""Seconds, on a busy machine; the calls' deadline is 8."""

MECHANISMS = ["os.fork", "multiprocessing"]
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT)
REMEDY = "Create channels after the fork"
SETTING = "GRPC_ENABLE_FORK_SUPPORT=1"


def environment(support: str, **more: str) -> dict[str, str]:
    return {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": support, **more}


def run(target: str, world: str, age: str, how: str, support: str, parent: str = "", **more: str) -> dict[str, Any]:
    """Run the program to its end; returns what the child saw, its exit code, and the parent's later calls.

    With fork support on, core crashes some children of a process that uses grpc.aio, whatever they do; those are run
    again (docs/forking.md).
    """
    saw = _run(target, world, age, how, support, parent, **more)
    for _ in range(5):
        if support == "0" or (parent or world) not in ("aio", "both") or saw["code"] not in CRASHES:
            break
        saw = _run(target, world, age, how, support, parent, **more)
    return saw


def _run(target: str, world: str, age: str, how: str, support: str, parent: str, **more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.channel.forks", target, world, age, how, *([parent] if parent else [])]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment(support, **more),
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    saw: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        saw |= json.loads(line)
    return saw


def works(saw: dict[str, Any]) -> None:
    assert saw["outcome"] == "ok", saw


def raises(saw: dict[str, Any], *, setting: bool = False) -> None:
    assert saw["outcome"].startswith("RuntimeError"), saw
    assert REMEDY in saw["outcome"]
    assert (SETTING in saw["outcome"]) is setting
    assert saw["took"] < AT_ONCE


def expect(saw: dict[str, Any], world: str, support: str) -> None:
    """What a child sees whose parent used a channel of the same world: the table in docs/forking.md."""
    if support == "0":
        raises(saw, setting=True)
    elif world == "aio":
        raises(saw)
    else:
        works(saw)


@pytest.fixture(params=["static", "plain"])
def target(request: pytest.FixtureRequest, server: Server) -> str:
    return f"static:///{server.address}" if request.param == "static" else server.address


@pytest.mark.parametrize("support", ["0", "1"])
@pytest.mark.parametrize("how", MECHANISMS)
@pytest.mark.parametrize("age", ["old", "new"])
@pytest.mark.parametrize("world", ["sync", "aio"])
def test_a_channel_in_a_forked_child(target: str, world: str, age: str, how: str, support: str) -> None:
    saw = run(target, world, age, how, support)
    expect(saw, world, support)
    assert saw["code"] == 0
    assert saw["parent"] == "ok"  # and the parent's channel is as it was


@pytest.mark.skipif(find_spec("gunicorn") is None, reason="gunicorn isn't installed beside the oldest packages")
@pytest.mark.parametrize("support", ["0", "1"])
@pytest.mark.parametrize("age", ["old", "new"])
@pytest.mark.parametrize("world", ["sync", "aio"])
def test_a_channel_in_a_worker_of_gunicorn(
    world: str, age: str, support: str, server: Server, spawn: Spawn, free_port: Callable[[], int]
) -> None:
    port = free_port()
    gunicorn = spawn.python(
        "-m", "gunicorn", "--preload", "--workers=2", f"--bind=127.0.0.1:{port}", "tests.channel.forks:application()",
        environment={"GRPC_ENABLE_FORK_SUPPORT": support, "FORKS": f"static:///{server.address} {world} {age}"},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/"
    workers: set[str] = set()

    def both_answered() -> bool:
        answered = _get(url)
        if answered is not None:
            worker, answer = answered
            expect(json.loads(answer), world, support)
            workers.add(worker)
        return len(workers) == 2

    # One that hasn't answered may be starting still: gunicorn's workers are deaf to SIGTERM then.
    gunicorn.wait_until(both_answered, what="both workers answered")
    gunicorn.end()
    assert "Worker exiting" in gunicorn.said
    if (world, support) != ("aio", "1"):  # as above
        assert "was sent SIG" not in gunicorn.said.replace("SIGTERM", "")


def _get(url: str) -> tuple[str, bytes] | None:
    """The worker and its answer; None when nobody gave one."""
    try:
        with urllib.request.urlopen(url, timeout=15) as response:
            return response.headers["X-Worker"], response.read()
    except OSError:
        return None


# -- mixed programs


@kept_in_use
@pytest.mark.parametrize("support", ["0", "1"])
@pytest.mark.parametrize("world", ["sync", "aio"])
def test_after_every_channel_was_closed_a_child_makes_new_ones(world: str, support: str, target: str) -> None:
    works(run(target, world, "new", "os.fork", support, "closed"))


def test_a_new_asyncio_channel_works_where_the_parent_used_blocking_ones(target: str) -> None:
    works(run(target, "aio", "new", "os.fork", "1", "sync"))


@pytest.mark.skipif(not forking._restores(), reason="before grpcio 1.82 core ends or blocks such a child itself")
@pytest.mark.parametrize("parent", ["aio", "both"])
def test_a_new_blocking_channel_works_where_the_parent_used_asyncio(parent: str, target: str) -> None:
    works(run(target, "sync", "new", "os.fork", "1", parent))


@pytest.mark.parametrize("support", ["0", "1"])
@pytest.mark.parametrize("parent", ["sync", "aio", "both", "stream"])
@pytest.mark.parametrize("age", ["exit", "close"])
def test_a_child_ends_well(parent: str, age: str, support: str, server: Server) -> None:
    if parent in ("aio", "both") and support == "1" and not forking._restores():
        pytest.skip("before grpcio 1.82 core ends such a child itself")
    saw = run(f"static:///{server.address}", "sync", age, "os.fork", support, parent)
    works(saw)
    assert saw["code"] == 0
    assert set(saw["parent"].split()) == {"ok"}
    server.wait_until_idle()


@pytest.mark.parametrize("support", ["0", "1"])
def test_a_call_that_was_open_at_the_fork_is_cancelled_in_the_child(support: str, server: Server) -> None:
    saw = run(f"static:///{server.address}", "sync", "open", "os.fork", support, "stream")
    stream, future = json.loads(saw["outcome"])
    assert "CANCELLED" in stream
    assert "Call cancelled in fork child" in stream
    assert future.startswith("FutureCancelledError")
    assert saw["took"] < AT_ONCE
    assert saw["parent"] == "ok"


# -- servers


@pytest.mark.parametrize("support", ["0", "1"])
@pytest.mark.parametrize("how", MECHANISMS)
@pytest.mark.parametrize("world", ["sync", "aio"])
def test_a_child_serves_where_the_parent_used_nothing(world: str, how: str, support: str, server: Server) -> None:
    works(run(server.address, world, "serve", how, support, "nothing"))


@kept_in_use
@pytest.mark.parametrize("support", ["0", "1"])
@pytest.mark.parametrize("world", ["sync", "aio"])
def test_a_child_serves_or_says_why_not_where_the_parent_used_channels(
    world: str, support: str, server: Server
) -> None:
    for parent in ("sync", "aio"):
        saw = run(server.address, world, "serve", "os.fork", support, parent)
        if support == "0":
            raises(saw, setting=True)
        elif parent == world == "aio":
            raises(saw)
        else:
            works(saw)


# -- mesh:///: the registry is watched over grpc.aio, on the background thread


@pytest.fixture
def registry(server: Server, spawn: Spawn, free_port: Callable[[], int]) -> str:
    """A registry that knows the server."""
    address = f"127.0.0.1:{free_port()}"
    spawn.python("-m", "mesh.registry", "--listen", address)
    instance = pb.Instance(id="one", service="suite.Suite", address=server.address)
    with grpc.insecure_channel(address) as channel:
        stub: Any = pb_grpc.RegistryStub(channel)
        request = pb.RegisterRequest(instance=instance, ttl=Duration(seconds=120))
        stub.Register(request, timeout=20, wait_for_ready=True)
    return address


@pytest.mark.parametrize("support", ["0", "1"])
@pytest.mark.parametrize("how", MECHANISMS)
@pytest.mark.parametrize("age", ["old", "new"])
def test_a_channel_of_a_registry_in_a_forked_child(age: str, how: str, support: str, registry: str) -> None:
    saw = run("mesh:///suite.Suite", "sync", age, how, support, MESH_REGISTRY=registry)
    expect(saw, "sync", support)
    assert saw["code"] == 0
    assert saw["parent"] == "ok"


def test_a_channel_of_a_registry_says_so_where_the_parent_used_asyncio(registry: str) -> None:
    raises(run("mesh:///suite.Suite", "sync", "new", "os.fork", "1", "aio", MESH_REGISTRY=registry))


# -- what the contract rests on


def test_core_and_grpc_aio_in_use_are_seen() -> None:
    """The names of core's threads and of grpc.aio's, which nobody promises."""
    program = """
import asyncio, gc, time, grpc, grpc.aio
from mesh.forking import aio_in_use, core_in_use
from tests.processes import eventually
print(core_in_use(), aio_in_use())
async def use():
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        channel.get_state(try_to_connect=True)
        eventually(core_in_use)
        print(core_in_use(), aio_in_use())
asyncio.run(use())
gc.collect()
eventually(lambda: not (core_in_use() or aio_in_use()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.split() == ["False", "False", "True", "True"], done.stderr


def test_threads_that_fork_at_once_leave_the_background_thread_running(server: Server) -> None:
    program = """
import os, sys, threading
import mesh
channel = mesh.insecure_channel(sys.argv[1])
unary = channel.unary_unary("/suite.Suite/Unary")
unary(b"ok", timeout=8)

def fork():
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

threads = [threading.Thread(target=fork) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(unary.future(b"ok", timeout=8).result())
another = mesh.insecure_channel(sys.argv[1])  # a new channel is brought to life by the background thread
print(another.unary_unary("/suite.Suite/Unary")(b"ok", timeout=8))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, f"static:///{server.address}"],
        cwd=REPOSITORY, env=environment("0"), capture_output=True, text=True, timeout=40, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["b'ok'", "b'ok'"], done.stderr


def test_a_fork_holds_nothing_up_and_the_background_thread_goes_on(server: Server) -> None:
    """The hooks, without a fork: this process has the threads of other tests."""
    with mesh.insecure_channel(f"static:///{server.address}") as channel:
        unary: Any = channel.unary_unary(UNARY)
        assert unary(b"ok", timeout=5) == b"ok"
        begun = time.monotonic()
        forking._before()
        assert time.monotonic() - begun < AT_ONCE
        forking._after_in_parent()
        assert unary.future(b"ok", timeout=5).result() == b"ok"
        eventually(lambda: any(thread.name == "mesh-background" for thread in threading.enumerate()))


ASKS = """
import asyncio, os, sys
import mesh.aio

async def used():
    channel = mesh.aio.insecure_channel(sys.argv[1])
    await channel.unary_unary(sys.argv[2])(b"ok", timeout=8)
    return channel

loop = asyncio.new_event_loop()
channel = loop.run_until_complete(used())
child = os.fork()
if child == 0:
    stats = channel.stats()
    others = {each.state for each in stats.endpoints} - {"IDLE"}
    print(channel, channel.get_state().name, stats.state, others, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert channel.get_state().name == "READY"
loop.run_until_complete(channel.close())
"""


@pytest.mark.parametrize("form", ["{}", "static:///{}"])
def test_a_used_asyncio_channel_is_idle_in_a_child_that_asks(server: Server, form: str) -> None:
    target = form.format(server.address)
    command = [sys.executable, "-W", "error", "-c", ASKS, target, UNARY]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment("0"), capture_output=True, text=True, timeout=40, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"<mesh.aio.Channel {target} IDLE> IDLE IDLE set()\n"
