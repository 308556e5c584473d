"""A program that uses a channel, forks, and uses a channel in the child; each in a process of its own, run by
``test_channel_forks.py``. What the child saw is printed as JSON.

``python -m tests.channel.forks TARGET WORLD AGE HOW [PARENT]``; under gunicorn the same words are in ``FORKS``, and a
request is answered with what a call of the worker saw.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import grpc

import mesh
import mesh.aio
from mesh.server import aio as aio_server
from mesh.server import sync as sync_server
from mesh.server.settings import ServerSettings

UNARY, RESPONSES = "/suite.Suite/Unary", "/suite.Suite/Responses"
TIMEOUT = 8  # of calls, in seconds: what raises at once takes far less
WITHIN = 20  # seconds that a child gets


class Program:
    """``world``: of the child's channel, "sync" or "aio". ``age``: whether the child uses the parent's channel ("old"),
    makes one ("new"), closes the parent's ("close"), reads the parent's open calls ("open"), serves ("serve"), or ends
    without using any ("exit"). ``parent``: what the parent has used: "sync", "aio", "both", "nothing", or "closed" (all
    were closed); "stream": calls are open at the fork."""

    def __init__(self, target: str, world: str, age: str, parent: str = "") -> None:
        self.target = target
        self.world = world
        self.age = age
        self.parent = parent or world
        self.sync: Any = None
        self.aio: Any = None
        self.open: list[Any] = []
        self.loop = asyncio.new_event_loop()

    def use(self) -> None:
        """Make the parent's channels, and a call on each."""
        if self.parent in ("sync", "both", "closed", "stream"):
            self.sync = mesh.insecure_channel(self.target)
            self.blocking_call(self.sync)
        if self.parent in ("aio", "both", "closed"):
            self.loop.run_until_complete(self._use_aio())
        if self.parent == "stream":
            stream = self.sync.unary_stream(RESPONSES)(b"count 1 hang", timeout=WITHIN)
            assert next(stream) == b"0"
            self.open = [stream, self.sync.unary_unary(UNARY).future(b"hang", timeout=WITHIN)]
        if self.parent == "closed":
            self.sync.close()
            self.loop.run_until_complete(self.aio.close())
            self.sync = self.aio = None

    async def _use_aio(self) -> None:
        self.aio = mesh.aio.insecure_channel(self.target)
        await self.call(self.aio)

    def blocking_call(self, channel: Any) -> str:
        answer: bytes = channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT)
        return answer.decode()

    async def call(self, channel: Any) -> str:
        answer: bytes = await channel.unary_unary(UNARY)(b"ok", timeout=TIMEOUT)
        return answer.decode()

    def child(self) -> str:
        """What the child does."""
        if self.age == "exit":
            return "ok"
        if self.age == "close":
            if self.sync is not None:
                self.sync.close()
            if self.aio is not None:
                self.loop.run_until_complete(self.aio.close())
            return "ok"
        if self.age == "open":
            stream, future = self.open
            return json.dumps([_outcome(lambda: str(next(stream))), _outcome(lambda: str(future.result(WITHIN)))])
        if self.age == "serve":
            return asyncio.run(self._serve()) if self.world == "aio" else self._serve_blocking()
        if self.world == "aio":
            return self.loop.run_until_complete(self.call(self.aio)) if self.age == "old" else asyncio.run(self._new())
        if self.age == "old":
            return self.blocking_call(self.sync)
        with mesh.insecure_channel(self.target) as channel:
            return self.blocking_call(channel)

    async def _new(self) -> str:
        async with mesh.aio.insecure_channel(self.target) as channel:
            return await self.call(channel)

    async def _serve(self) -> str:
        async def echo(request: bytes, context: object) -> bytes:
            return request

        settings = ServerSettings(listen="127.0.0.1:0", drain_wait=0.0)
        async with (
            aio_server.Server([(_add, echo)], settings) as server,
            mesh.aio.insecure_channel(f"static:///127.0.0.1:{server.port}") as channel,
        ):
            return await self.call(channel)

    def _serve_blocking(self) -> str:
        server = sync_server.Server(
            [(_add, lambda request, context: request)], ServerSettings(listen="127.0.0.1:0", drain_wait=0.0)
        )
        server.start()
        with mesh.insecure_channel(f"static:///127.0.0.1:{server.port}") as channel:
            answer = self.blocking_call(channel)
        server.drain()
        return answer

    def again(self) -> str:
        """The parent's channels once more, after the fork."""
        answers = []
        if self.sync is not None:
            answers.append(self.blocking_call(self.sync))
        if self.aio is not None:
            answers.append(self.loop.run_until_complete(self.call(self.aio)))
        return " ".join(answers)


def _add(behavior: Any, server: Any) -> None:
    handlers: dict[str, Any] = {"Unary": grpc.unary_unary_rpc_method_handler(behavior)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("suite.Suite", handlers),))


def _outcome(work: Callable[[], str]) -> str:
    """What came of it: the answer, or the error by its type and text."""
    try:
        return work()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def _saw(program: Program) -> str:
    begun = time.monotonic()
    outcome = _outcome(program.child)
    return json.dumps({"outcome": outcome, "took": time.monotonic() - begun})


def _fork(program: Program) -> int | str:
    """Run the child with ``os.fork``; returns its exit code."""
    pid = os.fork()
    if pid == 0:
        print(_saw(program), flush=True)
        sys.exit(0)  # with all that the interpreter does at its end
    end = time.monotonic() + WITHIN
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def _multiprocessing(program: Program) -> int | str | None:
    """Run the child with ``multiprocessing``; returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=lambda: print(_saw(program), flush=True))
    process.start()
    process.join(WITHIN)
    if process.exitcode is None:
        process.kill()
        return "hung"
    return process.exitcode


def main(target: str, world: str, age: str, how: str, parent: str = "") -> None:
    program = Program(target, world, age, parent)
    program.use()
    code = (_fork if how == "os.fork" else _multiprocessing)(program)
    print(json.dumps({"code": code, "parent": program.again()}), flush=True)
    for call in program.open:
        call.cancel()


def application() -> Callable[..., list[bytes]]:
    """The WSGI application that gunicorn loads before it forks."""
    program = Program(*os.environ["FORKS"].split())
    program.use()

    def answer(environ: object, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "application/json"), ("X-Worker", str(os.getpid()))])
        return [_saw(program).encode()]

    return answer


if __name__ == "__main__":
    main(*sys.argv[1:])
