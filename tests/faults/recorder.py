"""A service as a process that writes down what it is asked and what it runs: ``python recorder.py FILE``.

``asked /SERVICE/METHOD`` is written for each call of whatever service; ``ran ID`` for each run of a method of its own,
before it does anything else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

import mesh.aio
from mesh.server.settings import ServerSettings

NAME = "test.Recorder"


class Recorder(grpc.aio.ServerInterceptor):
    """The service. No method says that it may be run twice."""

    def __init__(self, file: Path) -> None:
        # Unbuffered and appending: what is written survives SIGKILL.
        self._file = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._held = 0
        self._release = asyncio.Event()

    def _write(self, *words: str) -> None:
        os.write(self._file, (" ".join(words) + "\n").encode())

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        self._write("asked", str(details.method))
        return await continuation(details)

    async def once(self, request: bytes, context: Any) -> bytes:
        """Answer at once."""
        self._write("ran", request.decode())
        return b"done"

    async def count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """Stream ten numbers, over as many turns of the loop."""
        self._write("ran", request.decode())
        for number in range(10):
            yield b"%d" % number
            await asyncio.sleep(0.001)

    async def hold(self, request: bytes, context: Any) -> bytes:
        """Answer when Release was called."""
        self._write("ran", request.decode())
        self._held += 1
        try:
            await self._release.wait()
            return b"done"
        finally:
            self._held -= 1

    async def hold_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """As Hold, after a first message."""
        yield b"held"
        yield await self.hold(request, context)

    async def release(self, request: bytes, context: Any) -> bytes:
        """Let all go that are held, and hold nobody any more."""
        self._release.set()
        return b""

    async def held(self, request: bytes, context: Any) -> bytes:
        """How many are held."""
        return b"%d" % self._held

    def add_to_server(self, _: object, server: Any) -> None:
        """As generated code does it."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers: dict[str, Any] = {
            "Once": unary(self.once),
            "Count": stream(self.count),
            "Hold": unary(self.hold),
            "HoldStream": stream(self.hold_stream),
            "Release": unary(self.release),
            "Held": unary(self.held),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
        server.add_registered_method_handlers(NAME, handlers)


async def main() -> int:
    recorder = Recorder(Path(sys.argv[1]))
    settings = dataclasses.replace(ServerSettings.from_env(), interceptors=[recorder])
    return await mesh.aio.serve([(recorder.add_to_server, recorder)], settings)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
