"""What tests of the shop's servicers share: calls that fail, and the details of their errors."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

NOBODY = "00000000-0000-4000-8000-000000000000"
"""An unused id."""


async def failure(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    """The error of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


def error_info(error: grpc.aio.AioRpcError) -> tuple[str, str, dict[str, str]]:
    """The reason, domain and metadata in the error's only detail."""
    (detail,) = rpc_status.from_call(error).details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    return info.reason, info.domain, dict(info.metadata)


def reason(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str]:
    """The error's code and reason."""
    return error.code(), error_info(error)[0]


def violations(error: grpc.aio.AioRpcError) -> dict[str, str]:
    """The rule that each field violates, from the error's only detail."""
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    (detail,) = rpc_status.from_call(error).details
    bad = error_details_pb2.BadRequest()
    assert detail.Unpack(bad)
    assert all(violation.description for violation in bad.field_violations)
    return {violation.field: violation.reason for violation in bad.field_violations}
