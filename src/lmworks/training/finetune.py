"""Fine-tuning: a published body, the head of a task, and the one training loop.

    full    every parameter is trained
    head    the head alone; the body is read once more in every epoch but never changed
    lora    small matrices beside the frozen ones, and the head (Hu et al. 2022)

A head that the checkpoint has for the same labels is kept; otherwise one is drawn. The weights with the best validation
score are those that remain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from lmworks.base.errors import InputError, LmworksError, did_you_mean
from lmworks.models.checkpoint import draw_head, load_model, make_empty, published
from lmworks.models.families import TASKS, read_config, read_kind
from lmworks.models.heads import Model
from lmworks.runtime.predictor import Predictor, read_facts
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.tasks.base import Facts, Long, Task
from lmworks.tasks.registry import make_task
from lmworks.text.labelled import Labelled
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.adapter_files import open_adapter
from lmworks.training.examples import Examples, Masking, Row, balance
from lmworks.training.lora import add_lora
from lmworks.training.measure import MAIN, measure
from lmworks.training.objectives import BinaryLoss, CausalLoss, ClassLoss, Objective, SpanLoss, SquaredLoss
from lmworks.training.peft_format import CONFIG as ADAPTER_CONFIG
from lmworks.training.rows import (
    make_class_rows,
    make_language_rows,
    make_masked_rows,
    make_span_rows,
    make_tag_rows,
)
from lmworks.training.trainer import TrainConfig, Trainer, TrainResult
from lmworks.training.tuning import LEARNING_RATES, Tuning

CLASSES = ("text-classification", "image-classification")
LABELLED = (*CLASSES, "token-classification")
WORDS = ("fill-mask", "text-generation")  # tasks whose labels are the text itself
MANY_TOKENS = 2**40  # more than any validation: all of it is scored


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A model that was fine-tuned, what answers with it, and how it went."""

    model: Model
    predictor: Predictor
    result: TrainResult
    new_head: bool


@dataclass(frozen=True)
class Setup:
    """Everything that a run needs before its first step."""

    model: Model
    new_head: bool
    tokenizer: Tokenizer | None
    predictor: Predictor
    data: Examples
    objective: Objective
    problem: str | None


def set_up(folder: Path, train: Labelled, held_out: Labelled, *, task: str, tuning: Tuning) -> Setup:
    """Read the model, give it its head and its trainable parameters, and encode the data."""
    problem = problem_type(train)
    model, new_head = open_model(folder, task, train.labels, problem, seed=tuning.seed)
    choose_parameters(model, tuning)
    tokenizer = None if model.config.vision else read_tokenizer(folder, model)
    if tokenizer is not None and model.spec.pool == "last" and model.config.pad_token_id is None:
        pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        model.config = replace(model.config, pad_token_id=pad)  # transformers finds the last token by it
    facts = read_facts(model.config, tokenizer)
    if tuning.max_length is not None:
        check_length(tuning.max_length, facts)
        facts = replace(facts, max_length=tuning.max_length)
    options = {"long": tuning.long} if task in ("text-classification", "token-classification") else {}
    predictor = make_predictor(model, folder, task, tokenizer, facts, **options)
    rows = make_rows(train, task, predictor.prepared, tokenizer, facts, model.config.labels, problem, tuning)
    held_rows = make_rows(held_out, task, predictor.prepared, tokenizer, facts, model.config.labels, problem, tuning)
    classes = single_classes(train, task, rows)
    masking = None
    if task == "fill-mask":
        assert tokenizer is not None
        masking = make_masking(tokenizer, whole_words=tuning.whole_words)
    data = Examples(
        rows,
        held_rows,
        epochs=tuning.epochs,
        batch_size=tuning.batch_size,
        batch_tokens=tuning.batch_tokens,
        pad_id=0 if tokenizer is None else tokenizer.pad_id or 0,
        seed=tuning.seed,
        sampling=balance(classes) if tuning.balanced else None,
        masking=masking,
        task=predictor.prepared,
    )
    weights = class_weights(classes, len(model.config.labels)) if tuning.class_weights else None
    return Setup(model, new_head, tokenizer, predictor, data, make_objective(task, problem, tuning, weights), problem)


def tune(
    setup: Setup, held_out: Labelled, folder: Path, *, task: str, tuning: Tuning, stream: TextIO | None = None
) -> Tuned:
    """Train (or resume) in `folder`; the model ends with the weights that scored best on the held-out examples."""
    criterion = "loss" if setup.problem == "regression" else MAIN.get(task, "loss")
    trainer = Trainer(
        setup.model,
        objective=setup.objective,
        data=setup.data,
        config=train_config(setup.data.steps, tuning, criterion),
        folder=folder,
        stream=stream,
        measure=None if task in WORDS else partial(measure, setup.predictor, held_out, problem=setup.problem),
    )
    try:
        result = trainer.fit()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise LmworksError(
            "out of memory", where=str(folder), found=str(error).splitlines()[0] if str(error) else "",
            fix=f"double --accumulation ({tuning.accumulation}), which changes nothing else, halve --batch-size "
            f"({tuning.batch_size}), or choose a smaller --max-length",
        ) from None  # fmt: skip
    return Tuned(model=setup.model, predictor=setup.predictor, result=result, new_head=setup.new_head)


def train_config(steps: int, tuning: Tuning, criterion: str) -> TrainConfig:
    """Translate the knobs for the training loop: a validation, and a checkpoint, at the end of each epoch."""
    return TrainConfig(
        steps=steps,
        lr=tuning.lr or LEARNING_RATES[tuning.method],
        warmup=round(tuning.warmup * steps),
        weight_decay=tuning.weight_decay,
        beta2=0.999,
        accumulation=tuning.accumulation,
        eval_every=math.ceil(steps / tuning.epochs),
        eval_tokens=MANY_TOKENS,
        patience=tuning.patience,
        criterion=criterion,
        dtype=tuning.dtype,
        compile="never",  # batches differ in length: each would be compiled anew
        seed=tuning.seed,
    )


def problem_type(data: Labelled) -> str | None:
    """Return what kind of labels texts or pictures have, in config.json's words; None for other tasks."""
    if data.task not in CLASSES:
        return None
    first = data.references[0]
    if isinstance(first, float):
        return "regression"
    return "single_label_classification" if isinstance(first, str) else "multi_label_classification"


def open_model(folder: Path, task: str, labels: Sequence[str], problem: str | None, *, seed: int) -> tuple[Model, bool]:
    """Read a checkpoint with the head of a task; say whether that head, or a part of it, is new.

    Its own head is kept where it knows all the labels. Of another task's head nothing is kept but what both share
    (BERT's pooler).
    """
    config, kind = read_config(folder), TASKS[task]
    if task in WORDS:
        if task == "text-generation" and not config.causal:
            raise InputError(
                "this model sees what follows a word, so it cannot learn to go on with a text",
                where=str(folder),
                found=f"{config.model_type}, which reads both ways",
                expected="a decoder, such as gpt2 or llama",
                fix="--task fill-mask trains it on text",
            )
        own = read_kind(config) == kind
        return load_model(folder, kind, new_head=not own, seed=seed), not own
    names = tuple(labels) if labels else ("LABEL_0",) if problem == "regression" else config.labels
    usual = "regression" if len(config.labels) == 1 else "single_label_classification"  # where config.json says nothing
    same = problem in (None, config.problem_type or usual) and set(names) <= set(config.labels)
    if read_kind(config) == kind and same:
        model = load_model(folder, kind)
        model.config = replace(model.config, problem_type=problem)
        return model, False
    body = load_model(folder, "Model")
    model = make_empty(replace(config, labels=names, problem_type=problem), kind)
    model.transformer = body.transformer
    named = {published(body.spec, name): parameter for name, parameter in body.head.named_parameters()}
    for name, _ in list(model.head.named_parameters()):
        module, _, leaf = name.rpartition(".")
        found = named.get(published(model.spec, name))
        if found is not None:
            setattr(model.head.get_submodule(module), leaf, found)
    draw_head(model, seed, torch.float32)
    return model.eval(), True


def choose_parameters(model: Model, tuning: Tuning) -> None:
    """Freeze what the method, or a pattern, leaves as it is; raise InputError where nothing remains to be trained."""
    if tuning.method == "lora":
        add_lora(model, rank=tuning.rank, seed=tuning.seed)
    elif tuning.method == "head":
        model.transformer.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    for pattern in tuning.freeze:
        found = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not found:
            near = did_you_mean(pattern, [*names, *(name.rpartition(".")[0] for name in names)])
            raise InputError(
                f"no parameter is called {pattern}", expected=", ".join(names[:6]) + " …", fix=near.strip()
            )
        for name in found:
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "nothing is left to be trained", fix="freeze less, or choose --method full: this head is the embedding"
        )


def read_tokenizer(folder: Path, model: Model) -> Tokenizer:
    """Read the model's tokenizer; raise FormatError where it has tokens that the embedding lacks."""
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.check_fits(model.config.vocab_size, where=str(folder))
    return tokenizer


def check_length(length: int, facts: Facts) -> None:
    """Raise InputError for a --max-length that the model does not have."""
    if not 4 <= length <= facts.max_length:
        raise InputError("--max-length is out of range", found=str(length), expected=f"4 to {facts.max_length}")


def make_predictor(
    model: Model, folder: Path, task: str, tokenizer: Tokenizer | None, facts: Facts, **options: object
) -> Predictor:
    """Return what answers with this very module while it is trained."""
    if task == "text-generation":
        return Predictor(TorchRuntime(model), tokenizer)
    make = partial(make_task, task, folder, tokenizer, facts)
    return Predictor(TorchRuntime(model), tokenizer, task=task, make=make, options=options)


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


def open_predictor(folder: Path, task: str, *, long: Long = "error", max_length: int | None = None) -> Predictor:
    """Open a model folder, or a PEFT adapter and its base, to answer as it did while it was trained."""
    config = read_config(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        model = open_adapter(folder).model.eval()
        model.config = replace(model.config, problem_type=config.problem_type)
    else:
        model = load_model(folder, TASKS[task])
    tokenizer = None if config.vision else read_tokenizer(folder, model)
    facts = read_facts(model.config, tokenizer)
    if max_length is not None:
        facts = replace(facts, max_length=min(max_length, facts.max_length))
    options = {"long": long} if task in ("text-classification", "token-classification") else {}
    return make_predictor(model, folder, task, tokenizer, facts, **options)
