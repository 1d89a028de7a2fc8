"""What is learnt in a fine-tuning run: rows with their targets, and the loss over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmworks.base.errors import InputError
from lmworks.tasks.base import Facts, Task
from lmworks.tasks.embed import FeatureExtraction
from lmworks.text.labelled import Labelled
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.contrastive import GroupLoss, make_group_objective, make_group_rows, pooled, read_by_head
from lmworks.training.examples import Masking, Row, balance
from lmworks.training.measure import CLASSES
from lmworks.training.objectives import BinaryLoss, CausalLoss, ClassLoss, Objective, SpanLoss, SquaredLoss
from lmworks.training.rows import (
    make_class_rows,
    make_language_rows,
    make_masked_rows,
    make_span_rows,
    make_tag_rows,
)
from lmworks.training.tuning import LONG_TASKS, Tuning

NEVER_LONG = {  # what becomes of what is longer than the model where --long does not say it
    "text-generation": "texts are read in windows, instructions are refused or cut",
    "fill-mask": "texts are read in windows",
    "question-answering": "contexts are read in windows",
    "image-classification": "pictures have one length",
}
LABELLED = (*CLASSES, "token-classification")
PACKED_ROW = 512
MANY_ROWS = 50  # examples among which two should have the same label
WORDS = ("fill-mask", "text-generation")  # tasks whose labels are the text itself


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
        if task == "feature-extraction":
            return make_group_rows(prepared, data.examples, data.references)
        if task == "token-classification":
            return make_tag_rows(prepared, data.examples, data.references, labels, every=tuning.every_token)
        if task == "question-answering":
            return make_span_rows(prepared, data.examples, data.references)
        return make_class_rows(prepared, data.examples, data.references, labels, problem)
    except InputError as error:
        error.where = f"{data.where}, {error.where}" if error.where else data.where
        raise


def check_order(task: str, tuning: Tuning, examples: Sequence[Any] = ()) -> None:
    """Raise InputError for a way to read, pack, order or mix the rows that this task, or another knob, does not allow.

    With --also-task what one task has no use for may be another's: finetune_tasks.py looks at them all.
    """
    compared = task == "feature-extraction" or getattr(tuning, "contrastive", False)
    alone = not tuning.also_task  # else a knob may be another task's
    pictures, answers = task == "image-classification", any(isinstance(one, dict) for one in examples)
    refused = {
        f"--long {tuning.long} has no use: {NEVER_LONG.get(task)}": (
            tuning.long != "error" and alone and not (task in LONG_TASKS or (answers and tuning.long == "truncate"))
        ),
        "pictures have no tokens to count in --batch-tokens": tuning.batch_tokens is not None and pictures,
        "pictures have no tokens to count in --max-length": tuning.max_length is not None and pictures,
        "--pack is for texts whose words are learned": tuning.pack and task not in WORDS,
        "--pack fills rows, so --batch-tokens has no use": tuning.pack and tuning.batch_tokens is not None,
        "--curriculum reads each row once, --balanced does not": tuning.curriculum != "none" and tuning.balanced,
        "all pictures have one length": tuning.curriculum == "length" and pictures,
        "a text that is compared with others has no loss of its own": tuning.curriculum == "loss" and compared,
        "--also does not go with comparing texts": bool(tuning.also) and compared,
        "--every-token is for words with tags": tuning.every_token and alone and task != "token-classification",
        "--whole-words is for hidden words": tuning.whole_words and alone and task != "fill-mask",
        "--symmetric is for vectors of texts": tuning.symmetric and task != "feature-extraction",
        "--triplet-loss is for vectors of texts": tuning.triplet_loss and task != "feature-extraction",
        "--temperature is for texts that are compared": tuning.temperature != Tuning().temperature and not compared,
    }
    for reason, holds in refused.items():
        if holds:
            raise InputError(reason, found=f"--task {task}", fix="leave out one of them")


def check_classes(data: Labelled, problem: str | None, tuning: Tuning) -> None:
    """Raise InputError for labels of which nothing can be learned, and for --balanced where a row has not one label."""
    if problem == "multi_label_classification" and not data.labels:
        raise InputError("no example has a label", where=data.where, fix="check --label-column, or add labels")
    if problem == "single_label_classification" and len(data.labels) >= len(data) > MANY_ROWS:
        raise InputError("almost every example has a label of its own", where=data.where,
                         found=f"{len(data.labels):,} labels, such as {data.labels[0][:60]!r}",
                         fix="check --label-column")  # fmt: skip
    if problem == "single_label_classification" and len(data.labels) < 2:
        raise InputError("all examples have the same label", where=data.where, found=", ".join(data.labels),
                         expected="two labels or more",
                         fix="check --label-column, or add examples of another label")  # fmt: skip
    if tuning.balanced and problem != "single_label_classification" and data.task != "feature-extraction":
        found = problem.replace("_", " ") if problem else data.task
        raise InputError("--balanced is for rows with one label each", found=found, fix="leave it out")


def row_length(facts: Facts, tuning: Tuning) -> int:
    """Return how many tokens a packed row has: --max-length, else at most 512."""
    return tuning.max_length or min(facts.max_length, PACKED_ROW)


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


def make_comparison(
    task: str, problem: str | None, tuning: Tuning, rows: Sequence[Row], prepared: Task | None
) -> GroupLoss:
    """Return the loss over the vectors of texts; raise InputError for an option that it has no use for."""
    for name in ("label_smoothing", "class_weights", "balanced"):
        if getattr(tuning, name):
            raise InputError(f"--{name.replace('_', '-')} does not go with comparing texts", fix="leave it out")
    settings = {"parts": tuning.accumulation, "temperature": tuning.temperature}
    if task == "feature-extraction":
        assert isinstance(prepared, FeatureExtraction)
        options = {"symmetric": tuning.symmetric, "triplet": tuning.triplet_loss}
        return make_group_objective(rows, pooled(prepared), **settings, **options)  # type: ignore[arg-type]
    if task != "text-classification" or problem != "single_label_classification":
        raise InputError("--contrastive is for texts with one label each", found=task, fix="leave it out")
    return make_group_objective(rows, read_by_head, **settings)  # type: ignore[arg-type]


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
