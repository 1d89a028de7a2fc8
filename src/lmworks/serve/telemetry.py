"""OpenTelemetry: a span for each request, and in it how long each question waited and was worked on.

    POST /classify        http.request.method, http.route, http.response.status_code; its parent is the caller's
      queue               until the engine took it up        lmworks.model, lmworks.kind
      compute             in the engine                      and lmworks.batches, lmworks.rows, lmworks.tokens, …

Spans go to a collector by OTLP over HTTP (`pip install "lmworks[telemetry]"`), off unless it is named. They hold no
text, no raw address and no key: what a framework records of itself (a path may be a text) stays off.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import time_ns
from typing import Any

from lmworks import __version__
from lmworks.base.errors import InputError
from lmworks.base.optional import is_installed, require
from lmworks.serve.supervisor import Ticket

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
FLUSH = 2.0  # seconds that the last spans may take
PARENT = (b"traceparent", b"tracestate")
NATIVE: Any = {"tracing": False, "metrics": False, "logs": False}  # of FastAPI


def open_exporter(url: str | None) -> Any:
    """Return what sends spans to a collector, by its base address or as the environment says; None where none is named.

    Raises InputError for what is no address, MissingExtra where the address was given and the library is missing.
    """
    asked = any(os.environ.get(name) for name in ENDPOINTS) and os.environ.get("OTEL_TRACES_EXPORTER") != "none"
    if url is None and (not asked or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"):
        return None
    if url is None and not is_installed("opentelemetry.exporter.otlp.proto.http"):
        sys.stderr.write('Spans are not sent: they need pip install "lmworks[telemetry]".\n')
        return None
    if (
        url is None
        and (spoken := next(filter(None, map(os.environ.get, PROTOCOLS)), "http/protobuf")) != "http/protobuf"
    ):
        sys.stderr.write(f"Spans are not sent: {spoken} is asked for, and only http/protobuf is spoken here.\n")
        return None
    if url is not None and not url.startswith(("http://", "https://")):
        raise InputError("spans go to an http or https address", found=url, expected="http://127.0.0.1:4318")
    exporters = require("opentelemetry.exporter.otlp.proto.http.trace_exporter", extra="telemetry")
    return exporters.OTLPSpanExporter(**({} if url is None else {"endpoint": f"{url.rstrip('/')}/v1/traces"}))


class Tracing:
    """Makes the spans of one server and gives them to an exporter."""

    def __init__(self, exporter: Any) -> None:
        resources = require("opentelemetry.sdk.resources", extra="telemetry")
        sdk, export = (require(f"opentelemetry.sdk.trace{part}", extra="telemetry") for part in ("", ".export"))
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = resources.Resource.create({} if named else {"service.name": "lmworks"})
        self.exporter = exporter
        self.provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self.tracer = self.provider.get_tracer("lmworks", __version__)
        self.trace = require("opentelemetry.trace", extra="telemetry")
        self.parents = require("opentelemetry.trace.propagation.tracecontext", extra="telemetry")

    @contextmanager
    def request(self, scope: Any) -> Iterator[Any]:
        """Make the span of a request; yield what is told the route and the status in the end."""
        given = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in PARENT}
        context = self.parents.TraceContextTextMapPropagator().extract(given)
        method = scope["method"]
        with self.tracer.start_as_current_span(
            method, context=context, kind=self.trace.SpanKind.SERVER, attributes={"http.request.method": method},
            record_exception=False,
        ) as span:  # fmt: skip

            def end(route: str, status: int) -> None:
                span.update_name(f"{method} {route}")
                span.set_attributes({"http.route": route, "http.response.status_code": status})
                if status >= 500:
                    span.set_attribute("error.type", str(status))
                    span.set_status(self.trace.StatusCode.ERROR)

            yield end

    def question(self, ticket: Ticket, model: str, kind: str) -> None:
        """Make the spans of a question to the engine, which is over."""
        facts: dict[str, Any] = {"lmworks.model": model, "lmworks.kind": kind}
        took, now = ticket.took, time_ns()
        began = now if took is None else max(took.began, ticket.since)
        self.tracer.start_span("queue", start_time=ticket.since, attributes=facts).end(began)
        if took is not None:
            facts |= {f"lmworks.{name}": value for name, value in took.facts.items()}
            self.tracer.start_span("compute", start_time=began, attributes=facts).end(max(began, took.ended))

    def close(self) -> None:
        """Send the last spans, if that goes quickly."""
        last = threading.Thread(target=self.provider.force_flush, daemon=True)
        last.start()
        last.join(FLUSH)
        if last.is_alive():
            self.exporter.shutdown()  # whatever it still tries ends here
        self.provider.shutdown()
