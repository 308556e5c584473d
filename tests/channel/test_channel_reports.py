"""Endpoints that say how busy they are: with each answer, or asked out of band; and calls go where there is room."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

import mesh
import mesh.aio
from mesh.orca import SERVICE, OrcaLoadReport, OrcaLoadReportRequest
from tests.processes import eventually

UNARY = "/test.Load/Unary"
WITHIN = 10.0  # seconds


class Replica:
    """A server of this process that says it is so busy: with its answers, or (``aside``) when it is asked."""

    def __init__(self, utilization: float, *, aside: bool) -> None:
        self.report = OrcaLoadReport(cpu_utilization=utilization, rps_fractional=100.0)
        self.over = threading.Event()
        self.aside = aside
        self.calls = 0
        handlers: dict[str, Any] = {UNARY: grpc.unary_unary_rpc_method_handler(self._answer)}
        if aside:
            handlers[f"/{SERVICE}/StreamCoreMetrics"] = grpc.unary_stream_rpc_method_handler(
                self._stream, OrcaLoadReportRequest.FromString, lambda report: report.SerializeToString()
            )
        self.threads = futures.ThreadPoolExecutor(8)
        self.server = grpc.server(self.threads, handlers=[_Handlers(handlers)])
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.calls += 1
        if not self.aside:
            context.set_trailing_metadata((("weft-load-bin", self.report.SerializeToString()),))
        return request

    def _stream(self, _: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        while context.is_active() and not self.over.wait(0.02):
            yield self.report

    def stop(self) -> None:
        self.over.set()
        self.server.stop(None).wait()
        self.threads.shutdown()


class Broken:
    """A report that isn't one."""

    def SerializeToString(self) -> bytes:  # noqa: N802
        return b"\xff\xff"


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, handlers: dict[str, Any]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._handlers.get(handler_call_details.method)


@pytest.fixture(params=[False, True], ids=["with answers", "out of band"])
def replicas(request: pytest.FixtureRequest) -> Iterator[list[Replica]]:
    """One that is at 80 % and one at 20 %."""
    replicas = [Replica(0.8, aside=request.param), Replica(0.2, aside=request.param)]
    yield replicas
    for replica in replicas:
        replica.stop()


def channel_to(replicas: list[Replica]) -> tuple[str, list[tuple[str, str]]]:
    settings = {
        "blackoutPeriod": "0s",
        "weightUpdatePeriod": "0.1s",
        "enableOobLoadReport": replicas[0].aside,
        "oobReportingPeriod": "0.02s",
    }
    config = {"loadBalancingConfig": [{"weighted_round_robin": settings}]}
    target = "static:///" + ",".join(replica.address for replica in replicas)
    return target, [("grpc.service_config", json.dumps(config))]


def shared(replicas: list[Replica], before: Counter[str]) -> bool:
    """Whether the idle one had about four of five calls since."""
    made = {replica.address: replica.calls - before[replica.address] for replica in replicas}
    return made[replicas[1].address] / sum(made.values()) > 0.7


def counted(replicas: list[Replica]) -> Counter[str]:
    return Counter({replica.address: replica.calls for replica in replicas})


@pytest.mark.parametrize("how", ["blocking", "with_call", "future"])
def test_calls_go_where_there_is_room_sync(replicas: list[Replica], how: str) -> None:
    with mesh.insecure_channel(*channel_to(replicas)) as channel:
        call: Any = channel.unary_unary(UNARY)

        def made_forty() -> bool:
            before = counted(replicas)
            for _ in range(40):
                if how == "blocking":
                    assert call(b"x", timeout=WITHIN, wait_for_ready=True) == b"x"
                elif how == "with_call":
                    assert call.with_call(b"x", timeout=WITHIN, wait_for_ready=True)[0] == b"x"
                else:
                    assert call.future(b"x", timeout=WITHIN, wait_for_ready=True).result() == b"x"
            return shared(replicas, before)

        eventually(made_forty, within=WITHIN)


async def test_calls_go_where_there_is_room_aio(replicas: list[Replica]) -> None:
    async with mesh.aio.insecure_channel(*channel_to(replicas)) as channel:
        call: Any = channel.unary_unary(UNARY)
        for _ in range(200):
            before = counted(replicas)
            for _ in range(40):
                assert await call(b"x", timeout=WITHIN, wait_for_ready=True) == b"x"
            if shared(replicas, before):
                return
    pytest.fail("the idle replica never had more")


def test_a_report_that_cannot_be_read_is_none(replicas: list[Replica]) -> None:
    for replica in replicas:
        replica.report = Broken()
    with mesh.insecure_channel(*channel_to(replicas)) as channel:
        call: Any = channel.unary_unary(UNARY)
        assert all(call(b"x", timeout=WITHIN, wait_for_ready=True) == b"x" for _ in range(20))


def test_a_server_without_the_service_is_called_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    replica = Replica(0.5, aside=False)
    replica.aside = True  # so it is asked, and has nothing to say
    with mesh.insecure_channel(*channel_to([replica])) as channel:
        call: Any = channel.unary_unary(UNARY)

        def said() -> bool:
            assert call(b"x", timeout=WITHIN, wait_for_ready=True) == b"x"
            return "does not serve load reports out of band" in caplog.text

        eventually(said, within=WITHIN)
    replica.stop()


@pytest.mark.slow
def test_one_that_claims_to_be_nearly_idle_takes_no_more_than_four_times_another() -> None:
    replicas = [Replica(0.5, aside=False), Replica(0.5, aside=False), Replica(1e-6, aside=False)]
    try:
        with mesh.insecure_channel(*channel_to(replicas)) as channel:
            call: Any = channel.unary_unary(UNARY)

            def share_of_90() -> float:
                before = counted(replicas)
                for _ in range(90):
                    assert call(b"x", timeout=WITHIN, wait_for_ready=True) == b"x"
                made = counted(replicas)
                made.subtract(before)
                return made[replicas[2].address] / 90

            eventually(lambda: share_of_90() > 0.6, what="it gets 2 of 3 calls: 4 / (4 + 1 + 1)")
            assert share_of_90() == pytest.approx(2 / 3, abs=0.05)
    finally:
        for replica in replicas:
            replica.stop()
