"""An OpenTelemetry collector that keeps the spans it is sent."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Status

# What the SDK waits before it sends a batch is five seconds if nobody says otherwise.
QUICKLY = {"OTEL_BSP_SCHEDULE_DELAY": "50"}

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER_SPAN_ID = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{CALLER_SPAN_ID}-01"


@dataclass(frozen=True)
class Span:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int  # nanoseconds
    end: int
    problem: str | None  # None: it did not fail
    attributes: dict[str, Any]


@dataclass
class Collector(TraceServiceServicer):
    spans: list[Span] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    address: str = ""

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}"

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:
        self.raw.append(request.SerializeToString())
        for sender in request.resource_spans:
            resource = {entry.key: _value(entry.value) for entry in sender.resource.attributes}
            for scope in sender.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        Span(
                            service=resource["service.name"],
                            name=span.name,
                            trace_id=span.trace_id.hex(),
                            span_id=span.span_id.hex(),
                            parent_id=span.parent_span_id.hex(),
                            start=span.start_time_unix_nano,
                            end=span.end_time_unix_nano,
                            problem=span.status.message if span.status.code == Status.STATUS_CODE_ERROR else None,
                            attributes={entry.key: _value(entry.value) for entry in span.attributes},
                        )
                    )
        return pb.ExportTraceServiceResponse()

    def of_trace(self, trace_id: str) -> list[Span]:
        return sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.start)

    def named(self, name: str, service: str = "twostroke-router", trace_id: str = TRACE_ID) -> list[Span]:
        return [span for span in self.of_trace(trace_id) if (span.service, span.name) == (service, name)]

    def wait_for(self, holds: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, [(span.service, span.name) for span in self.spans]
            time.sleep(0.02)


@contextmanager
def collector() -> Iterator[Collector]:
    server = grpc.server(ThreadPoolExecutor(4))
    it = Collector()
    add_TraceServiceServicer_to_server(it, server)
    it.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield it
    finally:
        server.stop(0).wait()


def _value(value: AnyValue) -> Any:
    if value.HasField("array_value"):
        return [_value(entry) for entry in value.array_value.values]
    return getattr(value, str(value.WhichOneof("value")))
