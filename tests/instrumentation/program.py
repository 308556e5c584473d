"""A program with an instrumented server and an instrumented client: ``program.py FRAMEWORK aio|sync before|after``.

``before`` or ``after``: when it sets up the instrumentation, seen from ``import mesh``. Prints one line of JSON: what
its calls returned, and which spans there were.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from typing import Any

import grpc

# As a program without the mesh would: instrumentation needs nothing of it.
from tests.instrumentation.calls import BOUND, CONFIG, aio_calls, sync_calls
from tests.instrumentation.frameworks import FRAMEWORKS


def main(name: str, world: str, order: str) -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    framework: Any = None
    if order == "before":
        framework = FRAMEWORKS[name]()

    import mesh
    import mesh.aio
    import mesh.server.aio
    import mesh.server.sync
    from mesh.server.settings import ServerSettings
    from tests.instrumentation.echo import add_aio, add_sync

    if order == "after":
        framework = FRAMEWORKS[name]()
    settings = ServerSettings(
        listen="127.0.0.1:0", registry=os.environ["MESH_REGISTRY"], drain_wait=0.0, reflection=True
    )
    options = [("grpc.service_config", CONFIG)]

    async def run_aio() -> dict[str, str]:
        async with (
            mesh.server.aio.Server([(add_aio("test.Echo"), None)], settings),
            mesh.aio.insecure_channel("mesh:///test.Echo", options) as channel,
        ):
            await channel.channel_ready()
            with framework.tracing():
                return await aio_calls(channel, mesh.explain)

    def run_sync() -> dict[str, str]:
        with (
            mesh.server.sync.Server([(add_sync("test.Echo"), None)], settings),
            mesh.insecure_channel("mesh:///test.Echo", options) as channel,
        ):
            grpc.channel_ready_future(channel).result(BOUND)
            with framework.tracing():
                return sync_calls(channel, mesh.explain)

    seen = asyncio.run(run_aio()) if world == "aio" else run_sync()
    print(json.dumps({"seen": seen, "spans": framework.spans()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
