"""What the public functions are given, checked before it is used: core would refuse it on another thread, or later."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc


def text_of(name: str, value: Any) -> str:
    """The argument ``name``, a target or a method, which grpc also takes as bytes."""
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {value!r}")
    return value


def check_channel_credentials(credentials: Any) -> None:
    """Of ``secure_channel``."""
    if not isinstance(credentials, grpc.ChannelCredentials):
        raise TypeError(
            f"credentials: expected grpc.ChannelCredentials, got {credentials!r}; for plaintext use insecure_channel, "
            "and add call credentials with grpc.composite_channel_credentials"
        )


def check_compression(compression: Any) -> None:
    """Of a channel or a call."""
    if compression is not None and not isinstance(compression, int):  # grpc.Compression is an IntEnum
        raise TypeError(f"compression: expected grpc.Compression, got {compression!r}")


def check_call(credentials: Any, compression: Any) -> None:
    """Of a call, where either is given."""
    if credentials is not None and not isinstance(credentials, grpc.CallCredentials):
        raise TypeError(f"credentials: expected grpc.CallCredentials, got {credentials!r}")
    check_compression(compression)


def checked(options: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """A channel's options by name. What core would refuse is refused here, because core sees it only when a call is
    made."""
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
