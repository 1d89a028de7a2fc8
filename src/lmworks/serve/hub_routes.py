"""Hugging Face's inference interface: POST /models/NAME {"inputs": …, "parameters": {…}}, answered as its pipelines do.

The names of its parameters are its own; one that the task does not have is refused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any

import numpy as np

from lmworks.base.optional import require
from lmworks.serve.engine import Written
from lmworks.serve.openai_routes import Answering, Part, event, name_of
from lmworks.serve.refusals import Refused
from lmworks.serve.schema import Writing
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
        **{
            name: name
            for name in ("top_k", "temperature", "top_p", "seed", "stop", "do_sample", "return_full_text", "details")
        },
        "max_new_tokens": "max_tokens",
        "repetition_penalty": "repeat_penalty",
    },
}
TOLD = ("do_sample", "return_full_text", "details")  # what the engine is not told; a stream has the new text alone
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
        if wanted.stream:
            if task != "text-generation" or not isinstance(inputs, str):
                raise Refused(400, "one text that is written is streamed, nothing else", param="stream",
                              code="invalid_value")  # fmt: skip
            settings = writing(options)
            return await Answering(service, model, Writing.model_validate({}), [inputs], **settings).streamed(
                partial(events, settings)
            )
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
            written = [[await write(request, model, text, options)] for text in texts]
            return written[0] if isinstance(inputs, str) else written
        found = [shape(task, answer) for answer in await service.answers(request, model, texts, **options)]
        if task == "text-classification":
            return found  # [[{label, score}]] also for a single text, as the interface answers
        return found[0] if isinstance(inputs, str) else found

    async def write(request: Request, model: Model, text: str, options: dict[str, Any]) -> dict[str, Any]:
        settings = writing(options)
        written = await service.ask(request, model, "write", param="inputs", prompt=text, settings=settings)
        before = text if options.get("return_full_text", True) else ""
        answer = {"generated_text": before + written.generation.text}
        return {**answer, "details": describe(written, settings, tokens=True)} if options.get("details") else answer

    return router


def writing(options: dict[str, Any]) -> dict[str, Any]:
    """Return how the engine writes, by these parameters."""
    settings = {name: value for name, value in options.items() if name not in TOLD}
    sampled = options.get("do_sample", bool(options.get("temperature")))
    settings["temperature"] = (options.get("temperature") or 1.0) if sampled else 0.0
    return {"max_tokens": NEW_TOKENS, **({"logprobs": 0} if options.get("details") else {}), **settings}


async def events(settings: dict[str, Any], texts: Answering, parts: AsyncIterator[Part]) -> AsyncIterator[str]:
    """Yield the events of a stream as text-generation-inference has them; letters of several tokens come as one."""
    count = 0
    async for _, what, value in parts:
        if what == "error":
            yield event({"error": texts.error(value)["error"]["message"], "error_type": "generation"})
            return
        done = what == "done"
        tokens = value.generation.tokens if done else value.tokens
        count = len(tokens) if done else count + len(tokens)
        logprob = None if done or value.chosen is None else sum(one[1] for one in value.chosen)
        token = {"id": tokens[-1], "text": "" if done else value.text, "logprob": logprob or 0.0, "special": done}
        whole = value.generation.text if done else None
        details = describe(value, settings) if done else None
        yield event({"index": count, "token": token, "generated_text": whole, "details": details})


def describe(written: Written, settings: dict[str, Any], *, tokens: bool = False) -> dict[str, Any]:
    """Return why a text ended, and perhaps its tokens."""
    done = written.generation
    stopped = "eos_token" if written.ended else "stop_sequence"
    found: dict[str, Any] = {
        "finish_reason": "length" if done.finish_reason == "length" else stopped,
        "generated_tokens": len(done.tokens), "seed": settings.get("seed"),
    }  # fmt: skip
    if not tokens:
        return found | {"input_length": written.prompt_tokens}
    each = zip(done.tokens, written.chosen or (), strict=True)
    shown = [{"id": id, "text": name_of(text), "logprob": p, "special": False} for id, (text, p, _) in each]
    if written.ended:
        shown[-1]["special"] = True
    return found | {"prefill": [], "tokens": shown}


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
