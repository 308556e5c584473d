"""Between gRPC and the services: validates requests and turns errors into statuses, in one place for all methods."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import functools
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import grpc
import protovalidate
import structlog
from google.protobuf import any_pb2
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from services.common.errors import (
    AbortedError,
    AlreadyExistsError,
    ExhaustedError,
    FailedPreconditionError,
    InvalidFieldError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from services.common.tracing import trace_context

log = structlog.stdlib.get_logger()

CODES: Sequence[tuple[type[RefusedError], grpc.StatusCode]] = (
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (FailedPreconditionError, grpc.StatusCode.FAILED_PRECONDITION),
    (AbortedError, grpc.StatusCode.ABORTED),
    (ExhaustedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
)

SERVICE_FAULTS = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL})
"""Codes that mean a problem of the service, not of its caller: logged as warnings."""


class Servicer(Protocol):
    """What ``unary_method`` and ``stream_method`` need of the servicer."""

    error_domain: str
    """The ``domain`` of its google.rpc.ErrorInfo, such as ``user.weft``; domain and reason identify an error
    (AIP-193)."""


AddToServer = Callable[[Any, Any], None]
Method = TypeVar("Method", bound=Callable[..., Awaitable[Message]])
Stream = TypeVar("Stream", bound=Callable[..., AsyncIterator[Message]])
Context = grpc.aio.ServicerContext[Any, Any]

LOGGED_FIELDS = ("request_id", "id", "user_id")
"""Fields of a failed request that are logged, if they hold a UUID: nothing else that a caller wrote is."""

MAX_REQUEST = 64 * 1024
"""Bytes of a request, at most. The largest valid one has 38,000: 1,000 ids."""

MAX_ITEMS = 1_000
"""Elements of a repeated field, at most. Checked first, as validating 32,000 empty ones takes a second."""

MAX_MESSAGE, MAX_DETAILS = 500, 3_000
"""Bytes of an error's message, and of its violations, at most. Clients accept 8 KiB of trailers, in which one byte of
the message may take three, and three bytes of details take four."""

MAX_TEXT = 200
"""Characters of a violation's field and of its description, at most."""

_UUID = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclasses.dataclass(frozen=True, slots=True)
class Unparsable:
    """Takes the place of a request that can't be parsed. ``why``: what is wrong with it."""

    why: str


def reject_unparsable(add_to_server: AddToServer) -> AddToServer:
    """Wraps a generated ``add_XServicer_to_server``, for servicers that use ``unary_method`` and ``stream_method``.

    Requests that can't be parsed are then logged and fail with INVALID_ARGUMENT, like other invalid requests. gRPC
    itself would answer UNKNOWN or INTERNAL, as if the service were broken.
    """

    def add(servicer: Any, server: Any) -> None:
        add_to_server(servicer, _ParsingServer(server))

    return add


class _ParsingServer:
    """Takes the place of the server while a servicer is added."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Does nothing: the same methods are also registered by name."""

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        handlers = {
            name: handler._replace(request_deserializer=_parse_or_unparsable(handler.request_deserializer))
            for name, handler in method_handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service_name, handlers),))
        self._server.add_registered_method_handlers(service_name, handlers)


def _parse_or_unparsable(parse: Callable[[bytes], Message]) -> Callable[[bytes], Message | Unparsable]:
    def read(data: bytes) -> Message | Unparsable:
        if len(data) > MAX_REQUEST:
            return Unparsable(f"the request has {len(data)} bytes; the limit is {MAX_REQUEST}")
        try:
            return parse(data)
        except DecodeError:
            # ``parse`` is the FromString of a generated class.
            return Unparsable(f"the request is not a {getattr(parse, '__self__', Message).DESCRIPTOR.full_name}")

    return read


def unary_method(method: Method) -> Method:
    """Decorates a unary method of a servicer: it gets only valid requests, and may raise ``services.common.errors``.

    An invalid request (by protovalidate) fails with INVALID_ARGUMENT and a google.rpc.BadRequest: each violation with
    its field, its description and, as the reason, the id of the rule. A ``RefusedError`` becomes its code and a
    google.rpc.ErrorInfo. Any other exception becomes INTERNAL, with its traceback only in the log. Each failed request
    is logged.
    """

    @functools.wraps(method)
    async def call(self: Servicer, request: Message | Unparsable, context: Context) -> Message:
        started = time.monotonic()
        status = _validate(request)
        if status is None:
            try:
                return await method(self, request, context)
            except Exception as error:
                status = _status_for(error, method.__qualname__, self.error_domain)
        await _abort(status, method.__qualname__, request, context, started)
        raise AssertionError("unreachable: abort_with_status raises")

    return cast("Method", call)


def stream_method(method: Stream) -> Stream:
    """Like ``unary_method``, for a method that responds with a stream."""

    @functools.wraps(method)
    async def call(self: Servicer, request: Message | Unparsable, context: Context) -> AsyncIterator[Message]:
        started = time.monotonic()
        status = _validate(request)
        if status is None:
            try:
                async with contextlib.aclosing(cast("AsyncGenerator[Message]", method(self, request, context))) as it:
                    async for response in it:
                        yield response
                return
            except Exception as error:
                status = _status_for(error, method.__qualname__, self.error_domain)
        await _abort(status, method.__qualname__, request, context, started)

    return cast("Stream", call)


def call_trace(context: Context) -> dict[str, str]:
    """The W3C trace context of a call; empty if there is none, or none that can be passed on."""
    metadata = context.invocation_metadata() or ()
    return trace_context({key: str(value) for key, value in metadata})


def _validate(request: Message | Unparsable) -> status_pb2.Status | None:
    """The status for an invalid request; None for a valid one."""
    if isinstance(request, Unparsable):
        return _status(grpc.StatusCode.INVALID_ARGUMENT, request.why)
    for field, value in request.ListFields():
        if not isinstance(value, str | bytes) and hasattr(value, "__len__") and len(value) > MAX_ITEMS:
            too_many = f"has {len(value)} elements; the limit is {MAX_ITEMS}"
            return _invalid([_violation(field.name, too_many, "repeated.max_items")])
    violations = protovalidate.collect_violations(request)
    return _invalid(map(_field_violation, violations)) if violations else None


def _status_for(error: Exception, method: str, domain: str) -> status_pb2.Status:
    if isinstance(error, InvalidFieldError):
        return _invalid([_violation(error.field, error.description, error.reason)])
    if isinstance(error, RefusedError):
        return _refusal(error, domain)
    log.error("handler raised", method=method, exc_info=error)
    return _status(grpc.StatusCode.INTERNAL, "internal error; see the service's log")


async def _abort(
    status: status_pb2.Status, method: str, request: Message | Unparsable, context: Context, started: float
) -> None:
    code = rpc_status.to_status(status).code
    log.log(
        logging.WARNING if code in SERVICE_FAULTS else logging.INFO,
        "request failed",
        method=method,
        code=code.name,
        error=_for_log(status),
        seconds=round(time.monotonic() - started, 4),
        peer=context.peer(),
        **call_trace(context),
        **{name: value for name in LOGGED_FIELDS if _UUID.fullmatch(value := getattr(request, name, ""))},
    )
    await context.abort_with_status(rpc_status.to_status(status))


def _for_log(status: status_pb2.Status) -> str:
    """What is wrong, without what the caller wrote: for an invalid request, the fields and the rules they violate."""
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return "; ".join(f"{violation.field}: {violation.reason}" for violation in bad.field_violations)
    return str(status.message)


def fields_to_update(
    mask: FieldMask, message: Message, fields: Collection[str], output_only: Collection[str]
) -> set[str]:
    """Which of ``fields`` an update changes (AIP-134): those in ``mask``; without one, those that are set in
    ``message``; with ``*``, all. ``output_only``: fields that only the service sets, which are ignored (AIP-203).

    Raises InvalidFieldError for an unknown field.
    """
    paths = set(mask.paths)
    if not paths:
        return {field for field in fields if "." not in field and getattr(message, field) != _unset(message, field)}
    if paths == {"*"}:
        return {field for field in fields if "." not in field}
    for path in mask.paths:
        if path not in fields and path not in output_only:
            raise InvalidFieldError("update_mask", "UNKNOWN_FIELD", f"{path!r} must be one of {', '.join(fields)}")
    return paths - set(output_only)


def _unset(message: Message, field: str) -> object:
    return getattr(type(message)(), field)


def timestamp(instant: dt.datetime) -> Timestamp:
    """An aware datetime as a protobuf Timestamp."""
    message = Timestamp()
    message.FromDatetime(instant)
    return message


def _refusal(error: RefusedError, domain: str) -> status_pb2.Status:
    code = next((code for kind, code in CODES if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)
    return _status(
        code, str(error), error_details_pb2.ErrorInfo(reason=error.reason, domain=domain, metadata=error.metadata)
    )


def _invalid(violations: Iterable[error_details_pb2.BadRequest.FieldViolation]) -> status_pb2.Status:
    bad = error_details_pb2.BadRequest()
    for violation in violations:
        bad.field_violations.append(violation)
        if bad.ByteSize() > MAX_DETAILS:
            break
    message = "; ".join(f"{v.field}: {v.description}" for v in bad.field_violations)
    return _status(grpc.StatusCode.INVALID_ARGUMENT, message, bad)


def _violation(field: str, description: str, reason: str) -> error_details_pb2.BadRequest.FieldViolation:
    return error_details_pb2.BadRequest.FieldViolation(
        field=_short(field), description=_short(description), reason=reason
    )


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


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
    encoded = message.encode()
    if len(encoded) > MAX_MESSAGE:
        message = f"{encoded[:MAX_MESSAGE].decode(errors='ignore')}..."
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
