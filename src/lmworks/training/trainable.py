"""The model of a fine-tuning run: a published body with the head of a task, and which parameters are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from lmworks.base.errors import InputError, did_you_mean
from lmworks.models.checkpoint import draw_head, load_model, make_empty, published
from lmworks.models.families import TASKS, read_config, read_kind
from lmworks.models.heads import Model
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.lora import add_lora
from lmworks.training.supervision import WORDS
from lmworks.training.tuning import Tuning


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
