"""Why a service refuses a request: what its domain and its store raise. ``services.common.rpc`` answers the caller with it.

Nothing here knows gRPC. ``reason`` and ``metadata`` are for programs (google.rpc.ErrorInfo, AIP-193), the message is
for people.
"""

from __future__ import annotations


class RefusedError(Exception):
    """A request that could not be served, for a reason that its caller can understand.

    ``reason``: which error it is, in UPPER_SNAKE_CASE. ``metadata``: what the message says, for programs.
    """

    def __init__(self, reason: str, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = metadata


class NotFoundError(RefusedError):
    """What the request names doesn't exist."""


class AlreadyExistsError(RefusedError):
    """What the request would make exists."""


class FailedPreconditionError(RefusedError):
    """What the request is about is not in a state for it; the same request fails until that changes."""


class AbortedError(RefusedError):
    """What the request is about has changed since its caller looked at it, who should look again."""


class UnavailableError(RefusedError):
    """Something that the service needs is away; the same request may succeed later."""


class ExhaustedError(RefusedError):
    """Something that the service needs is used up (a disk); the same request may succeed once that is mended."""


class InvalidFieldError(RefusedError):
    """A field of the request holds what its contract forbids, beyond what protovalidate can see."""

    def __init__(self, field: str, reason: str, message: str) -> None:
        super().__init__(reason, f"{field}: {message}")
        self.field = field
        self.description = message


class RequestIdReusedError(AlreadyExistsError):
    """The request_id came before, with other content."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            "REQUEST_ID_REUSED", f"request_id {request_id} came before with other content", request_id=request_id
        )


class EtagMismatchError(AbortedError):
    """The request's etag is not that of now (AIP-154)."""

    def __init__(self, etag: str) -> None:
        super().__init__("ETAG_MISMATCH", f"it has changed since it had the etag {etag}", etag=etag)
