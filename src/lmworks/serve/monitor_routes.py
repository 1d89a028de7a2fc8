"""Answers that say how sure they are, and GET /drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmworks.base.optional import require
from lmworks.serve.service import Service
from lmworks.serve.supervisor import Model

require("fastapi", extra="serve")
from fastapi import APIRouter, Request  # noqa: E402

NO_ANSWER: dict[str, Any] = {"label": None, "score": None, "labels": []}


def make_router(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["operation"])

    @router.get("/drift")
    async def drift() -> dict[str, Any]:
        """Compare the latest traffic of each model that has a monitor with its reference."""
        return {"models": {name: watch.state() for name, watch in service.watches.watches.items()}}

    return router


async def look_at_prompt(service: Service, request: Request, model: Model, prompt: str) -> dict[str, Any]:
    """Return ood_score and ood of what a model that writes is to go on with; nothing where it has no monitor."""
    if (watch := service.watches.watches.get(model.spec.name)) is None:
        return {}
    [seen] = await service.ask(request, model, "score", param="input_text", texts=[prompt])
    service.watches.add(watch, [seen])
    return {"ood_score": seen.ood_score, "ood": seen.ood}


async def classify(
    service: Service, request: Request, model: Model, examples: Sequence[Any], shape: Callable[[Any], dict[str, Any]],
    **options: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the answers of a classifier; one with a monitor says confidence, ood_score and ood, and may step back.

    `shape` makes an answer of labels. Where an input is strange and the policy says so, its label is null (abstain), or
    another model's, which is then named (`answered_by`), without a confidence.
    """
    watches = service.watches
    if (watch := watches.watches.get(model.spec.name)) is None:  # looked up at once, as long as it is the model's
        return [shape(labels) for labels in await service.answers(request, model, examples, **options)]
    seen = await service.answers(request, model, examples, check=True, **options)
    watches.add(watch, seen)
    answers = [
        {**shape(one.labels), "confidence": one.confidence, "ood_score": one.ood_score, "ood": one.ood} for one in seen
    ]
    strange = [i for i, one in enumerate(seen) if one.ood]
    if watches.how.when_unsure == "abstain":
        for i in strange:
            answers[i] |= NO_ANSWER
    elif (name := watches.how.fallback) is not None and name != model.spec.name and strange:
        other = service.find(name)
        for i, labels in zip(
            strange, await service.answers(request, other, [examples[i] for i in strange], **options), strict=True
        ):
            answers[i] |= {**shape(labels), "confidence": None, "answered_by": name}  # which was in another label
    return answers
