"""A client as a process that waits for answers which don't come: ``python vanishing.py sync|aio ADDRESS COUNT``.

It makes as many calls and as many streams, says ``waiting``, and is there to be killed.
"""

import asyncio
import sys
from typing import Any

import mesh
import mesh.aio

_, world, address, count = sys.argv


def held(channel: Any) -> list[Any]:
    unary = channel.unary_unary("/test.Recorder/Hold")
    stream = channel.unary_stream("/test.Recorder/HoldStream")
    kinds = [unary if world == "aio" else unary.future, stream]
    return [start(b"held", wait_for_ready=True) for _ in range(int(count)) for start in kinds]


async def aio() -> None:
    async with mesh.aio.insecure_channel(f"static:///{address}") as channel:
        calls = held(channel)
        print("waiting", flush=True)
        await asyncio.gather(*[call.code() for call in calls])


if world == "aio":
    asyncio.run(aio())
else:
    with mesh.insecure_channel(f"static:///{address}") as channel:
        calls = held(channel)
        print("waiting", flush=True)
        print([call.code() for call in calls])
