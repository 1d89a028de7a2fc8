"""A model as a function of an event: answers, refusals, and no torch."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lmworks
from lmworks.cli import main
from lmworks.deploy.function import make_handler

TEXT = "a gorgeous, witty, seductive movie"


@pytest.fixture(scope="module")
def function(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deployed") / "function"
    assert main(["deploy", "serverless", str(graphs), "-o", str(out)]) == 0
    return out


def test_a_function_answers_its_event_without_torch(function: Path, graphs: Path) -> None:
    script = (
        "import sys, json; sys.modules['torch'] = sys.modules['fastapi'] = None; import handler; "
        "print(json.dumps([handler.handler(event, None) for event in json.load(sys.stdin)]))"
    )
    event = json.loads((function / "event.json").read_text())
    wrapped = {**event, "body": base64.b64encode(json.dumps({"input_text": TEXT}).encode()).decode(),
               "isBase64Encoded": True}  # fmt: skip
    old = {"httpMethod": "POST", "path": "/predict", "body": json.dumps({"input_text": TEXT})}
    done = subprocess.run([sys.executable, "-c", script], cwd=function, input=json.dumps([event, wrapped, old]),
                          capture_output=True, text=True, check=True)  # fmt: skip
    given = json.loads(done.stdout)
    for answer, text in zip(given, ("I love it", TEXT, TEXT), strict=True):
        [[best, *_]] = lmworks.predict(graphs, [text], runtime="onnx", dtype="fp32")
        body = json.loads(answer["body"])
        assert answer["statusCode"] == 200 and body["prediction"] == best.label
        assert body["score"] == pytest.approx(best.score, abs=1e-6) and body["input_text"] == text


def test_a_function_answers_questions_and_refuses_nonsense(reader: Path, graphs: Path) -> None:
    ask = make_handler(reader)
    question = {"question": "Who?", "context": "Ada wrote the first program."}
    [known] = lmworks.predict(reader, [("Who?", question["context"])], runtime="onnx")
    assert ask(question, None)["prediction"]["text"] == getattr(known, "text", None)
    handler = make_handler(graphs)
    http = {"version": "2.0", "requestContext": {"http": {"method": "POST"}}}
    for event, status, code in (
        ({**http, "body": "{"}, 400, "invalid_json"),
        ({**http, "body": "%", "isBase64Encoded": True}, 400, "invalid_json"),
        ({**http, "body": "[" * 100_000}, 400, "invalid_json"),
        (http, 400, "invalid_json"),
        ({**http, "body": json.dumps({"text": "x"})}, 400, "invalid_value"),
        ({**http, "body": json.dumps({"input_text": "word " * 2000})}, 400, "context_length_exceeded"),
        ({**http, "requestContext": {"http": {"method": "PUT"}}}, 405, "method_not_allowed"),
        ({"requestContext": "x", "httpMethod": "POST", "body": "{"}, 400, "invalid_json"),
        ({"requestContext": {"http": "x"}, "httpMethod": "POST", "body": "{"}, 400, "invalid_json"),
    ):
        answer = handler(event, None)
        assert (answer["statusCode"], json.loads(answer["body"])["error"]["code"]) == (status, code), event
    assert handler({"input_text": 1}, None)["error"]["param"] == "input_text"
    assert handler("text", None)["error"]["code"] == "invalid_value"
    assert handler({"requestContext": "x"}, None)["error"]["code"] == "invalid_value"
    ready = handler({**http, "requestContext": {"http": {"method": "GET"}}}, None)
    assert json.loads(ready["body"]) == {"model": "Sentiment_1", "task": "text-classification", "ready": True}
