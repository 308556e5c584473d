"""Events as NATS headers, by CloudEvents' NATS binding: binary mode, each attribute as ``ce-`` and its name.

``ce-datacontenttype`` is one of them, and values are percent-encoded as in HTTP.
"""

from __future__ import annotations

import datetime as dt
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from services import events
from services.common.tracing import trace_context
from services.events import CONTENT_TYPE, Event, RejectedError, UnpublishableError

_HEADER = re.compile("ce-[a-z0-9]{1,32}", re.IGNORECASE)

_UNESCAPED = "!#$&'()*+,/:;<=>?@[\\]^`{|}~"
"""What a header's value may contain as it is, besides letters, digits and ``_.-``. The rest of ASCII (space, double
quote, percent, control characters) and everything beyond is percent-encoded (CloudEvents' HTTP binding, 3.1.3.2)."""


def to_headers(event: Event) -> dict[str, str]:
    """The event, without its data, as headers."""
    attributes = {
        "specversion": "1.0",
        "id": event.id,
        "source": event.source,
        "type": event.type,
        "subject": event.subject,
        "time": event.time.astimezone(dt.UTC).isoformat().replace("+00:00", "Z"),
        "datacontenttype": CONTENT_TYPE,
        **trace_context(event.trace),
    }
    return {f"ce-{name}": quote(value) for name, value in attributes.items()}


def from_headers(headers: Mapping[str, str], data: bytes) -> Event:
    """The event in a message. Raises RejectedError if it is not a CloudEvent with protobuf data."""
    attributes: dict[str, Any] = {
        name.lower().removeprefix("ce-"): urllib.parse.unquote(value)
        for name, value in headers.items()
        if name.lower().startswith("ce-")
    }
    try:
        if attributes["specversion"] != "1.0" or attributes["datacontenttype"] != CONTENT_TYPE:
            raise RejectedError(f"not a CloudEvent 1.0 with {CONTENT_TYPE}")
        event = Event(
            id=attributes["id"],
            source=attributes["source"],
            type=attributes["type"],
            subject=attributes["subject"],
            time=dt.datetime.fromisoformat(attributes["time"]),
            data=data,
            trace=trace_context(attributes),
        )
        events.validate(event)
    except KeyError as error:
        raise RejectedError(f"not a CloudEvent with protobuf data: {error.args[0]} is missing") from None
    except (ValueError, UnpublishableError) as error:
        raise RejectedError(f"invalid event: {error}") from None
    return event


def cloud_event_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that are named like a CloudEvent's attributes, whatever their values."""
    return {
        name: urllib.parse.quote(value, safe=f"{_UNESCAPED}%", errors="replace")
        for name, value in headers.items()
        if _HEADER.fullmatch(name)
    }


def encoded_size(headers: Mapping[str, str]) -> int:
    """Bytes that the headers take in a message."""
    return sum(len(name) + len(value) + 4 for name, value in headers.items())


def quote(value: str) -> str:
    """A header's value, percent-encoded."""
    return urllib.parse.quote(value, safe=_UNESCAPED, errors="replace")
