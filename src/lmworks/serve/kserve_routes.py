"""The Open Inference Protocol, version 2, as KServe, Triton and Seldon speak it: tensors of texts in, tensors out.

    GET  /v2  /v2/health/live  /v2/health/ready  /v2/models/NAME  /v2/models/NAME/ready   also with /versions/1
    POST /v2/models/NAME/infer                 {"inputs": [{"name": "text", "shape": [n], "datatype": "BYTES", "data"}]}
    POST /v2/models/NAME/generate[_stream]     {"text_input", "parameters": {"max_tokens", …}} -> {"text_output"}

Errors are {"error": "…"}. Data is JSON; the binary extension is not offered.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmworks import __version__
from lmworks.base.optional import require
from lmworks.serve import monitor_routes
from lmworks.serve.answers import labelled, plain
from lmworks.serve.openai_routes import Answering, Part, event
from lmworks.serve.refusals import Refused
from lmworks.serve.schema import MOST_CHARACTERS, MOST_TEXTS, Name
from lmworks.serve.service import Service
from lmworks.serve.supervisor import Model
from lmworks.serve.task_schema import GenerateRequest

require("fastapi", extra="serve")
from fastapi import APIRouter, Request, Response  # noqa: E402
from fastapi.responses import JSONResponse  # noqa: E402

VERSION = "1"
CLASSIFY, TAG, QA = "text-classification", "token-classification", "question-answering"
FILL, EMBED, WRITE = "fill-mask", "feature-extraction", "text-generation"
Outputs = dict[str, tuple[str, list[Any]]]  # of each tensor its datatype, and an item for each input
TENSORS: dict[str | None, dict[str, str]] = {
    CLASSIFY: {"label": "BYTES", "score": "FP32"},
    TAG: {"entities": "BYTES"},
    QA: {"answer": "BYTES", "score": "FP32", "start": "INT64", "end": "INT64"},
    FILL: {"fills": "BYTES"},
    EMBED: {"embedding": "FP32"},
    WRITE: {"text": "BYTES"},
}  # entities and fills are JSON
WATCHED = {"confidence": "FP32", "ood_score": "FP32", "ood": "BOOL"}  # beside them where a monitor watches
BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}


class Tensor(BaseModel):
    """An input."""

    model_config = ConfigDict(extra="ignore", strict=True)
    name: Name
    shape: Annotated[list[Annotated[int, Field(ge=0, le=MOST_TEXTS)]], Field(min_length=1, max_length=2)]
    datatype: Name
    data: Annotated[list[Any], Field(max_length=MOST_TEXTS)]

    def texts(self) -> list[str]:
        """Return the texts, flat. Raises Refused for what is no tensor of texts."""
        flat = [item for row in self.data for item in (row if isinstance(row, list) else [row])]
        if self.datatype != "BYTES" or not all(isinstance(item, str) for item in flat):
            raise Refused(400, f"the input {self.name} must hold texts, as BYTES")
        if math.prod(self.shape) != len(flat) or not flat:
            raise Refused(400, f"the input {self.name} has {len(flat)} texts, its shape says {self.shape}")
        if any(len(text) > MOST_CHARACTERS for text in flat):
            raise Refused(400, f"a text of {self.name} has more than {MOST_CHARACTERS:,} characters")
        return flat


class Wanted(BaseModel):
    """An output that is asked for."""

    model_config = ConfigDict(extra="ignore")
    name: Name


class InferRequest(BaseModel):
    """The body of /infer; parameters of the protocol that mean nothing here are left alone."""

    model_config = ConfigDict(extra="ignore")
    id: Name | None = None
    inputs: Annotated[list[Tensor], Field(min_length=1, max_length=4)]
    outputs: Annotated[list[Wanted], Field(max_length=16)] | None = None


class TextRequest(BaseModel):
    """The body of /generate; its parameters are those of our own /generate."""

    model_config = ConfigDict(extra="ignore")
    text_input: Annotated[str, Field(max_length=MOST_CHARACTERS)]
    parameters: Annotated[dict[str, Any], Field(max_length=16)] = Field(default_factory=dict)


def make_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v2", tags=["open inference protocol"])

    @router.get("")
    async def server() -> dict[str, Any]:
        """Say what the server is."""
        return {"name": "lmworks", "version": __version__, "extensions": ["generate"]}

    @router.get("/health/live")
    async def live() -> dict[str, bool]:
        """Say that the process answers."""
        return {"live": True}

    @router.get("/health/ready")
    async def ready() -> JSONResponse:
        """Say whether requests are answered now."""
        problem = service.problem
        return JSONResponse({"ready": not problem}, 503 if problem else 200)

    async def infer(model: Model, request: Request) -> Response:
        """Answer tensors of texts."""
        asked = InferRequest.model_validate_json(await request.body())
        task = model.spec.task
        given: dict[str, list[str]] = {}
        for tensor in asked.inputs:
            if tensor.name in given:
                raise Refused(400, f"the input {tensor.name} is given twice")
            given[tensor.name] = tensor.texts()
        names = inputs_of(task)
        if set(given) != set(names):
            raise Refused(400, f"the inputs are {', '.join(given)}; {model.spec.name} reads {', '.join(names)}")
        columns = [given[name] for name in names]
        if len({len(column) for column in columns}) > 1:
            raise Refused(400, f"{' and '.join(names)} must have the same number of texts")
        examples: list[Any] = list(zip(*columns, strict=True)) if len(columns) > 1 else columns[0]
        found = await answer(service, request, model, examples)
        if asked.outputs:
            unknown = [one.name for one in asked.outputs if one.name not in found]
            if unknown:
                raise Refused(400, f"there is no output {unknown[0]}: {', '.join(found)}")
            found = {one.name: found[one.name] for one in asked.outputs}
        outputs = [
            {"name": name, "datatype": kind, "shape": shape_of(rows), "data": flat(rows)}
            for name, (kind, rows) in found.items()
        ]
        named = {} if asked.id is None else {"id": asked.id}
        return JSONResponse({"model_name": model.spec.name, "model_version": VERSION, **named, "outputs": outputs})

    async def generate(model: Model, request: Request, *, stream: bool) -> Response:
        """Write a text, whole or as events."""
        asked = TextRequest.model_validate_json(await request.body())
        if model.spec.task != WRITE:
            raise Refused(400, f"{model.spec.name} does not write texts: it does {model.spec.task}")
        wanted = GenerateRequest.model_validate({**asked.parameters, "prompt": asked.text_input, "stream": stream})
        start = {"model_name": model.spec.name, "model_version": VERSION}
        if stream:
            texts = Answering(service, model, wanted, [wanted.prompt], max_tokens=wanted.max_tokens)
            return await texts.streamed(lambda *given: events(start, *given))
        settings = wanted.settings(0, max_tokens=wanted.max_tokens)
        written = await service.ask(request, model, "write", prompt=wanted.prompt, settings=settings)
        return JSONResponse({**start, "text_output": written.generation.text, "done": True})

    def route(path: str, method: str, work: Callable[[Model, Request], Coroutine[Any, Any, Response]]) -> None:
        for version in ("", "/versions/{version}"):
            at = f"/models/{{name}}{version}{path}"

            async def handle(request: Request, name: Name) -> Response:
                try:
                    asked = request.path_params.get("version", VERSION)
                    if asked != VERSION:
                        raise Refused(404, f"there is no version {asked} of {name}")
                    return await work(service.find(name), request)
                except ValidationError as error:
                    first = error.errors()[0]
                    where = ".".join(str(part) for part in first["loc"])
                    return JSONResponse({"error": f"{where or 'body'}: {first['msg']}"}, 400)
                except Refused as error:
                    return JSONResponse({"error": error.message}, error.status, error.headers)

            named = f"v2_{method.lower()}_{path.strip('/') or 'model'}{'_version' if version else ''}"
            router.add_api_route(
                at, handle, methods=[method], response_model=None, operation_id=named, include_in_schema=not version,
                openapi_extra=BODY if method == "POST" else None,
            )  # fmt: skip

    async def metadata(model: Model, _: Request) -> Response:
        return JSONResponse(describe(model, watched=model.spec.name in service.watches.watches))

    async def model_ready(model: Model, _: Request) -> Response:
        there = not service.problem and model.state == "ready"
        return JSONResponse({"name": model.spec.name, "ready": there}, 200 if there else 503)

    route("", "GET", metadata)
    route("/ready", "GET", model_ready)
    route("/infer", "POST", infer)
    route("/generate", "POST", lambda model, request: generate(model, request, stream=False))
    route("/generate_stream", "POST", lambda model, request: generate(model, request, stream=True))
    return router


def inputs_of(task: str | None) -> tuple[str, ...]:
    """Return the names of the inputs that a task reads."""
    return ("question", "context") if task == QA else ("text",)


def describe(model: Model, *, watched: bool) -> dict[str, Any]:
    """Return the metadata of a model; one with a monitor says more."""
    task = model.spec.task
    tensors = TENSORS.get(task, {}) | (WATCHED if watched and task == CLASSIFY else {})
    return {
        "name": model.spec.name, "versions": [VERSION], "platform": f"lmworks_{model.spec.runtime}",
        "inputs": [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in inputs_of(task)],
        "outputs": [
            {"name": name, "datatype": kind, "shape": [-1, -1] if name == "embedding" else [-1]}
            for name, kind in tensors.items()
        ],
    }  # fmt: skip


async def answer(service: Service, request: Request, model: Model, examples: Sequence[Any]) -> Outputs:
    """Return the output tensors for some examples. Raises Refused."""
    task = model.spec.task
    if task == CLASSIFY:
        rows = await monitor_routes.classify(service, request, model, examples, labelled)
        kinds = TENSORS[CLASSIFY] | WATCHED
        empty = {"label": "", "score": 0.0, "confidence": 0.0}  # of a model that abstains, or lets another one answer
        return {
            name: (kind, [empty[name] if row[name] is None else row[name] for row in rows])
            for name, kind in kinds.items() if name in rows[0]
        }  # fmt: skip
    if task == WRITE:
        texts = [
            await service.ask(request, model, "write", prompt=prompt, settings={"max_tokens": 128})
            for prompt in examples
        ]
        return {"text": ("BYTES", [one.generation.text for one in texts])}
    if task not in TENSORS:
        raise Refused(400, f"{model.spec.name} does {task}, which reads no texts")
    options: dict[str, Any] = {"aggregation": "first"} if task == TAG else {}
    found = await service.answers(request, model, examples, **options)
    if task == EMBED:
        return {"embedding": ("FP32", plain(list(found)))}
    if task == QA:
        first = [plain(one[0] if isinstance(one, list) else one) for one in found]
        return {name: (kind, [one["text" if name == "answer" else name] for one in first])
                for name, kind in TENSORS[QA].items()}  # fmt: skip
    [name] = TENSORS[task]
    return {name: ("BYTES", [json.dumps(plain(one), ensure_ascii=False) for one in found])}


def shape_of(rows: Sequence[Any]) -> list[int]:
    """Return (n,) or (n, D)."""
    return [len(rows), len(rows[0])] if isinstance(rows[0], list) else [len(rows)]


def flat(rows: Sequence[Any]) -> list[Any]:
    """Return the items row by row."""
    return [item for row in rows for item in (row if isinstance(row, list) else [row])]


async def events(start: Mapping[str, str], texts: Answering, parts: AsyncIterator[Part]) -> AsyncIterator[str]:
    """Yield the events of /generate_stream: {"text_output": a piece, "done"}."""
    async for _, what, value in parts:
        if what == "error":
            yield event({"error": texts.error(value)["error"]["message"]})
        else:
            done = what == "done"
            yield event({**start, "text_output": "" if done else value.text, "done": done})
