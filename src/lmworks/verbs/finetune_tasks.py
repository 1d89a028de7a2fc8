"""Fine-tune one body for several tasks at once, each with a head of its own: `lmworks finetune --also-task`.

OUT/text-classification/    an ordinary model folder, with its own report and receipt
OUT/token-classification/   another, with the same body
OUT/report.html             all tasks beside their baselines
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmworks.base.errors import InputError
from lmworks.base.files import write_json, write_text
from lmworks.base.report import Cell, Report, Table, counted
from lmworks.text.labelled import Labelled
from lmworks.training.mixture import check_weights, read_share
from lmworks.training.tuning import LONG_TASKS, Tuning
from lmworks.verbs.finetune_data import as_json, choose_task, fingerprint, read_other
from lmworks.verbs.finetune_folder import BASELINES, find_baselines, publish, tuning_folder
from lmworks.verbs.run import check_same_run

if TYPE_CHECKING:
    from lmworks.training.finetune import Setup, Tuned

COLUMNS: dict[str, Any] = {"text_column": None, "label_column": None, "header": True}
METHODS = ("full", "head")  # the others leave adapters: each would need a body of its own
ALONE = ("shots", "also", "also_evaluate", "contrastive", "curriculum", "add_tokens", "insert", "swap")
USED_BY = {  # knobs of one task, of which another takes no notice
    "every_token": {"token-classification"},
    "whole_words": {"fill-mask"},
    "long": {*LONG_TASKS, "text-generation"},
}
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Part:
    """One of the tasks: its name, which is that of its folder, its share of the steps, and its data."""

    name: str
    task: str
    weight: float
    data: Labelled
    held_out: Labelled


def read_parts(
    data: Labelled, held_out: Labelled, task: str, train: Path, folder: Path, tuning: Tuning
) -> list[Part]:  # fmt: skip
    """Return the main task and those of --also-task, of whose files a tenth is held out; none without --also-task.

    Raises InputError for what cannot be read, and for knobs that do not go with several tasks.
    """
    if not tuning.also_task:
        return []
    given = [train]
    rows = [(task, 0.0, data, held_out)]
    for text in tuning.also_task:
        file, other, weight = read_task(text)
        rows.append((choose_task(other, folder), weight, *read_other(file, other, tuning.seed, COLUMNS)))
        given.append(file)
    check_weights([weight for _, weight, *_ in rows[1:]], "--also-task")
    check_together([row[0] for row in rows], tuning)
    rows[0] = (task, 1 - sum(weight for _, weight, *_ in rows), data, held_out)
    names = name_tasks([row[0] for row in rows], given)
    return [Part(name, *row) for name, row in zip(names, rows, strict=True)]


def read_task(text: str) -> tuple[Path, str, float]:
    """Read FILE=TASK=WEIGHT: "names.conll=token-classification=0.5"; raise InputError for anything else."""
    name, task, number = ["", *text.rsplit("=", 2)][-3:] if text.count("=") >= 2 else ("", "", "")
    weight = read_share(number)
    if not name or not task or not weight:
        raise InputError(
            "--also-task is not a file, its task and its share",
            found=text,
            expected="FILE=TASK=WEIGHT, such as names.conll=token-classification=0.5",
            fix="the weight, between 0 and 1, is the task's share of the steps",
        )
    return Path(name), task, weight


def check_together(tasks: Sequence[str], tuning: Tuning) -> None:
    """Raise InputError, once, for all that does not go with several tasks."""
    plain, wrong = Tuning(), []
    if tuning.method not in METHODS:
        wrong.append(f"--method {tuning.method}")
    wrong += [f"--{name.replace('_', '-')}" for name in ALONE if getattr(tuning, name) != getattr(plain, name)]
    for name, used in USED_BY.items():
        if getattr(tuning, name) != getattr(plain, name) and not used & set(tasks):
            wrong.append(f"--{name.replace('_', '-')}")
    wrong += ["--task feature-extraction"] if "feature-extraction" in tasks else []
    if wrong:
        raise InputError(
            "--also-task trains one body under several heads",
            found=", ".join(wrong),
            expected="--method full or head, and tasks with labels or words of their own",
            fix="leave these out, or train one task after the other",
        )


def name_tasks(tasks: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Name each task's folder after it, with its file where two are alike."""
    names = [
        task if tasks.count(task) == 1 else f"{task}-{file.name.partition('.')[0]}"
        for task, file in zip(tasks, files, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name}-{i + 1}" for i, name in enumerate(names)]


def finetune_tasks(
    model: str | Path, folder: Path, parts: Sequence[Part], out: Path, *, tuning: Tuning, resume: bool = False,
    overwrite: bool = False, dry_run: bool = False,
) -> Report:  # fmt: skip
    """Fine-tune `folder` for all parts at once; `out` holds a model folder for each. Raises as `finetune` does."""
    from lmworks.training.distributed import find_ranks
    from lmworks.training.multitask import tune_tasks

    ranks, names, held_out = find_ranks(), [part.name for part in parts], [part.held_out for part in parts]
    weights = [part.weight for part in parts[1:]]
    if dry_run:
        return estimate_tasks(set_up_tasks(folder, parts, tuning), parts, tuning)
    with ranks.on_first(tuning_folder(out, resume=resume, overwrite=overwrite)) as run:
        settings = {"model": str(model), "task": parts[0].task, **as_json(asdict(tuning))}
        everything = fingerprint(*(data for part in parts for data in (part.data, part.held_out)))
        ranks.once(lambda: check_same_run(run, settings, everything))
        with ranks.together():
            setups = set_up_tasks(folder, parts, tuning)
        baselines: list[Scores] = [
            ranks.once(
                partial(find_baselines, run / "training" / f"{part.name}-{BASELINES}", setup, part.data, part.held_out)
            )
            for part, setup in zip(parts, setups, strict=True)
        ]
        tuned = tune_tasks(setups, held_out, names, weights, run / "training", tuning=tuning, stream=sys.stderr)

        def publish_all() -> Report:
            reports = []
            for part, setup, one, scores in zip(parts, setups, tuned, baselines, strict=True):
                (run / part.name).mkdir(exist_ok=True)
                made = (one, setup, part.data, part.held_out, scores)
                reports.append(publish(run / part.name, folder, model, *made, tuning, part.task, out / part.name))
            return publish_together(run, model, parts, reports, tuned, tuning, everything, out)

        return ranks.once(publish_all)


def set_up_tasks(folder: Path, parts: Sequence[Part], tuning: Tuning) -> list[Setup]:
    """Set up every task from the same checkpoint; the others are read as often as they come up."""
    from lmworks.training.finetune import set_up

    knobs = [tuning, *(replace(tuning, epochs=1) for _ in parts[1:])]
    return [
        set_up(folder, part.data, part.held_out, task=part.task, tuning=knob)
        for part, knob in zip(parts, knobs, strict=True)
    ]


def publish_together(
    run: Path, model: str | Path, parts: Sequence[Part], reports: Sequence[Report], tuned: Sequence[Tuned],
    tuning: Tuning, data_sha256: str, out: Path,
) -> Report:  # fmt: skip
    """Write the report of all tasks and, last, the receipt of all folders."""
    from lmworks.export.receipt import write_receipt
    from lmworks.verbs.summary import versions
    from lmworks.verbs.tuning_report import loss_chart, metric_table

    first, result = reports[0].values, tuned[0].result
    mean = next(row["mean"] for row in result.history.measured if row["step"] == result.best_step)
    tasks = {
        part.name: {
            "task": part.task, "weight": part.weight, "out": str(out / part.name),
            **{key: report.values[key] for key in ("train_examples", "validation_examples", "metrics", "baselines",
                                                   "validation_loss", "new_head", "labels", "classes")},
        }
        for part, report in zip(parts, reports, strict=True)
    }  # fmt: skip
    values: dict[str, Any] = {
        "out": str(out), "model": str(model), "method": tuning.method, "tasks": tasks, "mean": mean,
        "metrics": {name: task["metrics"] for name, task in tasks.items()},
        "baselines": {name: task["baselines"] for name, task in tasks.items()},
        "validation_loss": {name: task["validation_loss"] for name, task in tasks.items()},
        **{key: first[key] for key in ("steps", "best_step", "stopped_early", "history", "train_seconds", "dtype",
                                       "settings")},
    }  # fmt: skip
    facts: tuple[tuple[Cell, ...], ...] = (
        ("base", str(model)),
        ("method", tuning.method),
        *((part.name, f"{part.weight:.0%} of the steps, {counted(len(part.data), 'example')}") for part in parts),
        ("training", f"{counted(result.steps, 'step')} in {result.seconds:.0f} s, best at step {result.best_step:,}"),
        ("precision while training", result.dtype),
    )
    report = Report(
        f"{Path(model).name} fine-tuned for {len(parts)} tasks",
        values,
        tables=(
            *(
                metric_table(f"{name}, on its held-out examples", {"this model": task["metrics"], **task["baselines"]})
                for name, task in tasks.items()
            ),
            Table("The run", ("what", "value"), facts),
        ),
        charts=(loss_chart(tuned[0]),),
        notes=tuple(
            f"{part.name}: {note}"
            for part, one in zip(parts, reports, strict=True)
            for note in one.notes
            if not note.startswith(SAID_OF_ALL)
        )
        + tuple(note for note in reports[0].notes if note.startswith(SAID_OF_ALL)),
    )
    write_json(run / "report.json", report.to_dict())
    write_text(run / "report.html", report.to_html())
    scores = {key: values[key] for key in ("metrics", "baselines", "validation_loss", "best_step")}
    facts_of_run = {"data_sha256": data_sha256, "seed": tuning.seed, "base": str(model), "settings": asdict(tuning)}
    tasks_of_run = {part.name: part.task for part in parts}
    write_receipt(run, {**facts_of_run, "tasks": tasks_of_run, "scores": scores, "versions": versions()})
    return report


SAID_OF_ALL = ("Overfitting", "The last weights")  # notes on the one run, which each task's report repeats


def estimate_tasks(setups: Sequence[Setup], parts: Sequence[Part], tuning: Tuning) -> Report:
    """Return what the run would cost: the time is that of all tasks, memory and disk those of the largest."""
    from lmworks.training.multitask import join
    from lmworks.verbs.tuning_report import estimate

    join(setups, [part.weight for part in parts[1:]])
    reports = [
        estimate(setup, tuning, part.task, notes=(*part.data.notes, *part.held_out.notes))
        for setup, part in zip(setups, parts, strict=True)
    ]
    every = [report.values for report in reports]
    values = {
        "tasks": {part.name: one for part, one in zip(parts, every, strict=True)},
        "steps": sum(one["steps"] for one in every),
        "train_seconds": sum(one["train_seconds"] for one in every),
        "memory_bytes": max(one["memory_bytes"] for one in every),
        "disk_bytes": max(one["disk_bytes"] for one in every) * 2,
        "settings": asdict(tuning),
    }
    tables = (replace(report.tables[0], title=part.name) for report, part in zip(reports, parts, strict=True))
    notes = (f"{part.name}: {note}" for report, part in zip(reports, parts, strict=True) for note in report.notes)
    return Report("What this run would cost", values, tables=tuple(tables), notes=tuple(notes))
