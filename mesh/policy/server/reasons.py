"""Why a server refuses a call, and what the caller gets."""

from __future__ import annotations

import enum

from mesh.codes import Code


class Reason(enum.Enum):
    """Why a call was refused."""

    STARTING = "starting"
    DRAINING = "draining"
    DELAY = "delay"
    FULL = "full"
    STREAMS = "streams"
    EXPIRED = "expired"
    LATE = "late"


STATUSES = {
    Reason.STARTING: (Code.UNAVAILABLE, "not ready yet"),
    Reason.DRAINING: (Code.UNAVAILABLE, "shutting down"),
    Reason.DELAY: (Code.RESOURCE_EXHAUSTED, "overloaded: calls miss their deadlines in the queue"),
    Reason.FULL: (Code.RESOURCE_EXHAUSTED, "overloaded: the queue is full"),
    Reason.STREAMS: (Code.RESOURCE_EXHAUSTED, "too many streams are open"),
    Reason.EXPIRED: (Code.DEADLINE_EXCEEDED, "the deadline passed before the handler started"),
    Reason.LATE: (Code.DEADLINE_EXCEEDED, "overloaded: less time is left than the method takes"),
}
"""The status and details that the caller gets, before any figures."""
