"""Traces for an OpenTelemetry collector, by OTLP over gRPC: a span for each call, when it is over.

A span says what the audit log does, and no more. Spans are sent by a thread of their own, and only so many
wait: a collector that is away holds no call up, and costs one line of the log. What is sampled, and more, the
standard variables OTEL_* say.
"""

import logging
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

from opentelemetry.exporter.otlp.proto.grpc.exporter import InvalidCompressionValueException
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pjw.errors import ConfigError
from pjw.server.audit import CallRecord
from pjw.v1 import job_worker_pb2 as pb

# How long the end of pjwd waits for a collector that does not answer.
CLOSE_SECONDS: Final = 2.0
# gRPC's codes that are a server's own trouble, by OpenTelemetry's conventions
_OUR_FAULT: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
# looked up when this is imported, while root: what is installed may lie where nobody else may look
_VERSION: Final = version("pjw")
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["JobWorkerService"]

log: Final = logging.getLogger(__name__)


class Traces:
    """Makes a span of each call that the guard tells of, and has it sent."""

    def __init__(self, endpoint: str) -> None:
        self._parent: Final = TraceContextTextMapPropagator()
        said = _Said()
        try:
            self._exporter: Final = _Exporter(endpoint, said)
            own = Resource({"service.name": "pjwd", "service.version": _VERSION})
            # not by Resource.create, which looks for detectors where perhaps root alone may look
            resource = own.merge(OTELResourceDetector().detect())
            self._provider: Final = TracerProvider(resource=resource, shutdown_on_exit=False)
            self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        except (ValueError, RuntimeError, InvalidCompressionValueException) as error:
            raise ConfigError(
                f"cannot send traces to {endpoint}: {error}", hint="look at the variables OTEL_* of pjwd"
            ) from error
        said.quiet = True
        self._tracer: Final = self._provider.get_tracer("pjw")

    def call_began(self, record: CallRecord) -> None:
        """A call is a span when it is over."""

    def call_ended(self, record: CallRecord) -> None:
        """Have the span sent. Never waits."""
        end = time.time_ns()
        own = record.method in _SERVICE.methods_by_name
        attributes: dict[str, str | int] = {
            "rpc.system.name": "grpc",
            "rpc.method": f"{_SERVICE.full_name}/{record.method}" if own else record.method,
            "rpc.response.status_code": record.code,
        }
        if record.code != "OK":
            attributes["error.type"] = record.code
        if record.identity is not None:
            attributes["pjw.client"] = record.identity.client_name
        if record.job_id is not None:
            attributes["pjw.job_id"] = record.job_id
        span = self._tracer.start_span(
            str(attributes["rpc.method"]),
            self._parent.extract(dict(record.metadata() or ())),
            SpanKind.SERVER,
            attributes,
            start_time=end - int(record.seconds() * 1e9),
        )
        if record.code in _OUR_FAULT:
            span.set_status(StatusCode.ERROR)
        span.end(end)

    def close(self) -> None:
        """Send what waits, as far as the collector takes it."""
        # what the processor itself waits for at most cannot be said to it
        late = threading.Timer(CLOSE_SECONDS, self._exporter.shutdown)
        late.start()
        self._provider.shutdown()
        late.cancel()


class _Said(logging.Handler):
    """What OpenTelemetry says: of its settings in the log, later only kept: it is said for each batch."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.quiet = False
        self.last = ""
        logger = logging.getLogger("opentelemetry")
        logger.propagate = False
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if not self.quiet:
            log.warning("%s", record.getMessage())
        # clients can have the rest say something
        elif record.name.startswith("opentelemetry.exporter"):
            self.last = record.getMessage()


class _Exporter(OTLPSpanExporter):
    """Says when spans begin to be lost, and when they no longer are."""

    def __init__(self, endpoint: str, said: _Said) -> None:
        super().__init__(endpoint)
        self._said: Final = said
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = super().export(spans)
            return result
        finally:
            failing = result is not SpanExportResult.SUCCESS
            if failing and not self._failing:
                log.error("traces are lost, calls go on: %s", sys.exception() or self._said.last)
            elif self._failing and not failing:
                log.error("traces are taken again")
            self._failing = failing
