"""Fine-tuning: a published body, the head of a task, and the one training loop.

    full    every parameter is trained
    head    the head alone; the body is read once more in every epoch but never changed
    lora    small matrices beside the frozen ones, and the head (Hu et al. 2022)

A head that the checkpoint has for the same labels is kept; otherwise one is drawn. The weights with the best validation
score are those that remain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

from lmworks.base.errors import InputError, LmworksError
from lmworks.models.checkpoint import load_model
from lmworks.models.families import TASKS, read_config
from lmworks.models.heads import Model
from lmworks.runtime.predictor import Predictor, read_facts
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.tasks.base import Facts, Long
from lmworks.tasks.registry import make_task
from lmworks.text.labelled import Labelled
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.adapter_files import open_adapter
from lmworks.training.examples import Examples, balance
from lmworks.training.measure import MAIN, measure
from lmworks.training.objectives import Objective
from lmworks.training.peft_format import CONFIG as ADAPTER_CONFIG
from lmworks.training.supervision import (
    WORDS,
    class_weights,
    make_masking,
    make_objective,
    make_rows,
    problem_type,
    single_classes,
)
from lmworks.training.train_config import TrainConfig, TrainResult
from lmworks.training.trainable import choose_parameters, open_model, read_tokenizer
from lmworks.training.trainer import Trainer
from lmworks.training.tuning import LEARNING_RATES, Tuning

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
