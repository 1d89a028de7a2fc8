"""Spans: one for a request, in it the wait and the work of each question; no text, and nothing where nobody asked."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serving import Running, server, start
from tiny_page import PROMPTS, made_folder

from lmworks.base.errors import InputError
from lmworks.serve.guard import digest
from lmworks.serve.telemetry import open_exporter

KEY = "a-right-key-of-some-length"
SECRET = "Zanzibar"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{SPAN}-01", "Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def kept() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def traced(classifier: Path, kept: InMemorySpanExporter) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        with server(classifier, made_folder(), exporter=kept, keys=[digest(KEY)], ready=False) as one:
            one.wait()
            yield one


def spans(kept: InMemorySpanExporter, count: int) -> list[ReadableSpan]:
    """Wait for so many spans; return them as they ended, and forget them."""
    for _ in range(400):
        found = kept.get_finished_spans()
        if len(found) >= count:
            kept.clear()
            assert len(found) == count
            return list(found)
        time.sleep(0.05)
    raise AssertionError([span.name for span in found])


def test_a_request_is_a_span_of_its_callers_trace(traced: Running, kept: InMemorySpanExporter) -> None:
    before = time.time_ns()
    answer = httpx.post(f"{traced.base}/classify", json={"text": [f"{SECRET} is fine", "a"]}, headers=HEADERS)
    after = time.time_ns()
    assert answer.status_code == 200
    queue, compute, request = spans(kept, 3)
    assert (queue.name, compute.name, request.name) == ("queue", "compute", "POST /classify")
    assert request.parent is not None
    assert (f"{request.parent.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, SPAN)
    assert {f"{span.context.trace_id:032x}" for span in (queue, compute, request)} == {TRACE}
    assert queue.parent == compute.parent == request.context
    assert request.attributes == {
        "http.request.method": "POST", "http.route": "/classify", "http.response.status_code": 200,
    }  # fmt: skip
    facts = {"lmworks.model": "sentiment", "lmworks.kind": "answer"}
    assert queue.attributes == facts
    assert compute.attributes is not None
    assert compute.attributes.items() > facts.items()
    assert 1 <= compute.attributes["lmworks.batches"] <= 2
    assert 1 <= compute.attributes["lmworks.rows"] <= 2
    tokens = httpx.post(f"{traced.base}/tokenize", json={"inputs": [f"{SECRET} is fine", "a"], "model": "sentiment"},
                        headers=HEADERS).json()  # fmt: skip
    assert compute.attributes["lmworks.tokens"] == sum(map(len, tokens))
    times = [before, request.start_time, queue.start_time, queue.end_time, compute.start_time, compute.end_time,
             request.end_time, after + 1_000_000]  # fmt: skip
    assert times == sorted(times), "one clock for both processes"
    assert queue.end_time == compute.start_time
    assert [span.name for span in spans(kept, 3)] == ["queue", "compute", "POST /tokenize"]


def test_streams_errors_and_refusals_have_theirs(traced: Running, kept: InMemorySpanExporter) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 8}
    with httpx.stream("POST", f"{traced.base}/generate", json=body, headers=HEADERS) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert '"done": true' in lines[-1]
    _, compute, request = spans(kept, 3)
    assert compute.attributes is not None
    assert compute.attributes["lmworks.tokens"] == 8
    assert compute.attributes["lmworks.prompt_tokens"] > 1
    assert request.end_time >= compute.end_time, "a stream lasts to its end"
    httpx.post(f"{traced.base}/v1/completions", json={**body, "n": 3, "temperature": 1.0}, headers=HEADERS)
    found = spans(kept, 7)
    assert sorted(span.name for span in found) == ["POST /v1/completions", *["compute"] * 3, *["queue"] * 3]
    for path, headers, status, route in (
        ("/classify", {}, 401, "other"), ("/nothing", HEADERS, 404, "/{path:path}"), ("/ner", HEADERS, 404, "/ner"),
    ):  # fmt: skip
        assert httpx.post(traced.base + path, json={"text": "a"}, headers=headers).status_code == status
        [span] = spans(kept, 1)
        assert span.attributes is not None
        assert (span.attributes["http.response.status_code"], span.attributes["http.route"]) == (status, route)
        assert span.status.is_unset
    for path in ("/health/live", "/health/ready"):
        httpx.get(traced.base + path)
    wrong = {**HEADERS, "traceparent": "00-nothing-01"}
    httpx.get(f"{traced.base}/info", headers=wrong)
    [span] = spans(kept, 1)
    assert (span.name, span.parent) == ("GET /info", None)


def test_no_text_and_no_key_is_in_a_span(
    traced: Running, kept: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where somebody traces the whole program: the framework would record paths, which are texts here."""
    theirs, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(theirs))
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
    for ask in ({"url": f"/predict/{SECRET}?a={SECRET}"}, {"url": f"/{SECRET}"}, {"url": "/v1/models"}):
        httpx.get(traced.base + ask["url"], headers=HEADERS)
    httpx.post(f"{traced.base}/generate", json={"prompt": SECRET, "max_tokens": 3}, headers=HEADERS)
    httpx.post(f"{traced.base}/classify", json={"text": SECRET, SECRET: 1}, headers=HEADERS)
    said = "".join(span.to_json() for span in spans(kept, 3 + 1 + 1 + 3 + 1))
    assert "/predict/{text:path}" in said
    assert SECRET not in said
    assert KEY not in said
    assert digest(KEY).hex() not in said
    assert theirs.get_finished_spans() == ()


def test_nothing_is_traced_unless_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert open_exporter(None) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    exporter = open_exporter(None)
    assert exporter is not None
    exporter.shutdown()
    for name, value, said in (("OTEL_SDK_DISABLED", "true", ""), ("OTEL_TRACES_EXPORTER", "none", ""),
                              ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "only http/protobuf")):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert open_exporter(None) is None
            assert said in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("lmworks.serve.telemetry.is_installed", lambda _: False)
        assert open_exporter(None) is None
        assert "lmworks[telemetry]" in capsys.readouterr().err
    with pytest.raises(InputError):
        open_exporter("127.0.0.1:4318")


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A stub of a collector: what it was sent, as OTLP says it."""
    found: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            found.append((self.path, ExportTraceServiceRequest.FromString(sent)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}", found
    listening.shutdown()
    listening.server_close()


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_spans_reach_a_collector_before_the_server_ends(
    how: str, collector: tuple[str, list[tuple[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, found = collector
    if how == "environment":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    process, base = start(str(made_folder()), *(["--telemetry", url] if how == "flag" else []))
    try:
        httpx.post(f"{base}/generate", json={"prompt": SECRET, "max_tokens": 3}, timeout=30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()
    assert {path for path, _ in found} == {"/v1/traces"}
    resources = [one for _, sent in found for one in sent.resource_spans]
    names = {
        pair.value.string_value for one in resources for pair in one.resource.attributes if "service.name" in pair.key
    }
    assert names == {"mine" if how == "environment" else "lmworks"}
    sent = [span for one in resources for scope in one.scope_spans for span in scope.spans]
    assert {span.name for span in sent} == {"POST /generate", "queue", "compute"}
    [request] = [span for span in sent if span.name.startswith("POST")]
    assert all(span.parent_span_id == request.span_id for span in sent if span is not request)
    assert SECRET not in str(sent)


def test_a_collector_that_is_not_there_holds_nobody_up() -> None:
    process, base = start(str(made_folder()), "--telemetry", "http://127.0.0.1:9")
    try:
        assert httpx.post(f"{base}/generate", json={"prompt": "a", "max_tokens": 3}, timeout=30).status_code == 200
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - began < 8
    finally:
        process.kill()
        process.communicate()
