"""What is learnt in a fine-tuning run: rows with their targets, and the loss over them."""

from __future__ import annotations

from collections.abc import Sequence

from lmworks.base.errors import InputError
from lmworks.tasks.base import Facts, Task
from lmworks.text.labelled import Labelled
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.examples import Masking, Row, balance
from lmworks.training.objectives import BinaryLoss, CausalLoss, ClassLoss, Objective, SpanLoss, SquaredLoss
from lmworks.training.rows import (
    make_class_rows,
    make_language_rows,
    make_masked_rows,
    make_span_rows,
    make_tag_rows,
)
from lmworks.training.tuning import Tuning

CLASSES = ("text-classification", "image-classification")
LABELLED = (*CLASSES, "token-classification")
WORDS = ("fill-mask", "text-generation")  # tasks whose labels are the text itself


def problem_type(data: Labelled) -> str | None:
    """Return what kind of labels texts or pictures have, in config.json's words; None for other tasks."""
    if data.task not in CLASSES:
        return None
    first = data.references[0]
    if isinstance(first, float):
        return "regression"
    return "single_label_classification" if isinstance(first, str) else "multi_label_classification"


def make_rows(
    data: Labelled,
    task: str,
    prepared: Task | None,
    tokenizer: Tokenizer | None,
    facts: Facts,
    labels: Sequence[str],
    problem: str | None,
    tuning: Tuning,
) -> list[Row]:
    """Encode examples as the task does, with what the model should say of each; errors name the file."""
    try:
        if task in WORDS:
            assert tokenizer is not None
            if task == "fill-mask":
                return make_masked_rows(tokenizer, data.examples, facts)
            return make_language_rows(tokenizer, data.examples, facts, long=tuning.long)
        assert prepared is not None
        if task == "token-classification":
            return make_tag_rows(prepared, data.examples, data.references, labels, every=tuning.every_token)
        if task == "question-answering":
            return make_span_rows(prepared, data.examples, data.references)
        return make_class_rows(prepared, data.examples, data.references, labels, problem)
    except InputError as error:
        error.where = f"{data.where}, {error.where}" if error.where else data.where
        raise


def make_masking(tokenizer: Tokenizer, *, whole_words: bool) -> Masking:
    """Return how tokens are hidden; raise InputError where the tokenizer has no mask."""
    if tokenizer.mask_id is None:
        raise InputError("this tokenizer has no mask token, so nothing can be hidden", fix="use --task text-generation")
    return Masking(tokenizer.mask_id, tokenizer.vocab_size, whole_words=whole_words)


def make_objective(task: str, problem: str | None, tuning: Tuning, weights: Sequence[float] | None) -> Objective:
    """Return what training minimises; raise InputError for an option that this task has no use for."""
    if problem == "regression" or problem == "multi_label_classification" or task not in LABELLED:
        for name, value in (("--label-smoothing", tuning.label_smoothing), ("--class-weights", tuning.class_weights)):
            if value:
                raise InputError(f"{name} is for labels that exclude each other", fix="leave it out")
        if task in WORDS:
            return CausalLoss()
        return SquaredLoss() if problem == "regression" else BinaryLoss() if problem else SpanLoss()
    return ClassLoss(weights=weights, smoothing=tuning.label_smoothing)


def single_classes(data: Labelled, task: str, rows: Sequence[Row]) -> list[int]:
    """Return the class of every row, or of every scored token; none where labels are no single classes."""
    if task == "token-classification":
        return [label for row in rows for label in row.targets["labels"] if label >= 0]
    single = task in CLASSES and isinstance(data.references[0], str)
    return [row.targets["labels"] for row in rows] if single else []


def class_weights(classes: Sequence[int], count: int) -> list[float]:
    """Return a weight for each of `count` classes, so that all weigh alike: n / (classes · its rows); 1 if absent."""
    rows = balance(classes)
    first = {label: place for place, label in reversed(list(enumerate(classes)))}
    return [float(rows[first[label]]) if label in first else 1.0 for label in range(count)]
