"""The conformance table, row by row: over the mesh in both worlds, and over plain grpcio beside it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

import mesh
import mesh.aio
from tests.conformance.cases import CASES, Case, Expect
from tests.conformance.servers import Attempt, Do, Script, Servers, path
from tests.processes import eventually, free_ports

WITHIN = 10.0  # seconds that connections, and attempts that are cancelled, may take to show
EARLY = 0.002  # seconds by which clocks and timers may differ

Called = tuple[str, int]  # the final status, and how many responses were read
_throttled = itertools.count(1)

rows = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.stop()


@rows
def test_the_mesh_conforms(case: Case, servers: Servers) -> None:
    with mesh.insecure_channel(_target(case, servers), _options(case)) as channel:
        seen = _run(case, case.calls(), channel, servers, _call)
    _check(seen)


@pytest.mark.parametrize("case", [case for case in CASES if case.kind.endswith("unary")], ids=lambda case: case.name)
def test_the_mesh_conforms_by_futures(case: Case, servers: Servers) -> None:
    with mesh.insecure_channel(_target(case, servers), _options(case)) as channel:
        seen = _run(case, case.calls(), channel, servers, _call_future)
    _check(seen)


@rows
async def test_the_mesh_conforms_in_asyncio(case: Case, servers: Servers) -> None:
    seen = []
    async with mesh.aio.insecure_channel(_target(case, servers), _options(case)) as channel:
        if not case.dead:
            async with asyncio.timeout(WITHIN):
                met: set[int] = set()
                while len(met) < 2:
                    script, metadata = servers.follow([Do()])
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        warm: Any = channel.unary_unary(path("unary_unary"))
                        await warm(b"", metadata=metadata)
                    met |= {attempt.server for attempt in script.seen}
        for steps, expect in case.calls():
            script, metadata = servers.follow(steps)
            seen.append((script, await _acall(case, channel, metadata), expect))
    _check(seen)


@pytest.mark.parametrize("case", [case for case in CASES if not case.mesh_only], ids=lambda case: case.name)
def test_plain_grpcio(case: Case, servers: Servers) -> None:
    addresses = _addresses(case, servers)
    if "retryThrottling" in case.config:  # core keeps one throttle per target in a process
        addresses = addresses * next(_throttled)
    with grpc.insecure_channel(f"ipv4:{','.join(addresses)}", _options(case)) as channel:
        case = replace(case, timeout=case.core_timeout or case.timeout)
        seen = _run(case, case.core_calls(), channel, servers, _call)
    _check(seen)


def test_rows_say_why_core_differs() -> None:
    assert [case.name for case in CASES if bool(case.core or case.core_then or case.mesh_only) != bool(case.why)] == []


def test_rows_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


# -- calls


def _addresses(case: Case, servers: Servers) -> list[str]:
    return [*(f"127.0.0.1:{port}" for port in free_ports(case.dead)), *servers.addresses]


def _target(case: Case, servers: Servers) -> str:
    return f"static:///{','.join(_addresses(case, servers))}"


def _options(case: Case) -> list[tuple[str, Any]]:
    return [("grpc.service_config", json.dumps(case.config))]


def _requests(case: Case) -> Any:
    message = b"x" * case.size
    return (message for _ in range(case.requests)) if case.kind.startswith("stream") else message


Seen = list[tuple[Script, Called, Expect]]


def _run(case: Case, calls: Any, channel: grpc.Channel, servers: Servers, call: Callable[..., Called]) -> Seen:
    if not case.dead:
        eventually(lambda: _met_both(channel, servers), WITHIN)
    seen = []
    for steps, expect in calls:
        script, metadata = servers.follow(steps)
        seen.append((script, call(case, channel, metadata), expect))
    return seen


def _met_both(channel: grpc.Channel, servers: Servers) -> bool:
    """Both servers can be called."""
    scripts = []
    for _ in range(2):
        script, metadata = servers.follow([Do()])
        scripts.append(script)
        try:
            warm: Any = channel.unary_unary(path("unary_unary"))
            warm(b"", metadata=metadata)
        except grpc.RpcError:  # connecting took longer than the config gives a call
            return False
    return {attempt.server for script in scripts for attempt in script.seen} == {0, 1}


def _call(case: Case, channel: grpc.Channel, metadata: Any) -> Called:
    invoke = getattr(channel, case.kind)(path(case.kind))
    read = 0
    try:
        answer = invoke(_requests(case), timeout=case.timeout, metadata=metadata)
        for _ in answer if case.kind.endswith("stream") else (answer,):
            read += 1
    except grpc.RpcError as error:
        return error.code().name, read
    return "OK", read


def _call_future(case: Case, channel: grpc.Channel, metadata: Any) -> Called:
    invoke = getattr(channel, case.kind)(path(case.kind))
    call = invoke.future(_requests(case), timeout=case.timeout, metadata=metadata)
    return call.code().name, int(call.exception() is None)


async def _acall(case: Case, channel: grpc.aio.Channel, metadata: Any) -> Called:
    invoke = getattr(channel, case.kind)(path(case.kind))
    call = invoke(_requests(case), timeout=case.timeout, metadata=metadata)
    read = 0
    try:
        if case.kind.endswith("stream"):
            async for _ in call:
                read += 1
        else:
            await call
            read = 1
    except grpc.aio.AioRpcError as error:
        return error.code().name, read
    return "OK", read


# -- what was seen


def _check(seen: Seen) -> None:
    for script, called, expect in seen:
        _check_call(script.seen, called, expect)


def _check_call(attempts: list[Attempt], called: Called, expect: Expect) -> None:
    code, read = called
    assert code == expect.code
    if expect.messages is not None:
        assert read == expect.messages
    eventually(lambda: len(attempts) >= expect.attempts, WITHIN, f"{attempts} are {expect.attempts} attempts")
    assert len(attempts) == expect.attempts
    previous = expect.previous or [None, "1", "2", "3", "4"][: expect.attempts]
    told = sorted(",".join(attempt.previous) for attempt in attempts)
    assert told == [value or "" for value in previous]
    arrived = sorted(attempts, key=lambda attempt: attempt.arrived)
    for (before, after), least in zip(itertools.pairwise(arrived), expect.gaps, strict=bool(expect.gaps)):
        assert after.arrived - before.arrived >= least - EARLY
    for before, after in itertools.pairwise(arrived):
        assert not expect.elsewhere or before.server != after.server
        assert not expect.shrinks or before.remaining - after.remaining >= expect.shrinks
    if expect.requests is not None:
        eventually(lambda: [each.requests for each in attempts] == expect.requests, WITHIN, f"{attempts}")
    if expect.cancelled is not None:
        eventually(lambda: sum(each.cancelled for each in attempts) == expect.cancelled, WITHIN, f"{attempts}")
