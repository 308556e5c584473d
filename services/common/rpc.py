"""Between gRPC and the services: validates each request and answers each error, in one place for all methods."""

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
from services.events import traced

log = structlog.stdlib.get_logger()

CODES: Sequence[tuple[type[RefusedError], grpc.StatusCode]] = (
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (FailedPreconditionError, grpc.StatusCode.FAILED_PRECONDITION),
    (AbortedError, grpc.StatusCode.ABORTED),
    (ExhaustedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
)

OURS = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL})
"""Codes that say that the service is in trouble, not its caller: logged as warnings."""


class Servicer(Protocol):
    """What ``answered`` needs of the servicer."""

    error_domain: str
    """The ``domain`` of its google.rpc.ErrorInfo, ``user.weft`` say: with the reason it names an error (AIP-193)."""


AddToServer = Callable[[Any, Any], None]
Method = TypeVar("Method", bound=Callable[..., Awaitable[Message]])
Stream = TypeVar("Stream", bound=Callable[..., AsyncIterator[Message]])
Context = grpc.aio.ServicerContext[Any, Any]

NAMED = ("request_id", "id", "user_id")
"""Fields of a request that its line in the log has, too: UUIDs, and nothing else that a caller writes there."""

MAX_REQUEST = 64 * 1024
"""Bytes of a request, at the most. The largest that is valid has 38,000: 1,000 ids."""

MAX_ITEMS = 1_000
"""Elements of a repeated field, at the most. Checked first: to validate 32,000 empty ones takes a second."""

MAX_MESSAGE, MAX_DETAILS = 500, 3_000
"""Bytes of an error's message, and of the violations that it names, at the most. A client takes 8 KiB of trailers, in
which a byte of the message may need three, and three of the details need four."""

MAX_TEXT = 200
"""Characters of a violation's field and of its description, at the most."""

_UUID = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands in for a request that is not even looked at. ``why``: what is wrong with it."""

    why: str


def readable(add_to_server: AddToServer) -> AddToServer:
    """The generated ``add_XServicer_to_server``, for servicers whose methods are ``answered``.

    Bytes that are no request then end as INVALID_ARGUMENT and in the log, like everything else that is wrong with a
    request; gRPC itself answers UNKNOWN or INTERNAL, as if the service were broken.
    """

    def add(servicer: Any, server: Any) -> None:
        add_to_server(servicer, _Readable(server))

    return add


class _Readable:
    """Stands in for the server while a servicer is added."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Nothing: the same methods come by name."""

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        handlers = {
            name: handler._replace(request_deserializer=_reader(handler.request_deserializer))
            for name, handler in method_handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service_name, handlers),))
        self._server.add_registered_method_handlers(service_name, handlers)


def _reader(parse: Callable[[bytes], Message]) -> Callable[[bytes], Message | Unreadable]:
    def read(data: bytes) -> Message | Unreadable:
        if len(data) > MAX_REQUEST:
            return Unreadable(f"the request has {len(data)} bytes, and {MAX_REQUEST} are allowed")
        try:
            return parse(data)
        except DecodeError:
            # ``parse`` is the FromString of a generated class.
            return Unreadable(f"the request is no {getattr(parse, '__self__', Message).DESCRIPTOR.full_name}")

    return read


def answered(method: Method) -> Method:
    """A unary method of a servicer, which may count on a valid request and raise what ``services.common.errors`` holds.

    A request that breaks its contract (protovalidate) is answered with INVALID_ARGUMENT and a google.rpc.BadRequest:
    each violation with its field, its description and, as its reason, the id of the rule. A ``RefusedError`` is
    answered with its code and a google.rpc.ErrorInfo; any other exception with INTERNAL, and its traceback goes to the
    log alone. Each failed request leaves a line in the log.
    """

    @functools.wraps(method)
    async def answer(self: Servicer, request: Message | Unreadable, context: Context) -> Message:
        started = time.monotonic()
        status = _checked(request)
        if status is None:
            try:
                return await method(self, request, context)
            except Exception as error:
                status = _status_of(error, method.__qualname__, self.error_domain)
        await _abort(status, method.__qualname__, request, context, started)
        raise AssertionError("unreachable: abort_with_status raises")

    return cast("Method", answer)


def answered_stream(method: Stream) -> Stream:
    """A method of a servicer that answers with a stream: otherwise as ``answered``."""

    @functools.wraps(method)
    async def answer(self: Servicer, request: Message | Unreadable, context: Context) -> AsyncIterator[Message]:
        started = time.monotonic()
        status = _checked(request)
        if status is None:
            try:
                async with contextlib.aclosing(cast("AsyncGenerator[Message]", method(self, request, context))) as it:
                    async for response in it:
                        yield response
                return
            except Exception as error:
                status = _status_of(error, method.__qualname__, self.error_domain)
        await _abort(status, method.__qualname__, request, context, started)

    return cast("Stream", answer)


def trace(context: Context) -> dict[str, str]:
    """The W3C trace context of a call; empty without one, or when it is none that can be passed on."""
    metadata = context.invocation_metadata() or ()
    return traced({key: str(value) for key, value in metadata})


def _checked(request: Message | Unreadable) -> status_pb2.Status | None:
    """What a request that breaks its contract is answered with; None for one that doesn't."""
    if isinstance(request, Unreadable):
        return _status(grpc.StatusCode.INVALID_ARGUMENT, request.why)
    for field, value in request.ListFields():
        if not isinstance(value, str | bytes) and hasattr(value, "__len__") and len(value) > MAX_ITEMS:
            many = f"has {len(value)} elements, and {MAX_ITEMS} are allowed"
            return _invalid([_violation(field.name, many, "repeated.max_items")])
    violations = protovalidate.collect_violations(request)
    return _invalid(map(_field_violation, violations)) if violations else None


def _status_of(error: Exception, method: str, domain: str) -> status_pb2.Status:
    if isinstance(error, InvalidFieldError):
        return _invalid([_violation(error.field, error.description, error.reason)])
    if isinstance(error, RefusedError):
        return _refused(error, domain)
    log.error("handler raised", method=method, exc_info=error)
    return _status(grpc.StatusCode.INTERNAL, "internal error; the service's log has the details")


async def _abort(
    status: status_pb2.Status, method: str, request: Message | Unreadable, context: Context, started: float
) -> None:
    code = rpc_status.to_status(status).code
    log.log(
        logging.WARNING if code in OURS else logging.INFO,
        "request failed",
        method=method,
        code=code.name,
        error=_for_log(status),
        seconds=round(time.monotonic() - started, 4),
        peer=context.peer(),
        **trace(context),
        **{name: value for name in NAMED if _UUID.fullmatch(value := getattr(request, name, ""))},
    )
    await context.abort_with_status(rpc_status.to_status(status))


def _for_log(status: status_pb2.Status) -> str:
    """What is wrong, without what the caller wrote: of an invalid request, the fields and the rules that they break."""
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return "; ".join(f"{violation.field}: {violation.reason}" for violation in bad.field_violations)
    return str(status.message)


def masked(mask: FieldMask, message: Message, fields: Collection[str], ignored: Collection[str]) -> set[str]:
    """Which of ``fields`` an update is to change (AIP-134): those that ``mask`` names; without one, those that
    ``message`` fills; all for ``*``. ``ignored``: fields that are only ever given by the service (AIP-203).

    Raises InvalidFieldError for a path that is in neither.
    """
    paths = set(mask.paths)
    if not paths:
        return {field for field in fields if "." not in field and getattr(message, field) != _unset(message, field)}
    if paths == {"*"}:
        return {field for field in fields if "." not in field}
    for path in mask.paths:
        if path not in fields and path not in ignored:
            raise InvalidFieldError("update_mask", "UNKNOWN_FIELD", f"{path!r} should be one of {', '.join(fields)}")
    return paths - set(ignored)


def _unset(message: Message, field: str) -> object:
    return getattr(type(message)(), field)


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
