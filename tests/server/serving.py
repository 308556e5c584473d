"""A service as a process of its own, for tests that send it signals: ``python serving.py aio|sync``.

Its method sleeps as many milliseconds as it is asked to; ``exit code N`` is the last thing that it says.
"""

import asyncio
import logging
import sys
import threading
from typing import Any

import grpc

import mesh.server.aio
import mesh.server.sync

NAME = "test.Sleeper"


async def nap(request: bytes, context: Any) -> bytes:
    print("napping", flush=True)
    await asyncio.sleep(int(request) / 1000)
    return b"rested"


def sync_nap(request: bytes, context: Any) -> bytes:
    print("napping", flush=True)
    threading.Event().wait(int(request) / 1000)
    return b"rested"


def add_to_server(servicer: Any, server: Any) -> None:
    """As generated code does it."""
    handlers: dict[str, Any] = {"Nap": grpc.unary_unary_rpc_method_handler(servicer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
    server.add_registered_method_handlers(NAME, handlers)


def main() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    if sys.argv[1] == "aio":
        return asyncio.run(mesh.server.aio.serve([(add_to_server, nap)]))
    return mesh.server.sync.serve([(add_to_server, sync_nap)])


if __name__ == "__main__":
    code = main()
    print("exit code", code, flush=True)
    sys.exit(code)
