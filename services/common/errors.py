"""Errors that a service's domain and store raise; ``services.common.rpc`` turns them into statuses.

Nothing here depends on gRPC. ``reason`` and ``metadata`` are for programs (google.rpc.ErrorInfo, AIP-193), the message
is for people.
"""

from __future__ import annotations


class RefusedError(Exception):
    """A request that was refused, for a reason that concerns its caller.

    ``reason``: identifies the error, in UPPER_SNAKE_CASE. ``metadata``: the values in the message, for programs.
    """

    def __init__(self, reason: str, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = metadata


class NotFoundError(RefusedError):
    """The resource doesn't exist."""


class AlreadyExistsError(RefusedError):
    """The resource exists already."""


class FailedPreconditionError(RefusedError):
    """The resource is in the wrong state; the same request fails until that changes."""


class AbortedError(RefusedError):
    """The resource has changed since the caller read it; the caller should read it again."""


class UnavailableError(RefusedError):
    """Something that the service needs is unavailable; the same request may succeed later."""


class ExhaustedError(RefusedError):
    """Something that the service needs is exhausted, such as a disk; the same request may succeed once that is
    fixed."""


class InvalidFieldError(RefusedError):
    """A field of the request is invalid in a way that protovalidate can't check."""

    def __init__(self, field: str, reason: str, message: str) -> None:
        super().__init__(reason, f"{field}: {message}")
        self.field = field
        self.description = message


class RequestIdReusedError(AlreadyExistsError):
    """The request_id was used before, with different content."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            "REQUEST_ID_REUSED",
            f"request_id {request_id} was used before with different content",
            request_id=request_id,
        )


class EtagMismatchError(AbortedError):
    """The request's etag is not the current one (AIP-154)."""

    def __init__(self, etag: str) -> None:
        super().__init__("ETAG_MISMATCH", f"etag {etag} is not current: the resource has changed", etag=etag)
