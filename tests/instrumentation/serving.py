"""The echo service as a process of its own, with nothing of instrumentation in it: ``serving.py aio|sync``. Settings
come from the environment."""

from __future__ import annotations

import asyncio
import logging
import sys

import mesh
import mesh.aio
from tests.instrumentation.echo import add_aio, add_sync

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    if sys.argv[1] == "aio":
        sys.exit(asyncio.run(mesh.aio.serve([(add_aio("test.Echo"), None)])))
    sys.exit(mesh.serve([(add_sync("test.Echo"), None)]))
