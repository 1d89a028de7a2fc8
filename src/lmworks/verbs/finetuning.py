"""Fine-tune a published or own model on labelled data with one call, and score one on labelled data.

lmworks finetune MODEL TRAIN --task text-classification -o OUT      OUT is a model folder,
                                                                    or an adapter beside its base
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.files import check_output, read_json
from lmworks.base.hub import find_folder
from lmworks.base.optional import require
from lmworks.base.report import Report, Table, counted
from lmworks.models.config import Config
from lmworks.models.families import read_config, read_kind
from lmworks.runtime.predictor import read_facts
from lmworks.tasks.base import Long
from lmworks.tasks.registry import find_task
from lmworks.text.label_kinds import INTEGER
from lmworks.text.labelled import Labelled, read_labelled
from lmworks.training.tuning import LONG_TASKS, Tuning
from lmworks.verbs.feedback import check_feedback, fed, keep_feedback
from lmworks.verbs.few_shot import draw_shots, tune_draws
from lmworks.verbs.finetune_data import (
    also_files,
    as_json,
    check_header,
    choose_task,
    fingerprint,
    read_data,
    read_domains,
)
from lmworks.verbs.finetune_folder import BASELINES, find_baselines, publish, tuning_folder
from lmworks.verbs.finetune_tasks import finetune_tasks, read_parts
from lmworks.verbs.run import check_same_run

PathLike = str | Path


def finetune(
    model: PathLike,
    train: PathLike | None,
    out: PathLike,
    *,
    from_feedback: str | None = None,
    validation: PathLike | None = None,
    task: str | None = None,
    tuning: Tuning | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    header: bool = True,
    split: str | None = None,
    revision: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    **knobs: Any,
) -> Report:
    """Fine-tune a model on labelled data; `out` is a folder in the Hugging Face layout, or a PEFT adapter.

    `task` None: what the checkpoint was made for. `knobs` are those of `Tuning`: method, epochs, lr, batch_size, rank,
    seed … Without `validation` a tenth of the data is held out, by label. `split` names the part of a nested file or a
    folder to train on, "train,validation" also the one to validate on. `from_feedback` is a database of feedback, of
    which what is accepted is trained on as well, or without `train` alone. Raises InputError for data or settings that
    cannot be used; Interrupted after Ctrl-C, and `resume` continues to the same bits.
    """
    require("torch", extra="torch")
    from lmworks.training.distributed import find_ranks
    from lmworks.training.finetune import set_up, tune

    ranks = find_ranks()
    with ranks.together():
        out, tuning = Path(out), (tuning or Tuning.from_dict(knobs)).check()
        check_output(out, overwrite=overwrite, resume=resume)
        folder = find_folder(model, revision=revision)
        task = choose_task(task, folder)
        columns: dict[str, Any] = {"text_column": text_column, "label_column": label_column, "header": header}
        check_feedback(from_feedback, train, task, alone=ranks.world == 1 and not tuning.also_task)
        with fed(from_feedback, out, folder.resolve().name, resume=resume) as (lines, file):
            main = Path(train if train is not None else str(file))
            more = None if file is None or train is None else read_labelled(file, task)
            data, held_out = read_data(main, validation, task, split, tuning.seed, columns, also_files(tuning), more)
        parts = read_parts(data, held_out, task, main, folder, tuning)
        domains = read_domains(data, task, tuning, columns)
        if tuning.shots is not None and ranks.world > 1:
            raise InputError("--shots trains on a few examples, in one process", fix="start without torchrun")
    if parts:
        how = {"tuning": tuning, "resume": resume, "overwrite": overwrite, "dry_run": dry_run}
        return finetune_tasks(model, folder, parts, out, **how)  # type: ignore[arg-type]
    if dry_run:
        from lmworks.verbs.tuning_report import estimate

        if tuning.shots is not None:
            data = draw_shots(data, tuning.shots, tuning.seed)
        setup = set_up(folder, data, held_out, task=task, tuning=tuning, domains=domains)
        return estimate(setup, tuning, task, notes=(*data.notes, *held_out.notes))
    with ranks.on_first(tuning_folder(out, resume=resume, overwrite=overwrite)) as run:
        settings = {"model": str(model), "task": task, **as_json(asdict(tuning))}
        others = [part for domain in domains for part in (domain.train, domain.held_out)]
        ranks.once(lambda: check_same_run(run, settings, fingerprint(data, held_out, *others)))
        if lines:
            keep_feedback(run, lines)
        if tuning.shots is not None:
            setup, tuned, data, baselines = tune_draws(
                folder, data, held_out, run / "training", task=task, tuning=tuning, stream=sys.stderr,
                baselines_of=lambda setup, shots: find_baselines(None, setup, shots, held_out),
            )  # fmt: skip
        else:
            with ranks.together():
                setup = set_up(folder, data, held_out, task=task, tuning=tuning, domains=domains)
            baselines = ranks.once(partial(find_baselines, run / "training" / BASELINES, setup, data, held_out))
            tuned = tune(setup, held_out, run / "training", task=task, tuning=tuning, stream=sys.stderr)
        made = (tuned, setup, data, held_out, baselines)
        facts = {"from_feedback": lines.count("\n")} if lines else None
        return ranks.once(lambda: publish(run, folder, model, *made, tuning, task, out, more=facts))


def evaluate_task(
    model: PathLike,
    path: PathLike,
    *,
    task: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    header: bool = True,
    split: str | None = None,
    long: Long | None = None,
    runtime: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    code: Sequence[str] = (),
) -> Report:
    """Score a model, or a PEFT adapter, on labelled data: accuracy, f1, precision, recall, exact_match, mse by name.

    `long` None: as the model was fine-tuned, else "error". Raises InputError for labels that the model does not have.
    """
    from lmworks.evaluation.metrics import score
    from lmworks.evaluation.parts import intervals
    from lmworks.verbs.tuning_report import class_rows, class_table, metric_table

    columns: dict[str, Any] = {"text_column": text_column, "label_column": label_column, "header": header}
    folder = find_folder(model, revision=revision)
    task, said, data, labels = say(
        folder, path, task=task, split=split, long=long, runtime=runtime, dtype=dtype, code=code, **columns
    )
    metrics = score(task, said, data.references, labels=labels)
    rows = class_rows(task, said, data.references, labels)
    spans = {name: list(span) for name, span in intervals(task, said, data.references).items()}
    values = {"model": str(model), "task": task, "examples": len(data), **metrics, "metrics": metrics,
              "intervals": spans, "classes": rows}  # fmt: skip
    shown = {"this model": metrics} | {
        f"95 % {end}": {name: span[i] for name, span in spans.items()} for i, end in enumerate(("from", "to")) if spans
    }
    tables = (metric_table(f"On {path}", shown), *class_table(rows))
    return Report(f"{model}: {counted(len(data), 'example')} of {task}", values, tables=tables)


def say(
    folder: Path, path: PathLike, *, task: str | None, split: str | None, long: Long | None, runtime: str, dtype: str,
    code: Sequence[str], **columns: Any,
) -> tuple[str, list[Any], Labelled, Sequence[str]]:  # fmt: skip
    """Let a model answer labelled data; return its task, its answers, the data, and the labels that it has."""
    config = read_config(folder)
    task = task or find_task(read_kind(config))
    check_header(columns["header"], Path(path))
    data = read_labelled(path, task, split=split, **columns)
    if data.references[0] is None:
        raise InputError(
            f"{task} has no labels to compare with", fix="lmworks evaluate MODEL TEXT gives its perplexity"
        )
    from lmworks.training.measure import answer, problem_type

    receipt = read_json(folder / "lmworks.json") if (folder / "lmworks.json").is_file() else {}
    settings = receipt.get("settings", {}) if receipt.get("task") == task else {}
    data = match_labels(data, config)
    problem = problem_type(data)
    check_kind(config, problem, data, folder)
    if long is not None and task not in LONG_TASKS:
        raise InputError(f"--long is not for {task}", expected=", ".join(LONG_TASKS), fix="leave it out")
    cut = long or settings.get("long", "error")
    if (folder / "onnx").is_dir() or runtime == "onnx":
        from lmworks.runtime.predictor import load

        options: dict[str, Any] = {"long": cut} if task in LONG_TASKS else {}
        predictor = load(folder, task, runtime=runtime, dtype=dtype, code=code, **options)
    else:
        require("torch", extra="torch")
        from lmworks.training.finetune import open_predictor

        chosen, room = "fp32" if dtype in ("auto", "any") else dtype, settings.get("max_length")
        predictor = open_predictor(folder, task, long=cut, max_length=room, code=code, dtype=chosen)
    labels: Sequence[str] = config.labels if data.labels else ()
    return task, answer(predictor, data, problem=problem), data, labels


def match_labels(data: Labelled, config: Config) -> Labelled:
    """Return data as a model says it: its own names of labels, numbers where it gives a number. Raises InputError."""
    from lmworks.training.measure import number_labels

    if not data.labels:
        return data
    if len(config.labels) == 1 and all(isinstance(r, str) and INTEGER.fullmatch(r) for r in data.references):
        return replace(data, references=[float(r) for r in data.references], labels=())
    return rename_labels(data, dict(zip(number_labels(config.labels, data.labels), config.labels, strict=True)))


def rename_labels(data: Labelled, names: Mapping[str, str]) -> Labelled:
    """Return data with a model's own names of its labels; raise InputError for a label that it does not have."""
    references: list[Any] = []
    for number, said in enumerate(data.references, 1):
        unknown = next((one for one in ((said,) if isinstance(said, str) else said) if one not in names), None)
        if unknown is not None:
            known = ", ".join(list(names)[:10]) + (f" … ({len(names)})" if len(names) > 10 else "")
            raise InputError(f'the label "{unknown}" is not one of the model\'s labels', expected=known,
                             where=f"{data.where}, example {number}: {str(data.examples[number - 1])[:60]!r}",
                             fix=f"check --label-column;{did_you_mean(unknown, names)}".rstrip(";"))  # fmt: skip
        references.append(names[said] if isinstance(said, str) else tuple(names[one] for one in said))
    return replace(data, references=references, labels=tuple(names[label] for label in data.labels))


def check_kind(config: Config, problem: str | None, data: Labelled, folder: Path) -> None:
    """Raise InputError for numbers where a model has labels, and for several labels at once where it has one."""
    one = config.problem_type in (None, "single_label_classification") and len(config.labels) > 1
    if (problem == "regression" and len(config.labels) > 1) or (problem == "multi_label_classification" and one):
        raise InputError("the data have another kind of label than the model", where=data.where,
                         found=problem.replace("_", " "), expected=f"one of {', '.join(config.labels[:10])} ({folder})",
                         fix="check --label-column")  # fmt: skip


def evaluate_answers(
    folder: Path, data: Labelled, *, code: Sequence[str] = (), runtime: str = "auto", dtype: str = "auto",
    write: int | None = None,
) -> Report:  # fmt: skip
    """Score a language model, or an adapter, on prompts with completions or on conversations: on the answers alone.

    The perplexity is that of an answer's tokens and of the end of the text after it, each given all before it. With
    `write` the model also answers each prompt, greedily in at most so many tokens: BLEU, chrF and exact match.
    """
    require("torch", extra="torch")
    from lmworks.training.data import IGNORED
    from lmworks.training.examples import Examples
    from lmworks.training.finetune import open_predictor
    from lmworks.training.objectives import CausalLoss
    from lmworks.training.rows import make_language_rows
    from lmworks.training.validation import held_out_loss

    if runtime == "onnx":
        raise InputError("torch alone scores answers", found="--runtime onnx", fix="leave it out")
    chosen = "fp32" if dtype in ("auto", "any") else dtype
    predictor = open_predictor(folder, "text-generation", code=code, dtype=chosen)
    network: Any = getattr(predictor.runtime, "model")  # noqa: B009 (torch's runtime has one)
    facts = read_facts(read_config(folder), predictor.tokenizer)
    rows = make_language_rows(predictor.tokenizer, data.examples, facts, long="error")
    batches = Examples(rows, rows, epochs=1, batch_size=16, pad_id=predictor.tokenizer.pad_id or 0)
    loss = held_out_loss(network, CausalLoss(), batches.validation(), dtype="fp32") or 0.0
    scored = sum(label != IGNORED for row in rows for label in row.targets["labels"])
    values: dict[str, Any] = {
        "model": str(folder), "task": "text-generation", "examples": len(data), "perplexity": math.exp(loss),
        "loss": loss, "answer_tokens": scored,
    }  # fmt: skip
    texts: list[tuple[str, str]] = []
    if write is not None:
        from lmworks.evaluation.generated import score_generated

        prompts, true = as_prompts(data)
        said = [predictor.generate(prompt, temperature=0.0, max_tokens=write).text for prompt in prompts]
        values |= score_generated(said, true)
        texts = [(f"After {prompt[-80:]!r}", text) for prompt, text in zip(prompts[:3], said, strict=False)]
    hidden = ("model", "task", "intervals", "signatures")
    shown = tuple((name.replace("_", " "), value) for name, value in values.items() if name not in hidden)
    tables = (Table("Scores", ("what", "value"), shown),)
    return Report(f"{folder}: the answers of {data.where}", values, tables=tables, texts=tuple(texts))


def as_prompts(data: Labelled) -> tuple[list[str], list[str]]:
    """Return prompts and what should come after each; raise InputError for conversations and for plain texts."""
    pairs = [one for one in data.examples if isinstance(one, dict) and "prompt" in one]
    if len(pairs) < len(data.examples):
        raise InputError("--write answers prompts", where=data.where, found="texts or conversations",
                         expected='rows of "prompt" and "completion"')  # fmt: skip
    return [one["prompt"] for one in pairs], [one["completion"] for one in pairs]
