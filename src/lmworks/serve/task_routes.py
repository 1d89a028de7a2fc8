"""The routes of the tasks: our own, those of text-embeddings-inference, those of Hugging Face's inference interface."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from lmworks.base.optional import require
from lmworks.serve import feedback_routes, monitor_routes
from lmworks.serve.answers import plain
from lmworks.serve.openai_routes import Answering, Part, event
from lmworks.serve.refusals import Refused
from lmworks.serve.schema import MOST_IN_ADDRESS
from lmworks.serve.service import Service
from lmworks.serve.supervisor import Model
from lmworks.serve.task_schema import (
    ClassifyRequest,
    EmbedRequest,
    FillRequest,
    GenerateRequest,
    NerRequest,
    PredictRequest,
    QaRequest,
    RerankRequest,
    SimilarityRequest,
    TokenizeRequest,
)

require("fastapi", extra="serve")
from fastapi import APIRouter, Path, Request, Response  # noqa: E402
from fastapi.responses import JSONResponse  # noqa: E402

CLASSIFY, TAG, QA = "text-classification", "token-classification", "question-answering"
FILL, EMBED, WRITE = "fill-mask", "feature-extraction", "text-generation"


def make_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["tasks"])

    def answered(model: Model, answers: list[dict[str, Any]]) -> dict[str, Any]:
        return {"model": model.spec.name, "answers": answers}

    @router.post("/classify")
    async def classify(wanted: ClassifyRequest, request: Request) -> dict[str, Any]:
        """Label texts: the likeliest label, its score, and all labels by falling score."""
        model = service.find(wanted.model, CLASSIFY)
        examples: list[Any] = wanted.texts
        if wanted.pair is not None:
            seconds = [wanted.pair] if isinstance(wanted.pair, str) else wanted.pair
            if len(seconds) != len(examples):
                raise Refused(400, f"{len(seconds)} second texts for {len(examples)} texts", param="pair")
            examples = list(zip(examples, seconds, strict=True))
        options = {"top_k": wanted.top_k, "scores": wanted.scores, "long": wanted.long}
        return answered(model, await feedback_routes.classify(service, request, model, examples, **options))

    @router.post("/ner")
    async def ner(wanted: NerRequest, request: Request) -> dict[str, Any]:
        """Find the names in texts; start and end count characters (Unicode code points)."""
        model = service.find(wanted.model, TAG)
        found = await service.answers(request, model, wanted.texts, aggregation=wanted.aggregation, long=wanted.long)
        return answered(model, [{"entities": plain(entities)} for entities in found])

    @router.post("/qa")
    async def qa(wanted: QaRequest, request: Request) -> dict[str, Any]:
        """Answer a question from a context of any length."""
        model = service.find(wanted.model, QA)
        found = await service.answers(request, model, [(wanted.question, wanted.context)], top_k=wanted.top_k,
                                      no_answer=wanted.no_answer,
                                      max_answer_length=wanted.max_answer_length)  # fmt: skip
        return answered(model, plain(found[0] if isinstance(found[0], list) else found))

    @router.post("/fill-mask")
    async def fill_mask(wanted: FillRequest, request: Request) -> dict[str, Any]:
        """Fill the masks in texts: for each, the likeliest tokens."""
        model = service.find(wanted.model, FILL)
        found = await service.answers(request, model, wanted.texts, top_k=wanted.top_k, targets=wanted.targets,
                                      long=wanted.long)  # fmt: skip
        return answered(model, [{"fills": plain(fills)} for fills in found])

    async def predict_text(text: str, name: str | None, request: Request) -> dict[str, Any]:
        model = service.find(name, CLASSIFY, TAG, EMBED, FILL, WRITE)
        task = model.spec.task
        start: dict[str, Any] = {"input_text": text, "model": model.spec.name, "task": task}
        if task == WRITE:
            payload = {"prompt": text, "settings": {"max_tokens": 128}}
            said = await monitor_routes.look_at_prompt(service, request, model, text)
            if said.get("ood") and service.watches.how.when_unsure == "abstain":
                return start | said | {"prediction": None, "finish_reason": None}
            written = (await service.ask(request, model, "write", param="input_text", **payload)).generation
            return start | said | {"prediction": written.text, "finish_reason": written.finish_reason}
        if task == CLASSIFY:
            [one] = await feedback_routes.classify(service, request, model, [text])
            return start | {"prediction": one["label"], **one}
        whole_words = {"aggregation": "first"} if task == TAG else {}
        [found] = await service.answers(request, model, [text], **whole_words)
        return start | {"prediction": plain(found)}

    @router.post("/predict")
    async def predict(wanted: PredictRequest, request: Request) -> dict[str, Any]:
        """Answer a text by whatever the model does."""
        return await predict_text(wanted.input_text, wanted.model, request)

    @router.get("/predict/{text:path}")
    async def predict_path(request: Request, text: str = Path(max_length=MOST_IN_ADDRESS)) -> dict[str, Any]:
        """Answer a text in the address by whatever the first model does."""
        return await predict_text(text, None, request)

    @router.post("/generate", response_model=None)
    async def generate(wanted: GenerateRequest, request: Request) -> Response:
        """Go on with a text, as server-sent events: {"text"} … and at the end {"done": true, "text", …}."""
        model = service.find(wanted.model, WRITE)
        if wanted.n != 1:
            raise Refused(400, "/generate writes one text: use /v1/completions", param="n", code="invalid_value")
        payload = {"prompt": wanted.prompt, "settings": wanted.settings(0, max_tokens=wanted.max_tokens)}
        if not wanted.stream:
            return JSONResponse(ending(await service.ask(request, model, "write", param="prompt", **payload)))
        texts = Answering(service, model, wanted, [wanted.prompt], max_tokens=wanted.max_tokens)
        return await texts.streamed(events)

    async def embed_texts(model: Model, texts: list[str], request: Request, **options: Any) -> np.ndarray[Any, Any]:
        return np.stack(await service.answers(request, model, texts, **options))

    @router.post("/embed")
    async def embed(wanted: EmbedRequest, request: Request) -> list[list[float]]:
        """Turn texts into vectors of length 1, as text-embeddings-inference does."""
        model = service.find(wanted.model, EMBED)
        texts = [wanted.inputs] if isinstance(wanted.inputs, str) else wanted.inputs
        long = "truncate" if wanted.truncate else None
        vectors: list[list[float]] = (
            await embed_texts(model, texts, request, long=long, normalize=wanted.normalize)
        ).tolist()
        return vectors

    @router.post("/similarity")
    async def similarity(wanted: SimilarityRequest, request: Request) -> list[float]:
        """Compare a sentence with others: the cosine of their vectors."""
        model = service.find(wanted.model, EMBED)
        texts = [wanted.inputs.source_sentence, *wanted.inputs.sentences]
        vectors = await embed_texts(model, texts, request, normalize=True)
        cosines: list[float] = (vectors[1:] @ vectors[0]).tolist()
        return cosines

    @router.post("/rerank")
    async def rerank(wanted: RerankRequest, request: Request) -> list[dict[str, Any]]:
        """Sort texts by how well they fit a query: by a model that reads both, or by the cosine of their vectors."""
        model = service.find(wanted.model, CLASSIFY, EMBED)
        long = "truncate" if wanted.truncate else None
        if model.spec.task == EMBED:
            vectors = await embed_texts(model, [wanted.query, *wanted.texts], request, long=long, normalize=True)
            scores = (vectors[1:] @ vectors[0]).tolist()
        else:
            pairs = [(wanted.query, text) for text in wanted.texts]
            kind = "none" if wanted.raw_scores else "sigmoid"
            found = await service.answers(request, model, pairs, scores=kind, long=long)
            if any(len(labels) != 1 for labels in found):
                raise Refused(400, f"{model.spec.name} has several labels: it ranks nothing", param="model")
            scores = [labels[0].score for labels in found]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        return [
            {"index": i, "score": scores[i]} | ({"text": wanted.texts[i]} if wanted.return_text else {}) for i in order
        ]

    @router.post("/tokenize")
    async def tokenize(wanted: TokenizeRequest, request: Request) -> list[list[dict[str, Any]]]:
        """Show the tokens of texts; start and stop count characters."""
        model = service.find(wanted.model)
        texts = [wanted.inputs] if isinstance(wanted.inputs, str) else wanted.inputs
        found = await service.ask(request, model, "tokenize", param="inputs", texts=texts)
        names = ("id", "text", "start", "stop", "special")
        return [[dict(zip(names, row, strict=True)) for row in tokens] for tokens in found]

    return router


async def events(texts: Answering, parts: AsyncIterator[Part]) -> AsyncIterator[str]:
    """Yield the events of /generate."""
    async for _, what, value in parts:
        if what == "piece":
            yield event({"text": value.text})
        elif what == "error":
            yield event(texts.error(value))
        else:
            yield event({"done": True, **ending(value)})


def ending(written: Any) -> dict[str, Any]:
    """Return a whole text, and why it ended."""
    done = written.generation
    return {"text": done.text, "tokens": done.tokens, "finish_reason": done.finish_reason,
            "prompt_tokens": written.prompt_tokens}  # fmt: skip
