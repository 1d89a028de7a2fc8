"""The tasks by their pipeline names, and how one is made for a model."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError, did_you_mean
from lmworks.models.families import TASKS
from lmworks.tasks.base import Facts, Task
from lmworks.tasks.classify import TextClassification
from lmworks.tasks.embed import FeatureExtraction, read_pooling
from lmworks.tasks.fill_mask import FillMask
from lmworks.tasks.image import ImageClassification
from lmworks.tasks.ner import TokenClassification
from lmworks.tasks.qa import QuestionAnswering
from lmworks.tokens.tokenizer import Tokenizer

MAKERS: dict[str, Callable[..., Any]] = {  # those that answer; text-generation goes on instead
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "feature-extraction": FeatureExtraction,
    "fill-mask": FillMask,
    "image-classification": ImageClassification,
}


def check_task(name: str) -> str:
    """Return the name of a task; raise InputError that lists them where there is none of this name."""
    if name not in TASKS:
        raise InputError(f"there is no task {name!r}", expected=", ".join(TASKS), fix=did_you_mean(name, TASKS).strip())
    return name


def find_task(kind: str) -> str:
    """Return the task that a head answers: "SequenceClassification" -> "text-classification"."""
    for task, head in TASKS.items():
        if head == kind:
            return task
    raise InputError(
        f"no task answers with the head {kind}", expected=", ".join(TASKS), fix='name a task: task="feature-extraction"'
    )


def make_task(name: str, folder: Path, tokenizer: Tokenizer | None, facts: Facts, **options: Any) -> Task:
    """Return the task made for one model; raise InputError for an option that it does not have."""
    maker = MAKERS[name]
    known = [key for key, value in signature(maker).parameters.items() if value.kind is value.KEYWORD_ONLY]
    for key in options:
        if key not in known:
            raise InputError(
                f"{name} has no option {key!r}", expected=", ".join(known), fix=did_you_mean(key, known).strip()
            )
    if name == "feature-extraction" and options.get("pooling", "auto") == "auto":
        options = {"recipe": read_pooling(folder), **options}
    task: Task = maker(folder if name == "image-classification" else tokenizer, facts, **options)
    return task
