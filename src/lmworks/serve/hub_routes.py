"""Hugging Face's inference interface: POST /models/NAME {"inputs": …, "parameters": {…}}, answered as its pipelines do.

The names of its parameters are its own; one that the task does not have is refused.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from lmworks.base.optional import require
from lmworks.serve.refusals import Refused
from lmworks.serve.service import Service
from lmworks.serve.supervisor import Model
from lmworks.serve.task_schema import HubRequest, Question, Sentences

require("fastapi", extra="serve")
from fastapi import APIRouter, Path, Request  # noqa: E402

TAKES = {  # task -> the parameters that it has: theirs, and ours
    "text-classification": {"top_k": "top_k", "function_to_apply": "scores", "truncation": "long"},
    "token-classification": {"aggregation_strategy": "aggregation"},
    "question-answering": {"top_k": "top_k"},
    "fill-mask": {"top_k": "top_k", "targets": "targets"},
    "feature-extraction": {"normalize": "normalize", "truncation": "long"},
    "text-generation": {
        **{name: name for name in ("top_k", "temperature", "top_p", "seed", "stop", "do_sample", "return_full_text")},
        "max_new_tokens": "max_tokens",
    },
}
NEW_TOKENS = 20  # where no number is given, as in transformers


def make_router(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["hugging face"])

    @router.post("/models/{name}")
    async def infer(wanted: HubRequest, request: Request, name: Annotated[str, Path(max_length=200)]) -> Any:
        """Answer as a pipeline of transformers would."""
        model = service.find(name)
        task = str(model.spec.task)
        if task not in TAKES:
            raise Refused(400, f"{name} does {task}, which this interface has no shape for", param="inputs")
        options = read_parameters(wanted.given(), task)
        inputs = wanted.inputs
        if isinstance(inputs, Question) != (task == "question-answering"):
            expected = "{question, context}" if task == "question-answering" else "a text, or a list of texts"
            raise Refused(400, f"{task} reads {expected}", param="inputs", code="invalid_value")
        if isinstance(inputs, Question):
            found = (await service.answers(request, model, [(inputs.question, inputs.context)], **options))[0]
            answers = [{"answer": one.text, "score": one.score, "start": one.start, "end": one.end}
                       for one in (found if isinstance(found, list) else [found])]  # fmt: skip
            return answers if isinstance(found, list) else answers[0]
        if isinstance(inputs, Sentences):
            if task != "feature-extraction":
                raise Refused(400, f"{task} reads a text, or a list of texts", param="inputs", code="invalid_value")
            texts = [inputs.source_sentence, *inputs.sentences]
            vectors = np.stack(await service.answers(request, model, texts, **{**options, "normalize": True}))
            return (vectors[1:] @ vectors[0]).tolist()
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        if task == "text-generation":
            written = [[await write(request, model, text, dict(options))] for text in texts]
            return written[0] if isinstance(inputs, str) else written
        found = [shape(task, answer) for answer in await service.answers(request, model, texts, **options)]
        if task == "text-classification":
            return found  # [[{label, score}]] also for a single text, as the interface answers
        return found[0] if isinstance(inputs, str) else found

    async def write(request: Request, model: Model, text: str, options: dict[str, Any]) -> dict[str, str]:
        whole = options.pop("return_full_text", True)
        sampled = options.pop("do_sample", bool(options.get("temperature")))
        options["temperature"] = options.get("temperature") or 1.0 if sampled else 0.0
        settings = {"max_tokens": NEW_TOKENS, **options}
        written = await service.ask(request, model, "write", param="inputs", prompt=text, settings=settings)
        return {"generated_text": (text if whole else "") + written.generation.text}

    return router


def read_parameters(options: dict[str, Any], task: str) -> dict[str, Any]:
    """Return our names of the parameters. Raises Refused for one that the task does not have."""
    for name in options:
        if name not in TAKES[task]:
            raise Refused(400, f"{task} has no parameter {name}", param=name, code="unsupported_parameter")
    named = {TAKES[task][name]: value for name, value in options.items()}
    if task == "token-classification":  # its own default; "none" there is every token that has a label
        strategy = named.get("aggregation", "simple")
        named["aggregation"] = "tokens" if strategy == "none" else strategy
    if "long" in named:
        named["long"] = "truncate" if named["long"] else "error"
    return named


def shape(task: str, answer: Any) -> Any:
    """Return an answer in the shape of transformers' pipelines."""
    if task == "text-classification":
        return [{"label": one.label, "score": one.score} for one in answer]
    if task == "token-classification":
        if answer and hasattr(answer[0], "token"):  # no aggregation: tokens, without those outside
            return [{"entity": one.label, "score": one.score, "index": i, "word": one.token, "start": one.start,
                     "end": one.end} for i, one in enumerate(answer) if one.attends and one.label != "O"]  # fmt: skip
        return [{"entity_group": one.label, "score": one.score, "word": one.word, "start": one.start, "end": one.end}
                for one in answer]  # fmt: skip
    if task == "fill-mask":
        if answer and isinstance(answer[0], list):
            return [shape(task, one) for one in answer]
        return [{"score": one.score, "token": one.token, "token_str": one.token_str, "sequence": one.sequence}
                for one in answer]  # fmt: skip
    return np.asarray(answer).tolist()
