"""Why an endpoint can't be reached, in a few words for errors and log lines.

Core's state says only TRANSIENT_FAILURE. A call on that channel fails at once, without touching the network, and its
details name the cause: that text is shown, and no decision depends on it. Where core says only that the endpoint is
unhealthy, its health is requested on a separate channel.

An endpoint is reported as failing only once its cause is known, or after TIMEOUT, so that the error of the
first failing call can name it. Only a few endpoints are checked at a time, because errors name no more than that; the
others have no cause.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from mesh.errors import short_details
from mesh.model import Connectivity

if TYPE_CHECKING:
    from mesh.channel.subchannel import Subchannel

CONCURRENCY = 3
"""Endpoints that are checked at a time."""

TIMEOUT = 0.25
"""The timeout of a check, in seconds; calls wait for it."""

REFRESH_PERIOD = 5.0
"""Seconds after which an endpoint is checked again: its cause may have changed."""

_CHECK = "/grpc.health.v1.Health/Check"
_UNHEALTHY = "backend unhealthy"  # core's health checking (A17)


class Causes:
    """The causes of one pool's endpoints. ``changed`` is called when a cause becomes known. ``known`` and
    ``reported_state`` may be used from any thread, everything else on the pool's loop only."""

    def __init__(self, changed: Callable[[], object]) -> None:
        self.known: dict[str, str] = {}
        self._changed = changed
        self._asked: dict[str, float] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}

    def reported_state(self, address: str, state: Connectivity) -> Connectivity:
        """The state to report for ``address``. From any thread."""
        failing = state == Connectivity.TRANSIENT_FAILURE
        return Connectivity.CONNECTING if failing and address not in self.known else state

    def tick(self, subchannels: Mapping[str, Subchannel], failing: Iterable[str], now: float) -> None:
        """Ask for the causes of ``failing``, and forget those of all others."""
        wanted = dict.fromkeys(failing)
        if not wanted and not self.known:
            return
        for address in self.known.keys() - wanted.keys():
            del self.known[address]
            self._asked.pop(address, None)
        for address in wanted:
            if address in self._asking or now < self._asked.get(address, now):
                continue
            if len(self._asking) < CONCURRENCY and (address in self._asked or len(self._asked) < CONCURRENCY):
                self._asked[address] = now + REFRESH_PERIOD
                self._asking[address] = asyncio.create_task(self._ask(address, subchannels[address]))
            else:
                self.known.setdefault(address, "")

    async def close(self) -> None:
        """Stop asking."""
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)

    async def _ask(self, address: str, subchannel: Subchannel) -> None:
        cause = ""
        try:
            with contextlib.suppress(
                TimeoutError, ValueError, grpc.aio.UsageError
            ):  # the last two: closed in the meantime
                async with asyncio.timeout(TIMEOUT):
                    cause = await cause_of(subchannel)
        finally:
            self._asking.pop(address, None)
            if address in self._asked:
                self.known[address] = cause
                self._changed()


async def cause_of(subchannel: Subchannel) -> str:
    """Why ``subchannel`` can't be reached; empty when it can be, or nothing is known."""
    details = await _details(subchannel.core())
    if not details.endswith(_UNHEALTHY):
        return short_details(details)
    service = _health_service(subchannel)
    async with subchannel.channel_without_health() as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            answer = await channel.unary_unary(
                _CHECK, health_pb2.HealthCheckRequest.SerializeToString, health_pb2.HealthCheckResponse.FromString
            )(request, timeout=TIMEOUT)
        except grpc.aio.AioRpcError as error:
            return f"health check failed: {error.code().name}: {short_details(error.details() or '')}"
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return f"health check of {service!r} returned {status}" if service else f"health check returned {status}"


async def _details(core: Any) -> str:
    """The details that a call on a failing core channel fails with; empty when it fails otherwise or not at all."""
    check = core.unary_unary(_CHECK)
    if isinstance(core, grpc.aio.Channel):
        try:
            await check(b"", timeout=TIMEOUT)
        except grpc.aio.AioRpcError as error:
            return (error.details() or "") if error.code() is grpc.StatusCode.UNAVAILABLE else ""
        return ""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    call = check.future(b"", timeout=TIMEOUT)
    call.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(over.set))
    try:
        await over.wait()
    finally:
        call.cancel()
    return (call.details() or "") if call.code() is grpc.StatusCode.UNAVAILABLE else ""


def _health_service(subchannel: Subchannel) -> str:
    config = json.loads(dict(subchannel.options).get("grpc.service_config", "{}"))
    return str(config.get("healthCheckConfig", {}).get("serviceName", ""))
