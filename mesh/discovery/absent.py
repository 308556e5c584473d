"""What to say of a service that its registry knows no instance of: which registry, and what it does know."""

from __future__ import annotations

import difflib

import grpc

from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

WITHIN = 0.5
"""How long the registry may take to list its services, while calls wait. Seconds."""

LISTED = 5
"""How many services are named: those most alike first."""


async def describe(stub: pb_grpc.RegistryAsyncStub, registry: str, service: str) -> str:
    """ "registry R knows no instance of 'X'; known services: ...", the latter if the registry lists them in time."""
    text = f"registry {registry} knows no instance of {service!r}"
    try:
        listed = await stub.ListInstances(pb.ListInstancesRequest(), timeout=WITHIN)
    except grpc.aio.AioRpcError:
        return text
    services = {instance.service for instance in listed.instances} - {service}
    if not services:
        return f"{text}; it knows no services"
    alike = sorted(services, key=lambda each: (-difflib.SequenceMatcher(None, service, each).ratio(), each))
    more = len(alike) - LISTED
    return f"{text}; known services: {', '.join(alike[:LISTED])}{f' and {more} more' if more > 0 else ''}"
