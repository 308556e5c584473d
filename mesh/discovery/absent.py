"""The error text for a service without instances: which registry was asked, and which services it knows."""

from __future__ import annotations

import asyncio
import difflib

import grpc

from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

LIST_TIMEOUT = 0.5
"""How long to wait for the registry's list of services, while calls wait. Seconds."""

PAGES_READ = 5
"""How many pages of the registry's instances are read."""

LISTED = 5
"""How many services are listed: the most similar names first."""


async def describe(stub: pb_grpc.RegistryAsyncStub, registry: str, service: str) -> str:
    """ "registry R has no instances of 'X'; known services: ...", the latter if the registry lists them in
    time."""
    text = f"registry {registry} has no instances of {service!r}"
    services: set[str] = set()
    token = ""
    try:
        async with asyncio.timeout(LIST_TIMEOUT):
            for _ in range(PAGES_READ):
                listed = await stub.ListInstances(pb.ListInstancesRequest(page_token=token), timeout=LIST_TIMEOUT)
                services |= {instance.service for instance in listed.instances} - {service}
                token = listed.next_page_token
                if not token:
                    break
    except (grpc.aio.AioRpcError, TimeoutError):
        if not services:
            return text
    if not services:
        return f"{text}; known services: none"
    similar = sorted(services, key=lambda each: (-difflib.SequenceMatcher(None, service, each).ratio(), each))
    more = len(similar) - LISTED
    return f"{text}; known services: {', '.join(similar[:LISTED])}{f' and {more} more' if more > 0 else ''}"
