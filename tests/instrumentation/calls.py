"""The calls that a user makes to ``echo``'s service, in both worlds; what came of each, as plain values."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc

BOUND = 30.0

CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "test.Echo", "method": "Flaky"}],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.01s",
                    "maxBackoff": "0.01s",
                    "backoffMultiplier": 1,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)

EXPECTED = {
    "unary": "hello",
    "future": "hello",
    "flaky": "hello",
    "responses": "hello0 hello1 hello2",
    "requests": "a,b",
    "both": "a b",
    "threaded": "hello hello",
    "absent": "NOT_FOUND nothing here; 1 attempt",
    "absent responses": "NOT_FOUND nothing more; 1 attempt",
}

CALLED = {
    "Unary": 3,
    "Flaky": 1,
    "Responses": 2,
    "Requests": 1,
    "Both": 1,
    "Threaded": 1,
}
"""How many calls of each method a user makes."""


def _failure(error: Any, explain: Any) -> str:
    return f"{error.code().name} {error.details()}; {len(explain(error).attempts)} attempt"


def sync_calls(channel: Any, explain: Any) -> dict[str, str]:
    unary = channel.unary_unary("/test.Echo/Unary")
    responses = channel.unary_stream("/test.Echo/Responses")
    requests = channel.stream_unary("/test.Echo/Requests")
    both = channel.stream_stream("/test.Echo/Both")
    threaded = channel.unary_stream("/test.Echo/Threaded")
    seen = {
        "unary": unary(b"hello", timeout=BOUND).decode(),
        "future": unary.future(b"hello", timeout=BOUND).result().decode(),
        "flaky": channel.unary_unary("/test.Echo/Flaky")(b"hello", timeout=BOUND).decode(),
        "responses": b" ".join(responses(b"hello", timeout=BOUND)).decode(),
        "requests": requests(iter((b"a", b"b")), timeout=BOUND).decode(),
        "both": b" ".join(both(iter((b"a", b"b")), timeout=BOUND)).decode(),
        "threaded": b" ".join(threaded(b"hello", timeout=BOUND)).decode(),
    }
    try:
        unary(b"absent", timeout=BOUND)
    except grpc.RpcError as error:
        seen["absent"] = _failure(error, explain)
    try:
        list(responses(b"absent", timeout=BOUND))
    except grpc.RpcError as error:
        seen["absent responses"] = _failure(error, explain)
    return seen


async def aio_calls(channel: Any, explain: Any) -> dict[str, str]:
    async def two() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"

    async def joined(call: Any) -> str:
        return b" ".join([response async for response in call]).decode()

    unary = channel.unary_unary("/test.Echo/Unary")
    responses = channel.unary_stream("/test.Echo/Responses")
    requests = channel.stream_unary("/test.Echo/Requests")
    both = channel.stream_stream("/test.Echo/Both")
    threaded = channel.unary_stream("/test.Echo/Threaded")
    seen = {
        "unary": (await unary(b"hello", timeout=BOUND)).decode(),
        "future": (await unary(b"hello", timeout=BOUND)).decode(),
        "flaky": (await channel.unary_unary("/test.Echo/Flaky")(b"hello", timeout=BOUND)).decode(),
        "responses": await joined(responses(b"hello", timeout=BOUND)),
        "requests": (await requests(two(), timeout=BOUND)).decode(),
        "both": await joined(both(two(), timeout=BOUND)),
        "threaded": await joined(threaded(b"hello", timeout=BOUND)),
    }
    try:
        await unary(b"absent", timeout=BOUND)
    except grpc.RpcError as error:
        seen["absent"] = _failure(error, explain)
    try:
        await joined(responses(b"absent", timeout=BOUND))
    except grpc.RpcError as error:
        seen["absent responses"] = _failure(error, explain)
    return seen
