"""OpenTelemetry and Sentry as programs set them up, with what they record kept in memory. For child processes: what
they replace in gRPC stays replaced."""

# The packages are typed in part, and not installed with the library.
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class OpenTelemetry:
    """Everything that ``opentelemetry-instrumentation-grpc`` has."""

    streams = True
    """Whether calls that stream requests get client spans."""

    def __init__(self) -> None:
        from opentelemetry import trace
        from opentelemetry.instrumentation.grpc import (
            GrpcAioInstrumentorClient,
            GrpcAioInstrumentorServer,
            GrpcInstrumentorClient,
            GrpcInstrumentorServer,
        )
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        trace.set_tracer_provider(provider)
        for instrumentor in (
            GrpcInstrumentorClient,
            GrpcInstrumentorServer,
            GrpcAioInstrumentorClient,
            GrpcAioInstrumentorServer,
        ):
            instrumentor().instrument()

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        yield

    def spans(self) -> dict[str, list[str]]:
        """The methods of the client's and the server's spans, and of those of the server that are no client's child."""
        from opentelemetry.trace import SpanKind

        spans = self._exporter.get_finished_spans()
        clients = {span.context.span_id for span in spans if span.kind is SpanKind.CLIENT}
        return {
            "client": [span.name for span in spans if span.kind is SpanKind.CLIENT],
            "server": [span.name for span in spans if span.kind is SpanKind.SERVER],
            "apart": [
                span.name
                for span in spans
                if span.kind is SpanKind.SERVER and (span.parent is None or span.parent.span_id not in clients)
            ],
        }


class Sentry:
    """``sentry_sdk`` with its gRPC integration."""

    streams = False

    def __init__(self) -> None:
        import sentry_sdk
        from sentry_sdk.integrations.grpc import GRPCIntegration
        from sentry_sdk.transport import Transport

        events: list[dict[str, Any]] = []

        class Kept(Transport):
            def capture_envelope(self, envelope: Any) -> None:
                events.extend(item.payload.json for item in envelope.items if item.type == "transaction")

        self._events = events
        sentry_sdk.init(
            "http://key@127.0.0.1:9/1",
            transport=Kept(),
            traces_sample_rate=1.0,
            default_integrations=False,
            integrations=[GRPCIntegration()],
        )

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        import sentry_sdk

        with sentry_sdk.start_transaction(name="user", op="test"):
            yield

    def spans(self) -> dict[str, list[str]]:
        import sentry_sdk

        sentry_sdk.flush()
        client = [
            span["data"]["method"]
            for event in self._events
            for span in event["spans"]
            if span.get("op") == "grpc.client"
        ]
        traces = [(event["contexts"]["trace"], event["transaction"]) for event in self._events]
        users = {trace["trace_id"] for trace, _ in traces if trace["op"] == "test"}
        served = [(trace, method) for trace, method in traces if trace["op"] == "grpc.server"]
        return {
            "client": [method.decode() if isinstance(method, bytes) else method for method in client],
            "server": [method for _, method in served],
            "apart": [method for trace, method in served if trace["trace_id"] not in users],
        }


FRAMEWORKS: dict[str, Any] = {"opentelemetry": OpenTelemetry, "sentry": Sentry}
