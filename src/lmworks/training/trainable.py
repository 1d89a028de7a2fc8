"""The model of a fine-tuning run: a published body with the head of a task, and which parameters are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from lmworks.base.errors import InputError, did_you_mean
from lmworks.models.checkpoint import draw_head, load_model, make_empty, published
from lmworks.models.custom import How, change, is_own, load_code
from lmworks.models.families import TASKS, read_config, read_kind
from lmworks.models.heads import Model
from lmworks.models.layers import ACTIVATIONS
from lmworks.models.resize import add_rows
from lmworks.tokens.extend import FIT, Extended, extend, plain_texts
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.bottleneck import add_bottleneck
from lmworks.training.int8 import quantize_base
from lmworks.training.lora import add_lora
from lmworks.training.measure import number_labels
from lmworks.training.prefix import add_prefix
from lmworks.training.supervision import WORDS
from lmworks.training.targets import ALL_LINEAR
from lmworks.training.tuning import BaseDtype, Tuning


def open_model(
    folder: Path, task: str, labels: Sequence[str], problem: str | None, *, seed: int, code: Sequence[str] = ()
) -> tuple[Model, bool]:
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
        return load_model(folder, kind, new_head=not own, seed=seed, code=code), not own
    if task == "feature-extraction":
        return load_model(folder, kind, code=code), False
    names = tuple(labels) if labels else ("LABEL_0",) if problem == "regression" else config.labels
    usual = "regression" if len(config.labels) == 1 else "single_label_classification"  # where config.json says nothing
    known = number_labels(config.labels, labels)
    same = problem in (None, config.problem_type or usual) and set(names) <= set(known)
    if read_kind(config) == kind and same:
        model = load_model(folder, kind, code=code)
        model.config = replace(model.config, labels=known, problem_type=problem)
        return model, False
    body = load_model(folder, "Model", code=code)
    model = make_empty(replace(config, labels=names, problem_type=problem), kind)
    model.transformer, model.parts = body.transformer, body.parts
    named = {published(body.spec, name): parameter for name, parameter in body.head.named_parameters()}
    for name, _ in list(model.head.named_parameters()):
        module, _, leaf = name.rpartition(".")
        found = named.get(published(model.spec, name))
        if found is not None:
            setattr(model.head.get_submodule(module), leaf, found)
    draw_head(model, seed, torch.float32)
    return model.eval(), True


def put_parts(model: Model, tuning: Tuning) -> None:
    """Put the user's own layers in, as --insert and --swap say."""
    asked: list[tuple[str, How]] = [(one, "after") for one in tuning.insert]
    asked += [(one, "replace") for one in tuning.swap]
    if asked and tuning.method != "full":
        raise InputError("layers of your own go with --method full only", found=f"--method {tuning.method}",
                         fix="--method full --train-only parts head trains nothing else")  # fmt: skip
    for one, how in asked:
        place, _, name = one.partition("=")
        if not name:
            raise InputError("a layer needs a place and its code", found=one, expected="PLACE=FILE.py:Name")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(tuning.seed)
            change(model, place, name if name in ACTIVATIONS else load_code(name), how=how)


def choose_parameters(model: Model, tuning: Tuning, tokens: Sequence[int] = ()) -> None:
    """Freeze what the method, or a pattern, leaves as it is; raise InputError where nothing remains to be trained.

    `tokens` are those that are new to the model.
    """
    if tuning.method == "lora":
        shrink(model, tuning.base_dtype)
        names = [name.strip() for name in tuning.targets.split(",") if name.strip()]
        add_lora(
            model, rank=tuning.rank, alpha=tuning.alpha, dropout=tuning.lora_dropout,
            targets=ALL_LINEAR if names == [ALL_LINEAR] else names or None, rslora=tuning.rslora, dora=tuning.dora,
            tokens=tokens, seed=tuning.seed,
        )  # fmt: skip
    elif tuning.method == "adapter":
        add_bottleneck(model, size=tuning.bottleneck, seed=tuning.seed)
    elif tuning.method == "prefix":
        add_prefix(model, length=tuning.prefix_length, seed=tuning.seed)
    elif tuning.method == "head":
        model.transformer.requires_grad_(False)
    if model.kind == "Model":
        model.head.requires_grad_(False)  # no vector of a text comes from it
    if tuning.contrastive and model.head.project is not None:
        model.head.project.requires_grad_(False)  # fitted when the body is trained
    if tuning.train_only:
        kept = {name for pattern in tuning.train_only for name in find_parameters(model, pattern)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in kept)
    for pattern in tuning.freeze:
        for name in find_parameters(model, pattern):
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "nothing is left to be trained",
            fix="freeze less, or choose --method full: this model's head, if it has one, is its embedding",
        )


def shrink(model: Model, dtype: BaseDtype) -> None:
    """Hold a model that stays frozen in fewer bits, in place: do it before adapters are added."""
    if dtype == "int8":
        quantize_base(model)
    elif dtype == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)


def find_parameters(model: Model, pattern: str) -> list[str]:
    """Return the parameters of a name, the beginning of names, or a pattern; "parts": those of the user's layers."""
    names = [name for name, _ in model.named_parameters()]
    if pattern == "parts":
        return [name for name in names if is_own(model, name)]
    found = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
    if not found:
        near = did_you_mean(pattern, [*names, *(name.rpartition(".")[0] for name in names)])
        raise InputError(f"no parameter is called {pattern}", expected=", ".join(names[:6]) + " …", fix=near.strip())
    return found


def learn_tokens(
    model: Model, folder: Path, examples: Sequence[object], tuning: Tuning
) -> tuple[Tokenizer | None, Extended | None]:
    """Return the tokenizer with the tokens that --add-tokens asks for, and give the model rows for them, in place.

    None and None for a model of pictures; no Extended where nothing is added.
    """
    if model.config.vision:
        if tuning.add_tokens:
            raise InputError("a model of pictures has no tokens", fix="leave --add-tokens out")
        return None, None
    if not tuning.add_tokens:
        return read_tokenizer(folder, model), None
    rows = model.config.vocab_size
    if tuning.add_tokens == FIT:
        tokenizer = Tokenizer.from_pretrained(folder)
        new = {token: list[int]() for token in range(rows, tokenizer.vocab_size)}
        if not new:
            raise InputError("the model has a row for every token already", where=str(folder),
                             found=f"{tokenizer.vocab_size} tokens, {rows} rows",
                             fix="leave --add-tokens out")  # fmt: skip
        extended = Extended(tokenizer, new, 0.0, 0.0)
    else:
        extended = extend(read_tokenizer(folder, model), tuning.add_tokens, plain_texts(examples))
    size, random = extended.tokenizer.vocab_size, tuning.init == "random"
    add_rows(model, size, extended.pieces, random=random, seed=tuning.seed)
    return extended.tokenizer, extended


def read_tokenizer(folder: Path, model: Model) -> Tokenizer:
    """Read the model's tokenizer; raise FormatError where it has tokens that the embedding lacks."""
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.check_fits(model.config.vocab_size, where=str(folder))
    return tokenizer
