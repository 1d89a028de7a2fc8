"""A model as a function of an event, as AWS Lambda and its kin call it: no server, no torch.

Events: an HTTP API or a function URL (payload 2.0), a REST API (1.0), or the question itself. Answers are those of
POST /predict; errors are {"error": {message, type, param, code}} with their status.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lmworks.base.errors import LmworksError
from lmworks.runtime.predictor import load
from lmworks.serve.answers import labelled, plain
from lmworks.serve.refusals import Refused, refusal
from lmworks.serve.task_schema import PredictRequest, QaRequest

Handler = Callable[[Any, Any], dict[str, Any]]
CLASSIFY, TAG, QA, WRITE = "text-classification", "token-classification", "question-answering", "text-generation"
MOST_TOKENS = 128


def make_handler(folder: str | Path, *, dtype: str = "auto", name: str | None = None) -> Handler:
    """Open the model in `folder` now, in ONNX Runtime, and return handler(event, context); `name` is its folder's."""
    predictor = load(folder, runtime="onnx", dtype=dtype)
    task, name = predictor.task, name or Path(folder).resolve().name

    def answer(body: Any) -> dict[str, Any]:
        start = {"model": name, "task": task}
        try:
            if task == QA:
                asked = QaRequest.model_validate(body)
                found = predictor((asked.question, asked.context), top_k=asked.top_k, no_answer=asked.no_answer)
                return start | {"prediction": plain(found)}
            text = PredictRequest.model_validate(body).input_text
        except ValidationError as error:
            first = error.errors()[0]
            param = ".".join(str(part) for part in first["loc"]) or None
            raise Refused(400, first["msg"], param=param, code="invalid_value") from None
        start["input_text"] = text
        if task == WRITE:
            written = predictor.generate(text, max_tokens=MOST_TOKENS)
            return start | {"prediction": written.text, "finish_reason": written.finish_reason}
        [found] = predictor([text], **({"aggregation": "first"} if task == TAG else {}))
        if task == CLASSIFY:
            return start | {"prediction": found[0].label, **labelled(found)}
        return start | {"prediction": plain(found)}

    def handler(event: Any, context: Any) -> dict[str, Any]:
        method = method_of(event)
        try:
            if method in ("GET", "HEAD"):
                return respond(200, {"model": name, "task": task, "ready": True})
            if method not in (None, "POST"):
                raise Refused(405, f"{method} is not answered here", code="method_not_allowed")
            said = answer(event if method is None else body_of(event))
        except Refused as error:
            problem = error
        except LmworksError as error:
            problem = refusal(error)
        else:
            return said if method is None else respond(200, said)
        return problem.body() if method is None else respond(problem.status, problem.body())

    return handler


def method_of(event: Any) -> str | None:
    """Return the method of an HTTP event, or None for a question that was put directly."""
    if not isinstance(event, Mapping):
        return None
    context = event.get("requestContext")
    http = context.get("http") if isinstance(context, Mapping) else None
    found = (http.get("method") if isinstance(http, Mapping) else None) or event.get("httpMethod")
    return None if found is None else str(found).upper()


def body_of(event: Mapping[str, Any]) -> Any:
    """Return the JSON of an HTTP event. Raises Refused (400)."""
    try:
        body = event.get("body") or ""
        text = base64.b64decode(body, validate=True).decode("utf-8") if event.get("isBase64Encoded") else body
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise Refused(400, "the body is not valid JSON", code="invalid_json") from None


def respond(status: int, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer over HTTP."""
    headers = {"content-type": "application/json"}
    return {"statusCode": status, "headers": headers, "body": json.dumps(value, ensure_ascii=False)}
