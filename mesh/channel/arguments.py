"""Checks of the arguments of channels and calls: core would reject them later, or on another thread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc


def checked_text(name: str, value: Any) -> str:
    """The argument ``name``, a target or a method; grpc also accepts bytes there."""
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {value!r}")
    return value


def check_channel_credentials(credentials: Any) -> None:
    """Check the credentials of ``secure_channel``."""
    if not isinstance(credentials, grpc.ChannelCredentials):
        raise TypeError(
            f"credentials: expected grpc.ChannelCredentials, got {credentials!r}; for plaintext use insecure_channel, "
            "and add call credentials with grpc.composite_channel_credentials"
        )


def check_compression(compression: Any) -> None:
    """Check the compression of a channel or a call."""
    if compression is not None and not isinstance(compression, int):  # grpc.Compression is an IntEnum
        raise TypeError(f"compression: expected grpc.Compression, got {compression!r}")


def check_call(credentials: Any, compression: Any) -> None:
    """Check the credentials and the compression of a call."""
    if credentials is not None and not isinstance(credentials, grpc.CallCredentials):
        raise TypeError(f"credentials: expected grpc.CallCredentials, got {credentials!r}")
    check_compression(compression)


def checked_options(options: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """A channel's options by name. What core would reject is rejected here, because core sees it only with the first
    call."""
    given = {}
    for name, value in options:
        if not isinstance(name, str | bytes):
            raise TypeError(f"options: expected a string as the name, got {name!r}")
        if not isinstance(value, str | bytes) and not hasattr(value, "__int__"):
            raise TypeError(f"channel option {name!r}: expected a string, bytes or a number, got {value!r}")
        if isinstance(value, int) and not -(2**31) <= value < 2**31:
            raise OverflowError(f"channel option {name!r}: {value} is beyond 32 bits")
        given[name.decode() if isinstance(name, bytes) else name] = value
    return given
