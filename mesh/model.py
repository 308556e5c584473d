"""The values that the mesh passes around: endpoints, calls, the flow's steps and wake-ups, outcomes and verdicts.

A flow (``policy/flow.py``) yields steps and is sent wake-ups; a driver (``channel/drive.py``) performs the steps. Nothing here
does IO or knows gRPC's classes. Instants (``now``, ``until``, ``deadline``) are monotonic seconds; timeouts are spans in
seconds. What is made for every call is slotted and not frozen: freezing costs up to a microsecond each.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Metadatum = tuple[str, str | bytes]


class Code(enum.IntEnum):
    """gRPC's status codes by number."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Connectivity(enum.IntEnum):
    """The state of an endpoint's connection, or of a channel over all of them, with gRPC core's numbers."""

    IDLE = 0
    CONNECTING = 1
    READY = 2
    TRANSIENT_FAILURE = 3
    SHUTDOWN = 4


class Idempotency(enum.Enum):
    """What a method's descriptor says of its side effects (``idempotency_level``)."""

    UNKNOWN = 0
    NO_SIDE_EFFECTS = 1
    IDEMPOTENT = 2


@dataclass(frozen=True, slots=True)
class Locality:
    """Where an endpoint runs, from the largest to the smallest."""

    region: str = ""
    zone: str = ""
    sub_zone: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address that may be called: ``host:port``, or a target that gRPC itself takes (``unix:path``).

    ``weight`` is its share of the load against others; ``priority`` 0 is used before 1.
    """

    address: str
    locality: Locality = Locality()
    weight: int = 1
    priority: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
