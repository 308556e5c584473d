"""Between gRPC and the services: validates each request and answers each error, in one place for all methods."""

from __future__ import annotations

import datetime as dt
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

import grpc
import protovalidate
import structlog
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from services.errors import (
    AlreadyExistsError,
    ExhaustedError,
    InvalidFieldError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)

log = structlog.stdlib.get_logger()

CODES: Sequence[tuple[type[RefusedError], grpc.StatusCode]] = (
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (ExhaustedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
)

OURS = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL})
"""Codes that say that the service is in trouble, not its caller: logged as warnings."""


class Servicer(Protocol):
    """What ``answered`` needs of the servicer."""

    error_domain: str
    """The ``domain`` of its google.rpc.ErrorInfo, ``user.weft`` say: with the reason it names an error (AIP-193)."""


Method = TypeVar("Method", bound=Callable[..., Awaitable[Message]])


def answered(method: Method) -> Method:
    """A unary method of a servicer, which may count on a valid request and raise what ``services.errors`` holds.

    A request that breaks its contract (protovalidate) is answered with INVALID_ARGUMENT and a google.rpc.BadRequest:
    each violation with its field, its description and, as its reason, the id of the rule. A ``RefusedError`` is
    answered with its code and a google.rpc.ErrorInfo; any other exception with INTERNAL, and its traceback goes to the
    log alone. Each failed request leaves a line in the log.
    """

    @functools.wraps(method)
    async def answer(self: Servicer, request: Message, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
        started = time.monotonic()
        violations = protovalidate.collect_violations(request)
        if violations:
            status = _invalid(map(_field_violation, violations))
        else:
            try:
                return await method(self, request, context)
            except InvalidFieldError as error:
                status = _invalid([_violation(error.field, error.description, error.reason)])
            except RefusedError as error:
                status = _refused(error, self.error_domain)
            except Exception:
                log.exception("handler raised", method=method.__qualname__)
                status = _status(grpc.StatusCode.INTERNAL, "internal error; the service's log has the details")
        code = rpc_status.to_status(status).code
        log.log(
            logging.WARNING if code in OURS else logging.INFO,
            "request failed",
            method=method.__qualname__,
            code=code.name,
            error=status.message,
            seconds=round(time.monotonic() - started, 4),
            peer=context.peer(),
        )
        await context.abort_with_status(rpc_status.to_status(status))
        raise AssertionError("unreachable: abort_with_status raises")

    return cast("Method", answer)


def timestamp(instant: dt.datetime) -> Timestamp:
    """An aware instant as messages carry it."""
    message = Timestamp()
    message.FromDatetime(instant)
    return message


def _refused(error: RefusedError, domain: str) -> status_pb2.Status:
    code = next((code for kind, code in CODES if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)
    return _status(
        code, str(error), error_details_pb2.ErrorInfo(reason=error.reason, domain=domain, metadata=error.metadata)
    )


def _invalid(violations: Iterable[error_details_pb2.BadRequest.FieldViolation]) -> status_pb2.Status:
    bad = error_details_pb2.BadRequest(field_violations=violations)
    message = "; ".join(f"{v.field}: {v.description}" for v in bad.field_violations)
    return _status(grpc.StatusCode.INVALID_ARGUMENT, message, bad)


def _violation(field: str, description: str, reason: str) -> error_details_pb2.BadRequest.FieldViolation:
    return error_details_pb2.BadRequest.FieldViolation(field=field, description=description, reason=reason)


def _field_violation(violation: protovalidate.Violation) -> error_details_pb2.BadRequest.FieldViolation:
    proto = violation.proto
    return _violation(_path(proto.field), proto.message, proto.rule_id)


def _path(field: protovalidate.FieldPathPb | None) -> str:
    """A field as google.rpc.BadRequest writes it: ``items[2].sku``."""
    names = []
    for element in field.elements if field is not None else ():
        subscript = "" if element.subscript is None else f"[{element.subscript.value}]"
        names.append(f"{element.field_name}{subscript}")
    return ".".join(names)


def _status(code: grpc.StatusCode, message: str, *details: Message) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
