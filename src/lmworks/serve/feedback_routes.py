"""POST /feedback, and answers that carry the id by which people can say what would have been right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from lmworks.base.optional import require
from lmworks.serve import monitor_routes
from lmworks.serve.answers import labelled
from lmworks.serve.refusals import Refused
from lmworks.serve.schema import Asked, Name, Text
from lmworks.serve.service import Service
from lmworks.serve.supervisor import Model

require("fastapi", extra="serve")
from fastapi import APIRouter, Request  # noqa: E402

if TYPE_CHECKING:
    from lmworks.serve.feedback_writer import Recorder

OFF = Refused(404, "this server takes no feedback: start it with --feedback URL", code="feedback_off")


class FeedbackRequest(Asked):
    """The body of POST /feedback: what is right for an answer, by its id, or for a text of a model."""

    label: Annotated[str, Field(min_length=1, max_length=1000)]
    id: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    text: Text | None = None
    pair: Text | None = None
    model: Name | None = None

    @model_validator(mode="after")
    def one_of_both(self) -> FeedbackRequest:
        """Refuse an id beside a text, and neither."""
        if (self.id is None) == (self.text is None):
            raise ValueError("give the id of an answer, or a text")
        if self.id is not None and (self.pair is not None or self.model is not None):
            raise ValueError("an id says which model and which texts")
        return self


def make_router(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["feedback"])

    @router.post("/feedback", status_code=201)
    async def feedback(wanted: FeedbackRequest) -> dict[str, Any]:
        """Keep what is right; 201 says that it is on the disk. Sending the same again changes nothing."""
        recorder: Recorder | None = service.recorder
        if recorder is None:
            raise OFF
        if wanted.id is not None:
            return await recorder.accept(wanted.label, id=wanted.id)
        from lmworks.serve.feedback import make_answer

        assert wanted.text is not None
        name = service.find(wanted.model, "text-classification").spec.name
        given = wanted.text if wanted.pair is None else (wanted.text, wanted.pair)
        return await recorder.accept(wanted.label, answer=make_answer(name, given, asked=False))

    return router


async def classify(
    service: Service, request: Request, model: Model, examples: list[Any], **options: Any
) -> list[dict[str, Any]]:
    """Return the answers of a classifier, each with its id where this server takes feedback."""
    answers = await monitor_routes.classify(service, request, model, examples, labelled, **options)
    if service.recorder is not None:
        await service.recorder.record(model.spec.name, examples, answers)
    return answers
