"""Fine-tuning: a published body, the head of a task, and the one training loop.

    full    every parameter is trained
    head    the head alone; the body is read once more in every epoch but never changed
    lora    small matrices beside the frozen ones, and the head (Hu et al. 2022)
    adapter a narrow network after each half of every block, and the head (Houlsby et al. 2019)
    prefix  keys and values before the first token of every layer, and the head (Li and Liang 2021)

A head that the checkpoint has for the same labels is kept; otherwise one is drawn. The weights with the best validation
score are those that remain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from lmworks.base.errors import InputError, LmworksError
from lmworks.models.checkpoint import load_model
from lmworks.models.families import TASKS, read_config, read_kind
from lmworks.models.heads import Model
from lmworks.runtime.predictor import Predictor, read_facts
from lmworks.runtime.predictor import make_predictor as assemble
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.tasks.base import Facts, Long
from lmworks.tasks.registry import find_task, make_task
from lmworks.text.labelled import Labelled
from lmworks.tokens.extend import Extended
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.adapter_files import open_adapter
from lmworks.training.before import find_difficulty, find_losses, losses_by_domain, with_domains
from lmworks.training.callbacks import Callback
from lmworks.training.contrastive import GroupLoss, TextGroups, read_by_head
from lmworks.training.distributed import find_ranks
from lmworks.training.examples import Examples, balance
from lmworks.training.fewshot import fit_head
from lmworks.training.forgetting import Scores, read_texts, score_base, score_texts
from lmworks.training.machine import find_device
from lmworks.training.measure import main_metric, measure, problem_type
from lmworks.training.mixture import Domain, DomainRows
from lmworks.training.objectives import Objective
from lmworks.training.peft_format import CONFIG as ADAPTER_CONFIG
from lmworks.training.supervision import (
    WORDS,
    check_classes,
    check_order,
    class_weights,
    make_comparison,
    make_masking,
    make_objective,
    make_rows,
    row_length,
    single_classes,
)
from lmworks.training.trackers import make_trackers
from lmworks.training.train_config import TrainConfig, TrainResult
from lmworks.training.trainable import choose_parameters, learn_tokens, open_model, put_parts, read_tokenizer
from lmworks.training.trainer import Trainer
from lmworks.training.tuning import LEARNING_RATES, LONG_TASKS, Tuning

MANY_TOKENS = 2**40  # more than any validation: all of it is scored


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A model that was fine-tuned, what answers with it, and how it went."""

    model: Model
    predictor: Predictor
    result: TrainResult
    new_head: bool
    draws: tuple[dict[str, float], ...] = ()  # few-shot: the metrics of each choice of the shots
    baseline_draws: Mapping[str, tuple[dict[str, float], ...]] = field(default_factory=dict)
    domains: dict[str, tuple[float, float]] = field(default_factory=dict)  # held-out loss before and after
    before: Scores = field(default_factory=dict)  # of --also-evaluate
    after: Scores = field(default_factory=dict)


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
    extended: Extended | None = None  # the tokens that were added
    base: Path | None = None
    texts: Mapping[str, list[str]] = field(default_factory=dict)  # of --also-evaluate
    left_out: int = 0  # training examples without anything to learn, such as answers that were cut off


def set_up(
    folder: Path, train: Labelled, held_out: Labelled, *, task: str, tuning: Tuning, domains: Sequence[Domain] = (),
    opened: tuple[Model, bool] | None = None,
) -> Setup:  # fmt: skip
    """Read the model, give it its head and its trainable parameters, and encode the data, of other domains too.

    `opened` is a model that is there already, and whether its head is new; `folder` then has its tokenizer.
    """
    check_order(task, tuning, train.examples)
    texts = read_texts(task, held_out.examples, tuning.also_evaluate)
    problem = problem_type(train)
    check_classes(train, problem, tuning)
    model, new_head = opened or open_model(folder, task, train.labels, problem, seed=tuning.seed, code=tuning.code)
    put_parts(model, tuning)
    tokenizer, extended = learn_tokens(model, folder, train.examples, tuning)
    choose_parameters(model, tuning, () if extended is None else sorted(extended.pieces))
    find_ranks().place(model.to(find_device()))
    if tuning.pack and model.transformer.prefix.rows() is not None:
        raise InputError("--pack does not go with a prefix", fix="choose another --method, or leave --pack out")
    if tokenizer is not None and model.spec.pool == "last" and model.config.pad_token_id is None:
        pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        model.config = replace(model.config, pad_token_id=pad)  # transformers finds the last token by it
    facts = read_facts(model.config, tokenizer, before=model.transformer.prefix.length)
    if tuning.max_length is not None:
        check_length(tuning.max_length, facts)
        facts = replace(facts, max_length=tuning.max_length)
    predictor = make_predictor(model, folder, task, tokenizer, facts, **long_option(task, tuning.long))
    rows = make_rows(train, task, predictor.prepared, tokenizer, facts, model.config.labels, problem, tuning)
    if not rows and len(train):
        raise InputError("no example has anything left to learn", where=train.where,
                         found="answers that were cut off, or empty texts",
                         fix="give shorter prompts, or a model that reads more")  # fmt: skip
    left_out = len(train) - len({row.feature.example for row in rows})
    held_rows = make_rows(held_out, task, predictor.prepared, tokenizer, facts, model.config.labels, problem, tuning)
    others = []
    for domain in domains:
        both = (
            make_rows(part, task, predictor.prepared, tokenizer, facts, model.config.labels, problem, tuning)
            for part in (domain.train, domain.held_out)
        )
        others.append(DomainRows(domain.name, domain.weight, *both))
    classes = single_classes(train, task, rows)
    masking = None
    if task == "fill-mask":
        assert tokenizer is not None
        masking = make_masking(tokenizer, whole_words=tuning.whole_words)
    compared = task == "feature-extraction" or tuning.contrastive
    data = (TextGroups if compared else Examples)(
        rows,
        held_rows,
        epochs=tuning.epochs,
        batch_size=tuning.batch_size,
        batch_tokens=tuning.batch_tokens,
        pad_id=0 if tokenizer is None else tokenizer.pad_id or 0,
        seed=tuning.seed,
        sampling=balance(classes) if tuning.balanced and not compared else None,
        masking=masking,
        task=predictor.prepared,
        packing=row_length(facts, tuning) if tuning.pack else None,
        domains=others,
    )
    weights = class_weights(classes, len(model.config.labels)) if tuning.class_weights and classes else None
    objective: Objective
    if compared:
        objective = make_comparison(task, problem, tuning, rows, predictor.prepared)
    else:
        objective = make_objective(task, problem, tuning, weights)
    return Setup(model, new_head, tokenizer, predictor, data, objective, problem, extended, folder, texts, left_out)


def tune(
    setup: Setup, held_out: Labelled, folder: Path, *, task: str, tuning: Tuning, stream: TextIO | None = None,
    callbacks: Sequence[Callback] = (),
) -> Tuned:  # fmt: skip
    """Train (or resume) in `folder`; the model ends with the weights that scored best on the held-out examples."""
    criterion = "loss" if tuning.contrastive else main_metric(task, held_out, setup.problem)
    if isinstance(setup.objective, GroupLoss):  # which makes its own parts, as its texts are compared with each other
        tuning = replace(tuning, accumulation=1)
    ranks = find_ranks()
    was: Scores = {}
    if setup.base is not None:
        was = ranks.once(partial(score_base, folder, setup.base, setup.texts))
    before = ranks.once(partial(find_losses, folder, setup))
    difficulty = ranks.once(partial(find_difficulty, folder, setup, tuning.curriculum))
    if difficulty is not None:
        setup.data.sort_by(difficulty)
    trainer = Trainer(
        setup.model,
        objective=setup.objective,
        data=setup.data,
        config=train_config(setup.data.steps, tuning, criterion),
        folder=folder,
        stream=stream,
        measure=with_domains(
            setup,
            None
            if task in WORDS or tuning.contrastive
            else partial(measure, setup.predictor, held_out, problem=setup.problem),
        ),
        callbacks=[*make_trackers(tuning.track, folder, asdict(tuning), stream=stream), *callbacks],
        workers=tuning.workers,
    )
    result = fit(trainer, tuning)
    if tuning.contrastive:
        fit_head(setup.model, setup.data.rows, read_by_head, pad_id=setup.data.pad_id)
    domains = {name: (before[name], loss) for name, loss in ranks.once(partial(losses_by_domain, setup)).items()}
    now: Scores = {}
    if setup.tokenizer is not None:
        now = ranks.once(partial(score_texts, setup.model, setup.tokenizer, setup.texts))
    return Tuned(
        model=setup.model, predictor=setup.predictor, result=result, new_head=setup.new_head, domains=domains,
        before=was, after=now,
    )  # fmt: skip


def fit(trainer: Trainer, tuning: Tuning) -> TrainResult:
    """Train to the end; where memory runs out, say what to change."""
    try:
        return trainer.fit()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(not enough|out of|allocate) memory", str(error)):
            raise
        raise LmworksError(
            "out of memory", where=str(trainer.folder), found=str(error).splitlines()[0] if str(error) else "",
            fix=f"double --accumulation ({tuning.accumulation}), which changes nothing else, halve --batch-size "
            f"({tuning.batch_size}), or choose a smaller --max-length",
        ) from None  # fmt: skip


def train_config(steps: int, tuning: Tuning, criterion: str) -> TrainConfig:
    """Translate the knobs for the training loop: a validation, and a checkpoint, at the end of each epoch."""
    return TrainConfig(
        steps=steps,
        lr=tuning.lr or LEARNING_RATES[tuning.method],
        warmup=round(tuning.warmup * steps),
        schedule=tuning.schedule,
        decay=tuning.decay,
        optimizer=tuning.optimizer,
        weight_decay=tuning.weight_decay,
        momentum=tuning.momentum,
        beta2=0.999,
        layer_decay=tuning.layer_decay,
        head_lr=tuning.head_lr,
        max_grad_norm=tuning.max_grad_norm,
        clip_value=tuning.clip_value,
        gradient_checkpointing=tuning.gradient_checkpointing,
        balance=tuning.balance_ranks,
        accumulation=tuning.accumulation,
        eval_every=math.ceil(steps / tuning.epochs),
        eval_tokens=MANY_TOKENS,
        patience=tuning.patience,
        min_delta=tuning.min_delta,
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
    model: Model, folder: Path, task: str, tokenizer: Tokenizer | None, facts: Facts, *, dtype: str = "fp32",
    **options: object,
) -> Predictor:  # fmt: skip
    """Return what answers with this very module while it is trained, or with a copy in another `dtype`."""
    if task == "text-generation":
        return Predictor(TorchRuntime(model, dtype=dtype), tokenizer)
    make = partial(make_task, task, folder, tokenizer, facts)
    return Predictor(TorchRuntime(model, dtype=dtype), tokenizer, task=task, make=make, options=options)


def open_predictor(
    folder: Path, task: str, *, long: Long = "error", max_length: int | None = None, code: Sequence[str] = (),
    dtype: str = "fp32",
) -> Predictor:  # fmt: skip
    """Open a model folder, or a PEFT adapter and its base, to answer as it did while it was trained.

    `code` is that of layers of its maker's own (models/custom.py), which an adapter's base cannot have.
    """
    config, files, home = read_config(folder), folder, folder
    if (folder / ADAPTER_CONFIG).is_file():
        if code:
            raise InputError("an adapter has no layers of its maker's own", where=str(folder), fix="leave --code out")
        opened = open_adapter(folder)
        files, home = opened.tokenizer or folder, opened.home(folder)
        model = opened.model.eval()
        model.config = replace(model.config, problem_type=config.problem_type)
    else:
        model = load_model(folder, TASKS[task], code=code)
    tokenizer = None if config.vision else read_tokenizer(files, model)
    facts = read_facts(model.config, tokenizer, before=model.transformer.prefix.length)
    if max_length is not None:
        facts = replace(facts, max_length=min(max_length, facts.max_length))
    return make_predictor(model, home, task, tokenizer, facts, dtype=dtype, **long_option(task, long))


def open_adapted(folder: Path, task: str | None = None, *, dtype: str = "fp32", **options: Any) -> Predictor:
    """Open an adapter's folder and its base as `load` opens a model: what it answers, and the options of its task."""
    config = read_config(folder)
    task = task or find_task(read_kind(config))
    opened = open_adapter(folder)
    if opened.model.kind != TASKS[task]:
        raise InputError("this adapter was trained for another task", where=str(folder),
                         found=find_task(opened.model.kind), expected=task)  # fmt: skip
    opened.model.config = replace(opened.model.config, problem_type=config.problem_type)
    tokenizer = None if config.vision else read_tokenizer(opened.tokenizer or folder, opened.model)
    runtime = TorchRuntime(opened.model.eval(), dtype=dtype)
    return assemble(runtime, opened.home(folder), opened.model.config, task, tokenizer, options)


def long_option(task: str, long: Long) -> dict[str, Long]:
    """Return what to do with long texts as an option, for the tasks that have it."""
    return {"long": long} if task in LONG_TASKS else {}
