"""What a server's log says of its registration: registered, registry lost, found or restarted, and what follows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio
import pytest

from mesh.server.registration import Registration, _reason
from tests.server.test_registration import TheRegistry, an_instance

LOGGER = "mesh.server"


@pytest.fixture(autouse=True)
def every_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)


@pytest.fixture
async def registry(free_port: Callable[[], int]) -> AsyncIterator[TheRegistry]:
    registry = TheRegistry(free_port())
    yield registry
    await registry.go()


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    async with asyncio.timeout(15):
        while not any(text in message for message in caplog.messages):  # noqa: ASYNC110 - a log has no event
            await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_it_says_where_and_as_whom_it_registered_and_when_the_registry_is_lost_and_found(
    registry: TheRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    await registry.come()
    registration = Registration(registry.address, [an_instance("test.A"), an_instance("test.B")], 3)
    registration.start()
    await logged(caplog, f"registered at {registry.address} as me: test.A, test.B")
    await registry.go()
    await logged(caplog, f"registration at {registry.address} failed; retrying: UNAVAILABLE: ")
    await registry.come()
    await logged(caplog, f"registry {registry.address} is reachable again")
    await logged(
        caplog, f"registry {registry.address} restarted, or another process uses the instance id me; registering again"
    )
    assert sum("registered at" in message for message in caplog.messages) <= 2
    await registration.close(1)


@pytest.mark.slow
async def test_a_registry_that_is_away_is_named_once_while_it_is_away(
    registry: TheRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    registration = Registration(registry.address, [an_instance("test.A")], 3)
    registration.start()
    await logged(caplog, f"registration at {registry.address} failed; retrying: ")
    assert not any("is reachable again" in message for message in caplog.messages)
    await registry.come()
    await logged(caplog, f"registered at {registry.address} as me: test.A")
    await registration.close(1)


@pytest.mark.slow
async def test_a_registry_that_shuts_down_meanwhile_is_said_to_and_when_the_lease_expires(
    registry: TheRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    await registry.come()
    registry.service.mute = True
    registration = Registration(registry.address, [an_instance("test.A")], 10)
    registration.start()
    await logged(caplog, "registered at")
    closing = asyncio.create_task(registration.close(5))
    await registry.service.deregistering.wait()
    await registry.go()
    await closing
    await logged(
        caplog,
        f"deregistration at {registry.address} failed: the registry is shutting down; the lease expires in 10 s",
    )


@pytest.mark.parametrize(
    ("code", "details", "reason"),
    [
        (grpc.StatusCode.CANCELLED, "CANCELLED", "the registry is shutting down"),
        (grpc.StatusCode.UNAVAILABLE, "Cancelling all calls", "the registry is shutting down"),
        (grpc.StatusCode.UNIMPLEMENTED, "no such method", "UNIMPLEMENTED: no such method"),
    ],
)
def test_what_a_stopping_server_does_to_calls_is_put_into_words(
    code: grpc.StatusCode, details: str, reason: str
) -> None:
    none = grpc.aio.Metadata()
    assert _reason(grpc.aio.AioRpcError(code, none, none, details)) == reason
