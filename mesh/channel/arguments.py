"""What the public functions are given, checked before it is used: core would refuse it on another thread, or later."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc

from mesh import core


def text_of(target: Any) -> str:
    """The target, which grpc also takes as bytes."""
    if isinstance(target, bytes):
        return target.decode()
    if not isinstance(target, str):
        raise TypeError(f"target: expected a string, got {target!r}")
    return target


def check_channel_credentials(credentials: Any, *, plaintext: bool) -> None:
    """Of ``secure_channel``. ``plaintext``: whether credentials that are none are taken (grpc.aio takes them)."""
    if not isinstance(credentials, grpc.ChannelCredentials):
        raise TypeError(
            f"credentials: expected grpc.ChannelCredentials, got {credentials!r}; for plaintext use insecure_channel"
        )
    if not plaintext and core.insecure(credentials):
        raise ValueError("secure_channel cannot be called with insecure credentials. Call insecure_channel instead.")


def check_compression(compression: Any) -> None:
    """Of a channel or a call."""
    if compression is not None and not isinstance(compression, int):  # grpc.Compression is an IntEnum
        raise TypeError(f"compression: expected grpc.Compression, got {compression!r}")


def check_call(credentials: Any, compression: Any) -> None:
    """Of a call, where either is given."""
    if credentials is not None and not isinstance(credentials, grpc.CallCredentials):
        raise TypeError(f"credentials: expected grpc.CallCredentials, got {credentials!r}")
    check_compression(compression)


def checked(options: Iterable[Any]) -> dict[str, Any]:
    """A channel's options by name. What core would refuse is refused here, because core sees it only when a call is
    made."""
    given = {}
    for option in options:
        if not isinstance(option, tuple | list) or len(option) != 2:
            raise TypeError(f"options: expected (name, value) pairs, got {option!r}")
        name, value = option
        if not isinstance(name, str | bytes):
            raise TypeError(f"options: expected a string as the name, got {name!r}")
        if not isinstance(value, str | bytes) and not hasattr(value, "__int__"):
            raise TypeError(f"channel option {name!r}: expected a string, bytes or a number, got {value!r}")
        if isinstance(value, int) and not -(2**31) <= value < 2**31:
            raise OverflowError(f"channel option {name!r}: {value} is beyond 32 bits")
        given[name.decode() if isinstance(name, bytes) else name] = value
    return given
