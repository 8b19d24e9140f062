"""Spans that are sent to an OpenTelemetry collector, by OTLP over gRPC. Needs the packages of the extra `tracing`."""

import threading
import time
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from common.telemetry.tracing import OFF, Attributes, Span, Tracing

STOP_SECONDS = 3.0

_w3c = TraceContextTextMapPropagator()


class OtlpSpan(Span):
    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span
        self._context = trace.set_span_in_context(span, Context())
        carrier: dict[str, str] = {}
        _w3c.inject(carrier, self._context)
        self.traceparent = carrier.get("traceparent", "")

    def child(self, name: str, attributes: Attributes) -> Span:
        return OtlpSpan(self._tracer, self._tracer.start_span(name, self._context, attributes=attributes))

    def record(self, name: str, began: float, attributes: Attributes, problem: str = "") -> None:
        now = time.time_ns()
        start = now - round((time.monotonic() - began) * 1e9)
        span = self._tracer.start_span(name, self._context, attributes=attributes, start_time=start)
        _fail(span, problem)
        span.end(now)

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def end(self, attributes: Attributes, problem: str = "") -> None:
        self._span.set_attributes(attributes)
        _fail(self._span, problem)
        self._span.end()


class OtlpTracing(Tracing):
    """Sends spans to `endpoint`. OpenTelemetry's own environment variables set the rest: sampling, batches, headers,
    certificates, the service's name and attributes."""

    def __init__(self, endpoint: str, service: str) -> None:
        own = Resource.create({"service.name": service, "service.version": version("twostroke")})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("twostroke")
        self._stopping: threading.Thread | None = None

    def begin(self, name: str, traceparent: str, attributes: Attributes) -> Span:
        above = _w3c.extract({"traceparent": traceparent}, Context())
        return OtlpSpan(self._tracer, self._tracer.start_span(name, above, trace.SpanKind.SERVER, attributes))

    def below(self, traceparent: str) -> Span:
        span = trace.get_current_span(_w3c.extract({"traceparent": traceparent}, Context()))
        return OtlpSpan(self._tracer, span) if span.get_span_context().is_valid else OFF

    def stop(self) -> None:
        if self._stopping is None:
            # On another thread, because the SDK waits much longer if the collector is gone.
            self._stopping = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
            self._stopping.start()
        self._stopping.join(STOP_SECONDS)


def _fail(span: trace.Span, problem: str) -> None:
    if problem:
        span.set_status(trace.StatusCode.ERROR, problem)
