"""The W3C trace context that calls and events carry."""

from __future__ import annotations

from collections.abc import Mapping

MAX_TRACE = 512
"""Characters of ``traceparent`` and of ``tracestate``, at most; W3C requires no more."""


def trace_context(attributes: Mapping[str, str]) -> dict[str, str]:
    """The trace context in ``attributes``. Values that are longer than MAX_TRACE or not printable are left out: a
    broken trace is no reason to reject what carries it."""
    return {
        name: value
        for name in ("traceparent", "tracestate")
        if 0 < len(value := attributes.get(name, "")) <= MAX_TRACE and value.isprintable()
    }
