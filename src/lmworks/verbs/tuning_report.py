"""What a fine-tuning run says before it starts and when it is done: cost, scores beside baselines, curves, advice."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmworks.base.chart import Chart
from lmworks.base.report import Cell, Report, Table, counted
from lmworks.base.threads import thread_count
from lmworks.evaluation.metrics import class_scores, entity_scores, score
from lmworks.text.labelled import Labelled
from lmworks.verbs.estimate import BYTES_AN_ACTIVATION, FIXED_MEMORY
from lmworks.verbs.few_shot import spread, spread_tables
from lmworks.verbs.finetune_data import fingerprint
from lmworks.verbs.summary import versions

if TYPE_CHECKING:
    from lmworks.training.finetune import Setup, Tuned
    from lmworks.training.train_config import TrainResult
    from lmworks.training.tuning import Tuning

MEASURED, PARTS = 3, 4  # batches that are timed, and of each one part of so many
OVERHEAD = 1.15  # of validation, saving and the optimizer
TOKEN_TASKS = ("token-classification",)
SHOWN_CLASSES = 100  # of a table for people; report.json has all


def make_report(
    tuned: Tuned, setup: Setup, data: Labelled, held_out: Labelled, baselines: Mapping[str, dict[str, float]],
    tuning: Tuning, *, task: str, name: str, out: Path,
) -> Report:  # fmt: skip
    """Return the report of a run that is done."""
    from math import exp

    from lmworks.training.forgetting import forgetting_table
    from lmworks.training.lora import trainable_parameters
    from lmworks.training.measure import answer

    result, labels = tuned.result, setup.model.config.labels if data.labels else ()
    rows: list[dict[str, Any]] = []
    if data.references[0] is None:
        metrics = {} if result.best_loss is None else {"perplexity": exp(result.best_loss)}
    else:
        said = answer(setup.predictor, held_out, problem=setup.problem)
        metrics = score(held_out.task, said, held_out.references, labels=labels)
        rows = class_rows(held_out.task, said, held_out.references, labels)
    trainable, total = trainable_parameters(setup.model)
    values: dict[str, Any] = {
        "out": str(out), "model": name, "task": task, "method": tuning.method, "new_head": tuned.new_head,
        "labels": list(labels), "parameters": total, "trainable": trainable,
        "train_examples": len(data), "validation_examples": len(held_out), "left_out": setup.left_out,
        **metrics, "metrics": metrics, "baselines": {key: dict(value) for key, value in baselines.items()},
        "classes": rows, "validation_loss": result.best_loss, "steps": result.steps, "best_step": result.best_step,
        "stopped_early": result.stopped_early, "gap": loss_gap(result), "overfitting": overfits(result),
        "history": result.history.measured,
        "train_seconds": round(result.seconds, 1), "dtype": result.dtype, "settings": asdict(tuning),
        "draws": list(tuned.draws), "spread": spread(tuned.draws) if tuned.draws else {},
        "added_tokens": added_facts(setup), "before": tuned.before, "after": tuned.after,
        "domains": {who: {"before": first, "after": last} for who, (first, last) in tuned.domains.items()},
    }  # fmt: skip
    scored = {"this model": metrics, **baselines}
    facts: tuple[tuple[Cell, ...], ...] = (
        ("base", name),
        ("method", tuning.method + (", new head" if tuned.new_head else ", the checkpoint's own head")),
        ("parameters", f"{total:,}, {trainable / total:.1%} of them trained"),
        ("data", f"{counted(len(data), 'example')}, {len(held_out):,} held out"),
        ("training", f"{counted(result.steps, 'step')} in {result.seconds:.0f} s, best at step {result.best_step:,}"),
        *((("gap of the last losses, held out - training", values["gap"]),) if values["gap"] is not None else ()),
        ("precision while training", result.dtype),
        *((name.replace("_", " "), value) for name, value in added_facts(setup).items()),
        *((("the frozen base while training", tuning.base_dtype),) if tuning.base_dtype != "fp32" else ()),
    )
    return Report(
        f"{Path(name).name} fine-tuned for {task}",
        values,
        tables=(
            metric_table("On the held-out examples", scored),
            *spread_tables(tuned.draws, tuned.baseline_draws),
            *class_table(rows),
            *domain_table(tuned.domains),
            *forgetting_table(tuned.before, tuned.after),
            Table("The run", ("what", "value"), facts),
            receipt_table(fingerprint(data, held_out), tuning),
        ),
        charts=(loss_chart(tuned),),
        notes=(
            *dict.fromkeys((*data.notes, *held_out.notes)),
            *make_notes(tuned, metrics, baselines, values["overfitting"], setup.left_out),
        ),
    )  # fmt: skip


def make_notes(
    tuned: Tuned, metrics: Mapping[str, float], baselines: Mapping[str, dict[str, float]], overfitting: bool,
    left_out: int = 0,
) -> list[str]:  # fmt: skip
    """Say in sentences whether it was worth it, and whether training went too far."""
    from lmworks.training.measure import MAIN

    notes, result = [], tuned.result
    main = next((name for name in dict.fromkeys((*MAIN.values(), "spearman", "mrr")) if name in metrics), None)
    for name, scores in baselines.items():
        if main in scores and main is not None:
            better = "better than" if metrics[main] > scores[main] else "NOT better than"
            notes.append(f"{main} {metrics[main]:.4f} is {better} {name} ({scores[main]:.4f}).")
    if left_out:
        notes.append(f"{counted(left_out, 'training example')} had nothing to learn: empty, or the answer was cut off.")
    if overfitting:
        notes.append(
            "Overfitting: the validation loss rose while the training loss went on falling. The weights of step "
            f"{result.best_step:,}, which scored best, were kept. Fewer epochs, a lower lr, a higher weight decay or "
            "more data would help."
        )
    elif result.best_step == result.steps:
        notes.append("The last weights were the best: more epochs may bring more.")
    return notes


def receipt_table(data_sha256: str, tuning: Tuning) -> Table:
    """Return what it takes to make the run again; lmworks.json, the receipt, has all of it and a hash of each file."""
    plain = type(tuning)()
    changed = {name: value for name, value in asdict(tuning).items() if value != getattr(plain, name)}
    rows: list[tuple[Cell, ...]] = [("data SHA-256", data_sha256), ("seed", tuning.seed)]
    rows += [("settings", ", ".join(f"{name} {value}" for name, value in changed.items() if name != "seed"))]
    rows += [(name, str(version)) for name, version in versions().items()]
    return Table("The receipt (lmworks.json)", ("what", "value"), tuple(rows))


def loss_gap(result: TrainResult) -> float | None:
    """Return the last validation loss less the last training loss; None where one of them is missing."""
    train, validation = result.history.train, result.history.validation
    return validation[-1][1] - train[-1][1] if train and validation else None


def overfits(result: TrainResult) -> bool:
    """Tell whether the validation loss ended above its lowest point while the training loss went on falling."""
    validation = result.history.validation
    if len(validation) < 2:
        return False
    lowest, loss = min(validation, key=lambda point: point[1])
    early = [value for step, value in result.history.train if step <= lowest]
    late = [value for step, value in result.history.train if step > lowest]
    rose = validation[-1][1] > loss * 1.01
    return bool(rose and early and late and np.mean(late) < np.mean(early))


def added_facts(setup: Setup) -> dict[str, float]:
    """Return how many tokens were added, and how many tokens a word takes without and with them; {} without any."""
    added = setup.extended
    if added is None:
        return {}
    fertility = {"tokens_a_word_before": added.before, "tokens_a_word_after": added.after} if added.before else {}
    return {"tokens_added": len(added.pieces), **fertility}


def metric_table(title: str, scored: Mapping[str, Mapping[str, float]]) -> Table:
    """Return one row a model and one column a metric."""
    names = list(dict.fromkeys(name for metrics in scored.values() for name in metrics))
    rows = tuple((who, *(metrics.get(name) for name in names)) for who, metrics in scored.items())
    return Table(title, ("model", *names), rows)


def class_rows(
    task: str, said: Sequence[Any], references: Sequence[Any], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return precision, recall, f1 and support of each class, or kind of entity; none for numbers and answers."""
    if task in TOKEN_TASKS:
        return entity_scores(said, references).table()
    if not labels or isinstance(references[0], float):
        return []
    return class_scores(said, references, labels=labels).table()


def class_table(rows: Sequence[dict[str, Any]]) -> tuple[Table, ...]:
    """Return the classes as a table, the worst first, of very many the worst ones; nothing where there are none."""
    if not rows:
        return ()
    ordered = sorted(rows, key=lambda row: row["f1"])[:SHOWN_CLASSES]
    title = "By class" if len(rows) == len(ordered) else f"By class, the worst {len(ordered)} of {len(rows):,}"
    return (Table(title, tuple(rows[0]), tuple(tuple(row.values()) for row in ordered)),)


def domain_table(domains: Mapping[str, tuple[float, float]]) -> tuple[Table, ...]:
    """Return what was learned and forgotten: the held-out loss on each domain before and after; nothing for one."""
    if not domains:
        return ()
    rows = tuple((name, before, after, after - before) for name, (before, after) in domains.items())
    return (Table("Held-out loss by domain", ("domain", "before", "after", "change"), rows),)


def loss_chart(tuned: Tuned) -> Chart:
    """Return training and validation loss over steps."""
    history = tuned.result.history
    series = (
        ("training", tuple((float(step), loss) for step, loss in history.train)),
        ("validation", tuple((float(step), loss) for step, loss in history.validation)),
    )
    return Chart("Loss while training", "step", "loss", series)


def estimate(setup: Setup, tuning: Tuning, task: str, *, notes: Sequence[str] = ()) -> Report:
    """Return parameters, memory, time and disk of a run; a few batches are timed, nothing is written.

    `notes` are sentences about the data.
    """
    from lmworks.training.lora import trainable_parameters
    from lmworks.training.state import forecast_bytes
    from lmworks.training.train_config import count_moments

    config, data = setup.model.config, setup.data
    trainable, total = trainable_parameters(setup.model)
    seconds, tokens = time_batches(setup, recompute=tuning.gradient_checkpointing)
    seconds *= data.steps * OVERHEAD
    widest = max((data.places(rows) for rows in data.plan), default=0)
    states = 2 if tuning.method == "head" else config.num_hidden_layers  # what is kept for the backward pass
    states = min(states, 2) if tuning.gradient_checkpointing else states
    moments = count_moments(tuning.optimizer, tuning.momentum)
    memory = {
        "program": FIXED_MEMORY,
        "weights": sum(tensor.nbytes for tensor in (*setup.model.parameters(), *setup.model.buffers())),
        "gradients": 4 * trainable,
        "optimizer": 4 * moments * trainable,
        "activations": widest // tuning.accumulation * states * config.hidden_size * BYTES_AN_ACTIVATION,
    }
    disk = forecast_bytes(setup.model, moments=moments)
    values = {
        "task": task, "method": tuning.method, "parameters": total, "trainable": trainable,
        "trainable_share": trainable / total, "train_rows": len(data.rows), "validation_rows": len(data.held_out),
        "steps": data.steps, "memory": memory,
        "memory_bytes": sum(memory.values()), "disk_bytes": disk, "train_seconds": round(seconds),
        "tokens_per_second": round(tokens), "threads": thread_count(), "labels": list(config.labels),
        "settings": asdict(tuning),
    }  # fmt: skip
    threads = counted(thread_count(), "thread")
    rows: tuple[tuple[Cell, ...], ...] = (
        ("parameters", f"{total:,}, {trainable / total:.2%} of them trained: {trainable:,}"),
        ("data", f"{counted(len(data.rows), 'row')} to train on, {len(data.held_out):,} held out"),
        ("memory", f"about {sum(memory.values()) / 1e9:.1f} GB"),
        *((f"  {name}", f"{size / 1e6:,.0f} MB") for name, size in memory.items()),
        ("disk", f"at most {disk / 1e6:,.0f} MB while it runs"),
        ("speed", f"about {tokens:,.0f} {'pictures' if config.vision else 'tokens'}/s"),
        ("time", f"about {max(1, round(seconds / 60))} min: {counted(data.steps, 'step')} on {threads}"),
    )
    table = Table("Estimate", ("what", "value"), rows)
    return Report("What this run would cost", values, tables=(table,), notes=tuple(dict.fromkeys(notes)))


def time_batches(setup: Setup, *, recompute: bool = False) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass of a batch, and tokens (pictures) a second.

    A part of each of a few batches is timed.
    """
    import torch

    from lmworks.training.data import split
    from lmworks.training.machine import recompute_blocks, to_device

    data, spent, seen = setup.data, 0.0, 0
    device = next(setup.model.parameters()).device
    setup.model.train()
    for number in range(MEASURED + 1):
        whole = data.batch(number * data.steps // (MEASURED + 1))
        batch = next(split(whole, PARTS))
        rows, of = (len(next(iter(part.values()))) for part in (batch, whole))
        tensors = to_device(batch, device)
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]), recompute_blocks(setup.model, recompute):
            setup.objective(setup.model, tensors).backward()  # type: ignore[no-untyped-call]
        if number:  # the first warms up
            spent += (time.perf_counter() - began) * of / rows
            seen += whole["input_ids"].size if "input_ids" in whole else of
    setup.model.zero_grad(set_to_none=True)
    setup.model.eval()
    return spent / MEASURED, seen / spent
