"""Processes, threads and loops: what a program may do around its channels. Each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from mesh.background import OLD_CORE
from tests.channel.suite import Server

HEAD = """
import asyncio, os, signal, sys, threading
import grpc
import mesh, mesh.aio

UNARY, RESPONSES, BOTH = "/suite.Suite/Unary", "/suite.Suite/Responses", "/suite.Suite/Both"
address = sys.argv[1]
target = "static:///" + address

def in_flight(channel):
    return sum(node.in_flight for node in channel.assembly.cluster.nodes.values())

async def call(channel, command=b"ok"):
    return await channel.unary_unary(UNARY)(command, timeout=10)

async def alone():
    async with mesh.aio.insecure_channel(target) as channel:
        return await call(channel)
"""


def run(program: str, server: Server, *, code: int = 0) -> str:
    """Run the program to its end; returns what it printed."""
    text = HEAD + textwrap.dedent(program)
    command = [sys.executable, "-c", text, server.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr
    if not (OLD_CORE and "BlockingIOError: [Errno 11]" in done.stderr):  # grpc.aio logs it when loops share a process
        assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_process_may_fork_before_its_first_call(server: Server) -> None:
    program = """
    channels = [mesh.insecure_channel(target), mesh.insecure_channel(address)]
    aio_channels = [mesh.aio.insecure_channel(target), mesh.aio.insecure_channel(address)]
    assert threading.active_count() == 1

    async def all_of_them():
        return [await call(channel) for channel in aio_channels]

    def use():
        for channel in channels:
            assert channel.unary_unary(UNARY)(b"ok", timeout=10) == b"ok"
            assert list(channel.unary_stream(RESPONSES)(b"count 2", timeout=10)) == [b"0", b"1"]
        assert asyncio.run(all_of_them()) == [b"ok", b"ok"]

    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            use()
            os.write(1, b"child\\n")  # in one piece: two children write at once
            os._exit(0)
        children.append(pid)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    use()
    print("parent", flush=True)
    """
    assert run(program, server).split() == ["child", "child", "parent"]


@pytest.mark.slow
def test_event_loops_one_after_another_and_in_threads(server: Server) -> None:
    program = """
    for _ in range(3):
        assert asyncio.run(alone()) == b"ok"

    done = []
    threads = [threading.Thread(target=lambda: done.append(asyncio.run(alone()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(done)
    """
    assert run(program, server) == f"{[b'ok'] * 3}\n"


@pytest.mark.slow
def test_both_worlds_in_one_process_and_a_channel_made_outside_of_any_loop(server: Server) -> None:
    program = """
    outside = mesh.aio.insecure_channel(target)
    channel = mesh.insecure_channel(target)
    unary = channel.unary_unary(UNARY)

    async def main():
        blocking = asyncio.get_running_loop().run_in_executor(None, lambda: unary(b"ok 1", timeout=10))
        print(await asyncio.gather(call(outside, b"ok 2"), blocking, asyncio.wrap_future(future())))
        print(unary(b"ok 4", timeout=10))  # blocks the loop, and works
        await outside.close()

    def future():
        import concurrent.futures
        result = concurrent.futures.Future()
        inner = unary.future(b"ok 3", timeout=10)
        inner.add_done_callback(lambda done: result.set_result(done.result()))
        return result

    print(unary(b"ok 0", timeout=10))
    asyncio.run(main())
    channel.close()
    """
    assert run(program, server).splitlines() == ["b'ok 0'", "[b'ok 2', b'ok 1', b'ok 3']", "b'ok 4'"]


@pytest.mark.slow
def test_a_keyboard_interrupt_ends_a_call_wherever_it_waits(server: Server) -> None:
    program = """
    import json

    signal.signal(signal.SIGINT, signal.default_int_handler)  # who is started in the background is born ignoring it

    retry = {"maxAttempts": 2, "initialBackoff": "60s", "maxBackoff": "60s", "backoffMultiplier": 1,
             "retryableStatusCodes": ["ABORTED"]}
    hedge = {"maxAttempts": 2, "hedgingDelay": "60s"}
    def options(**policy):
        config = {"methodConfig": [{"name": [{}], **policy}]}
        return [("grpc.service_config", json.dumps(config))]

    plain = mesh.insecure_channel(target)
    nowhere = mesh.insecure_channel("static:///127.0.0.1:1")
    retrying = mesh.insecure_channel(target, options=options(retryPolicy=retry))
    hedging = mesh.insecure_channel(target, options=options(hedgingPolicy=hedge))
    stream = plain.unary_stream(RESPONSES)(b"count 1 hang", timeout=30)
    next(stream)
    pending = plain.unary_unary(UNARY).future(b"hang", timeout=30)
    waits = {
        "blocking": lambda: plain.unary_unary(UNARY)(b"hang", timeout=30),
        "queued": lambda: nowhere.unary_unary(UNARY)(b"ok", wait_for_ready=True),
        "in backoff": lambda: retrying.unary_unary(UNARY)(b"abort ABORTED no", timeout=120),
        "hedged": lambda: hedging.unary_unary(UNARY)(b"hang", timeout=30),
        "reading": lambda: next(stream),
        "result": lambda: pending.result(),
    }
    for name, wait in waits.items():
        try:
            # To this thread: when the kernel gives a signal to another one, a lock that is waited for isn't woken.
            threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
            wait()
        except KeyboardInterrupt:
            print(name)
    stream.cancel()
    pending.cancel()
    pending.code()
    for channel in (plain, nowhere, retrying, hedging):
        assert in_flight(channel) == 0, channel
        channel.close()
    """
    assert run(program, server).splitlines() == ["blocking", "queued", "in backoff", "hedged", "reading", "result"]


@pytest.mark.slow
def test_a_program_may_end_with_channels_and_calls_open(server: Server) -> None:
    program = """
    kept = []
    for where in (target, address, "static:///127.0.0.1:1"):
        channel = mesh.insecure_channel(where)
        kept.append(channel)
        kept.append(channel.unary_unary(UNARY).future(b"hang", wait_for_ready=True))
        kept.append(channel.unary_stream(RESPONSES)(b"count 3 hang", wait_for_ready=True))
        channel.subscribe(lambda state: None, try_to_connect=True)
        channel.stream_stream(BOTH)(iter([b"hang"]), wait_for_ready=True)
    next(kept[2])
    print("end")
    """
    assert run(program, server) == "end\n"


@pytest.mark.slow
def test_a_program_may_end_with_aio_channels_and_calls_open(server: Server) -> None:
    program = """
    kept = []

    async def main():
        for where in (target, address, "static:///127.0.0.1:1"):
            channel = mesh.aio.insecure_channel(where)
            kept.append(channel)
            kept.append(channel.unary_unary(UNARY)(b"hang", wait_for_ready=True))
            kept.append(channel.unary_stream(RESPONSES)(b"count 3 hang", wait_for_ready=True))
        print(await kept[2].read())

    asyncio.run(main())
    print("end")
    """
    assert run(program, server) == "b'0'\nend\n"


@pytest.mark.slow
def test_grpcs_factories_may_be_replaced(server: Server) -> None:
    program = """
    grpc.insecure_channel, grpc.aio.insecure_channel = mesh.insecure_channel, mesh.aio.insecure_channel

    async def main():
        async with grpc.aio.insecure_channel(target) as channel:
            print(await call(channel))

    with grpc.insecure_channel(target) as channel:
        print(channel.unary_unary(UNARY)(b"ok", timeout=10))
    asyncio.run(main())
    """
    assert run(program, server) == "b'ok'\nb'ok'\n"
