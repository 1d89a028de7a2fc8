"""What a search found: every trial, its curves, which knobs mattered, and why the chosen one was chosen."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmworks.base.chart import Chart
from lmworks.base.files import write_text
from lmworks.base.report import Cell, Report, Table, counted
from lmworks.training.tuning import RANGES
from lmworks.verbs.search_space import Knob
from lmworks.verbs.search_study import Variant, by_variant, is_repeated, mean_score, scores

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from lmworks.verbs.search_study import SharedStudy

STATES = {"COMPLETE": "done", "PRUNED": "stopped", "FAIL": "failed"}
EDGE = 0.05  # of the range: nearer to an end than this, the best may lie beyond it
MOST_LINES = 8  # that a chart can tell apart
LONGEST_NAME = 9  # letters that a line's name may have before its score
MOST_POINTS = 40  # of a line
ENOUGH = 8  # finished trials from which on importance is worth a word


def make_report(
    study: SharedStudy, knobs: Sequence[Knob], folder: Path, *, criterion: str, held_out: int, out: str
) -> Report:
    """Return the report of a search that is done; `folder` holds the trials with their curves."""
    trials, best = study.trials(), study.best()
    assert best is not None
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    stopped = [trial for trial in trials if trial.state.name == "PRUNED"]
    failed = [trial for trial in trials if trial.state.name == "FAIL"]
    groups = by_variant(done)
    noise, source = find_noise(groups, best, criterion, held_out)
    importance = find_importance(study, [knob.name for knob in knobs])
    steps = sum(trial.user_attrs["steps"] for trial in done + stopped)
    planned = sum(trial.user_attrs["planned"] for trial in done + stopped)
    notes = make_notes(study, knobs, groups, best, criterion, noise, source)
    if stopped:
        notes.append(f"Halving stopped {len(stopped)} of {len(trials)} trials early: {steps:,} steps instead of "
                     f"{planned:,}, {1 - steps / planned:.0%} less.")  # fmt: skip
    if failed:
        notes.append(f"{len(failed)} of {len(trials)} trials failed and count among them; the first, trial "
                     f"{failed[0].number}: {failed[0].user_attrs['failed']}.")  # fmt: skip
    if importance:
        ranked = ", ".join(f"{name} {share:.0%}" for name, share in importance.items())
        notes.append(f"Importance of the knobs, by PED-ANOVA (Watanabe et al. 2023): {ranked}.")
    values: dict[str, Any] = {
        "out": out, "id": study.id, "criterion": criterion, "search": study.how, "seed": study.seed,
        "space": [str(knob) for knob in knobs], "best": trial_row(best), "noise": noise,
        "completed": len(done), "stopped_early": len(stopped), "failed": len(failed),
        "steps": steps, "planned_steps": planned, "importance": importance,
        "trials": [trial_row(trial) for trial in trials], "variants": variant_rows(groups, study.maximize),
        "choice": notes,
    }  # fmt: skip
    return Report(
        f"{counted(len(trials), 'trial')}: {criterion} {best.value:.4f} with {describe(best.params)}",
        values,
        tables=(*variant_table(values["variants"], criterion), trial_table(study, trials, criterion)),
        charts=(
            history_chart(study, done, criterion),
            *knob_charts(knobs, done, criterion),
            *curve_charts(study, groups, folder, criterion),
        ),
        notes=tuple(notes),
    )


def describe(params: dict[str, Any]) -> str:
    """Return settings in words: lr 3e-05, batch_size 16."""
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in params.items())  # fmt: skip


def trial_row(trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial as one flat row."""
    facts = {name: trial.user_attrs.get(name) for name in ("steps", "best_step", "seconds")}
    told = trial.user_attrs.get("failed") or trial.user_attrs.get("stopped") or ""
    return {"trial": trial.number, "state": STATES[trial.state.name],
            "score": trial.value, **trial.params,
            "validation_loss": trial.user_attrs.get("loss"), **facts, "why": told}  # fmt: skip


def find_noise(
    groups: dict[Variant, list[FrozenTrial]], best: FrozenTrial, criterion: str, held_out: int
) -> tuple[float | None, str]:
    """Return how far scores of equals lie apart, and how that is known: over the seeds, or from the number of examples.

    The seeds' spread is the pooled standard deviation, or the best variant's own if that is larger (one that learned
    nothing has none); an accuracy p of n examples has a standard error √(p(1−p)/n),
    with p as if one more were right and one more wrong.
    """
    repeated = [scores(trials) for trials in groups.values() if is_repeated(trials)]
    squares = sum(float(((np.array(row) - np.mean(row)) ** 2).sum()) for row in repeated)
    if squares:
        mine = [scores(trials) for trials in groups.values() if best in trials and is_repeated(trials)]
        own = max((float(np.std(row, ddof=1)) for row in mine), default=0.0)
        pooled = math.sqrt(squares / sum(len(row) - 1 for row in repeated))
        return max(own, pooled), "the standard deviation over the seeds"
    if criterion == "accuracy" and best.value is not None:
        share = (best.value * held_out + 1) / (held_out + 2)
        said = f"the standard error of {counted(held_out, 'held-out example')}"
        return math.sqrt(share * (1 - share) / held_out), said
    return None, ""


def make_notes(
    study: SharedStudy, knobs: Sequence[Knob], groups: dict[Variant, list[FrozenTrial]], best: FrozenTrial,
    criterion: str, noise: float | None, source: str,
) -> list[str]:  # fmt: skip
    """Say in sentences which trial was chosen, by what margin, what would be cheaper, and where to look next."""
    done, sign = [trial for trials in groups.values() for trial in trials], 1 if study.maximize else -1
    assert best.value is not None
    notes = [f"Trial {best.number} is the best: {criterion} {best.value:.4f} with {describe(best.params)}."]
    means = {key: mean_score(trials) for key, trials in groups.items()}
    chosen = next(key for key, trials in groups.items() if best in trials)
    others = {key: mean for key, mean in means.items() if key != chosen}
    if others:
        runner = max(others, key=lambda key: sign * others[key])
        margin = sign * (means[chosen] - others[runner])
        text = f"The runner-up, {describe(dict(runner))}, is {abs(margin):.4f} {'behind' if margin >= 0 else 'ahead'}"
        text += f" on the mean of {len(groups[chosen])} seeds" if is_repeated(groups[chosen]) else ""
        if noise is None:
            text += "; repeat both with other seeds to know whether that is chance."
        elif margin <= noise:
            text += f": no more than chance, which is {noise:.4f} ({source}). The two are as good as each other."
        else:
            text += f", {margin / noise:.1f} times what chance does ({noise:.4f}, {source})."
            text += "" if margin > 2 * noise else " That may still be chance."
        notes.append(text)
    if noise is not None:
        equals = [trial for key, trials in groups.items() for trial in trials
                  if sign * (means[chosen] - means[key]) <= noise and key != chosen] or [best]  # fmt: skip
        cheap = min(equals, key=lambda trial: trial.user_attrs.get("seconds", math.inf))
        spent, least = (trial.user_attrs.get("seconds", math.nan) for trial in (best, cheap))
        if cheap is not best and least < 0.75 * spent:
            notes.append(
                f"The cheapest that is as good within {noise:.4f} is trial {cheap.number}: {criterion} "
                f"{cheap.value:.4f} in {least:.1f} s instead of {spent:.1f} s, with {describe(cheap.params)}."
            )
    for knob in knobs:
        value = best.params.get(knob.name)
        if knob.choices or not isinstance(value, int | float):
            continue
        place = knob.place(value)
        limits = RANGES.get(knob.name, (-math.inf, math.inf))
        if min(place, 1 - place) <= EDGE and (knob.low if place < 0.5 else knob.high) not in limits:
            end = "lower" if place < 0.5 else "upper"
            notes.append(f"The best {knob.name}, {value:g}, lies at the {end} end of {knob}: search beyond it.")
    if len(done) > 1:
        notes.append(
            "The score is the best of many on the same held-out examples, so a new test will be a little lower."
        )
    return notes


def find_importance(study: SharedStudy, names: Sequence[str]) -> dict[str, float]:
    """Return each knob's share of what decides whether a trial is among the best tenth, the largest first."""
    import optuna

    if len(study.finished()) < ENOUGH or len(names) < 2:
        return {}
    with study.held(), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = optuna.importance.get_param_importances(study.study, params=list(names))
        except UserWarning:  # too many are equally good: it cannot tell
            return {}
    return {name: round(float(share), 4) for name, share in found.items()}


def variant_rows(groups: dict[Variant, list[FrozenTrial]], maximize: bool) -> list[dict[str, Any]]:
    """Return mean and spread of each variant that was repeated, the best first; nothing where none was."""
    if not any(map(is_repeated, groups.values())):
        return []
    rows = []
    for key, trials in groups.items():
        found = np.array(scores(trials))
        spread = float(found.std(ddof=1)) if len(found) > 1 else 0.0
        rows.append({**dict(key), "seeds": len(found), "mean": float(found.mean()), "sd": spread,
                     "min": float(found.min()), "max": float(found.max())})  # fmt: skip
    return sorted(rows, key=lambda row: -row["mean"] if maximize else row["mean"])


def variant_table(rows: Sequence[dict[str, Any]], criterion: str) -> tuple[Table, ...]:
    """Return the variants as a table; nothing where none was repeated."""
    if not rows:
        return ()
    return (
        Table(f"{criterion} of each variant over its seeds", tuple(rows[0]), tuple(tuple(r.values()) for r in rows)),
    )


def trial_table(study: SharedStudy, trials: Sequence[FrozenTrial], criterion: str) -> Table:
    """Return all trials, the best first."""
    order = sorted(trials, key=study.order)
    rows = [trial_row(trial) for trial in order]
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if any(row.get(name) not in (None, "") for row in rows)]
    cells: tuple[tuple[Cell, ...], ...] = tuple(tuple(cell(row.get(name)) for name in names) for row in rows)
    return Table("Trials, the best first", tuple(criterion if name == "score" else name for name in names), cells)


def cell(value: Any) -> Cell:
    """Return a value as a table shows it."""
    return str(value) if isinstance(value, bool) else value


def history_chart(study: SharedStudy, done: Sequence[FrozenTrial], criterion: str) -> Chart:
    """Return the score of each trial and the best so far."""
    points = [(float(trial.number), float(trial.value or 0.0)) for trial in sorted(done, key=lambda t: t.number)]
    choose = max if study.maximize else min
    best = [(x, choose(y for _, y in points[: i + 1])) for i, (x, _) in enumerate(points)]
    return Chart("The search", "trial", criterion, (("best so far", tuple(best)), ("this trial", tuple(points))))


def knob_charts(knobs: Sequence[Knob], done: Sequence[FrozenTrial], criterion: str) -> tuple[Chart, ...]:
    """Return each numeric knob against the score, one dot a trial; log knobs by their power of ten."""
    charts = []
    for knob in knobs:
        values = [(trial.params.get(knob.name), trial.value) for trial in done]
        pairs = [(x, y) for x, y in values if isinstance(x, int | float) and not isinstance(x, bool) and y is not None]
        if len({x for x, _ in pairs}) < 2:
            continue
        log = knob.log or (knob.name.endswith("lr") and min(x for x, _ in pairs) > 0)
        points = tuple((math.log10(x) if log else float(x), y) for x, y in sorted(pairs))
        label = f"log10 of {knob.name}" if log else knob.name
        charts.append(Chart(f"{knob.name} against {criterion}", label, criterion, (("a trial", points),), dots=True))
    return tuple(charts)


def curve_charts(
    study: SharedStudy, groups: dict[Variant, list[FrozenTrial]], folder: Path, criterion: str
) -> tuple[Chart, ...]:
    """Return the curves of the best variants over each other, each the mean of its seeds, with their scores."""
    sign = -1 if study.maximize else 1
    order = sorted(groups, key=lambda key: (sign * mean_score(groups[key]), min(map(study.order, groups[key]))))
    chosen = order[:MOST_LINES]
    runs = [[read_curve(folder / str(trial.number)) for trial in groups[key]] for key in chosen]
    lines = list(zip(name_lines(groups, chosen), runs, strict=True))
    repeated = any(map(is_repeated, groups.values()))
    ending = f" of the {len(lines)} best variants" if len(order) > len(lines) else " of each variant"
    ending += ", the mean of its seeds" if repeated else ""
    charts = []
    names = {"loss": "training loss", "val_loss": "validation loss"}
    for name, title in {**names, **({} if criterion == "loss" else {criterion: criterion})}.items():
        series = [(label, smooth([points(rows, name) for rows in runs])) for label, runs in lines]
        if any(len(line) > 1 for _, line in series):
            charts.append(Chart(title[0].upper() + title[1:] + ending, "step", title, tuple(series)))
    return tuple(charts)


def name_lines(groups: dict[Variant, list[FrozenTrial]], keys: Sequence[Variant]) -> list[str]:
    """Return the lines' names with their scores: what was varied if that is short enough, else the trials."""
    names = ["/".join(f"{x:.2g}" if isinstance(x, float) else str(x) for _, x in key) for key in keys]
    if max(map(len, names)) > LONGEST_NAME:
        names = [f"trial {groups[key][0].number}" for key in keys]
    return [f"{name} {mean_score(groups[key]):.3f}" for name, key in zip(names, keys, strict=True)]


def points(rows: Sequence[dict[str, Any]], name: str) -> dict[int, float]:
    """Return what a curve has under a name at each step."""
    return {row["step"]: row[name] for row in rows if row.get(name) is not None}


def smooth(curves: Sequence[dict[int, float]]) -> tuple[tuple[float, float], ...]:
    """Return the mean of the curves where all have points; of many steps, the mean of neighbours."""
    steps = sorted(set.intersection(*map(set, curves)))
    width = math.ceil(len(steps) / MOST_POINTS) or 1
    parts = [steps[i : i + width] for i in range(0, len(steps), width)]
    return tuple(
        (float(part[-1]), float(np.mean([curve[step] for curve in curves for step in part]))) for part in parts
    )


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl with one row a step: what training and validation say of it together."""
    path = folder / "metrics.jsonl"
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update(row)
    return list(rows.values())


def write_trials(study: SharedStudy, folder: Path) -> None:
    """Write trials.csv: one row a trial."""
    write_text(folder / "trials.csv", to_csv([trial_row(trial) for trial in study.trials()]))


def write_curves(study: SharedStudy, folder: Path, trials: Path) -> None:
    """Write curves.csv: one row a variant, seed and step, validations beside the training, for any plotting tool."""
    rows = []
    for trial in study.trials():
        varied = {name: value for name, value in trial.params.items() if name != "seed"}
        for row in read_curve(trials / str(trial.number)):
            key = {"trial": trial.number, "variant": describe(varied), "seed": study.seed}
            rows.append({**key, **trial.params, **row})
    write_text(folder / "curves.csv", to_csv(rows))


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as csv with all of their columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
