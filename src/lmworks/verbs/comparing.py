"""`lmworks compare`: runs, models and n-gram models side by side, and whether their differences are more than chance.

Language models score the same texts: bits per byte compare them whatever their tokens are. An n-gram model reads lines,
and pays for each line's end; a network pays for the end of each document. Others answer the same labelled examples.
Every model is compared with the first one; p-values are raised for the number of comparisons (Holm). Several texts:
the first is the domain that models were made for, a difference on the others is what they are worth elsewhere; the
first model before and another after fine-tuning show what was forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmworks.base.errors import InputError
from lmworks.base.report import Cell, Report, Table, counted
from lmworks.evaluation.metrics import score
from lmworks.evaluation.parts import parts_of
from lmworks.evaluation.significance import Float64, bootstrap_all, holm, mcnemar, paired_difference
from lmworks.evaluation.texts import NATS, STATISTICS, TOKENS, TextScores, lines_of, score_lines, score_texts
from lmworks.verbs.comparing_runs import NGRAM, Subject, read_subjects, run_tables
from lmworks.verbs.evaluating import read_texts

WRITERS = (NGRAM, "text-generation")
SHOWN = ("bits_per_byte", "perplexity", "perplexity_per_word", "next_token_accuracy", "entropy")
Values = dict[str, Any]


def compare(
    sources: Sequence[str | Path], data: Sequence[str | Path] = (), *, column: str | None = None,
    label_column: str | None = None, header: bool = True, split: str | None = None, reach: float | None = None,
    seed: int = 0,
) -> Report:  # fmt: skip
    """Put folders side by side, on one or several files of `data`: texts for language models, labelled data for others.

    `reach` is the held-out loss to which convergence is timed; by default the one that all runs reach. Raises
    InputError for folders that cannot be compared.
    """
    subjects = read_subjects(sources)
    tables, charts, values = run_tables(list(subjects.values()), reach)
    notes: list[str] = []
    if data:
        kinds = {name: "texts" if one.task in WRITERS else one.task for name, one in subjects.items()}
        if len(set(kinds.values())) > 1:
            raise InputError("these models were made for different things", fix="compare them without --data",
                             found=", ".join(f"{name}: {kind}" for name, kind in kinds.items()))  # fmt: skip
        if "fill-mask" in kinds.values():
            raise InputError("a model that fills gaps is scored by itself: its windows depend on its tokens",
                             fix="lmworks evaluate MODEL TEXT, or compare without --data")  # fmt: skip
        if set(kinds.values()) == {"texts"}:
            found = {str(file): on_texts(subjects, file, column, seed) for file in data}
        else:
            columns = {"text_column": column, "label_column": label_column, "header": header, "split": split}
            found = {str(file): on_labels(subjects, file, columns, seed) for file in data}
        values["data"] = found
        for file, scored in found.items():
            tables += score_tables(file, scored)
            notes += scored.pop("notes")
        if len(found) > 1:
            tables += across(list(subjects), found, values)
    short = shorten(list(subjects))
    tables = [
        Table(t.title, t.columns, tuple(tuple(short.get(str(c), c) for c in row) for row in t.rows)) for t in tables
    ]
    charts = [replace(c, series=tuple((short[name], points) for name, points in c.series)) for c in charts]
    title = f"{len(subjects)} models" + (f" on {', '.join(map(str, data))}" if data else "")
    return Report(title, values, tables=tuple(tables), charts=tuple(charts), notes=tuple(dict.fromkeys(notes)))


def shorten(names: Sequence[str]) -> dict[str, str]:
    """Return the last part of each path, where all of them differ in it."""
    ends = [Path(name).name for name in names]
    return dict(zip(names, ends if len(set(ends)) == len(ends) else names, strict=True))


def on_texts(subjects: Mapping[str, Subject], file: str | Path, column: str | None, seed: int) -> Values:
    """Score language models on the same texts."""
    scored: dict[str, TextScores] = {}
    rows: Values = {}
    for name, one in subjects.items():
        start = time.perf_counter()
        scored[name] = score_subject(one, file, column)
        rows[name] = {
            **scored[name].values(), "seconds_to_score": round(time.perf_counter() - start, 2),
            "intervals": scored[name].intervals(seed=seed),
        }  # fmt: skip
    names = list(scored)
    unit, first = scored[names[0]].units
    pairs: Values = {}
    notes: list[str] = []
    impossible = [name for name, one in scored.items() if not np.isfinite(one.sums[:, NATS]).all()]
    notes += [f"{name} cannot be compared: it gives something of {file} no chance at all." for name in impossible]
    for name in names[1:]:
        if {name, names[0]} & set(impossible):
            continue
        measure = comparable(scored[names[0]], scored[name])
        if measure is None:
            notes.append(f"{name} and {names[0]} cannot be compared: one of them loses something of {file}, "
                         "and their tokens differ.")  # fmt: skip
            continue
        found = paired_difference(first, scored[name].units[1], STATISTICS[measure], seed=seed)
        pairs[name] = {measure: {**asdict(found)}}
    correct(pairs)
    return {"models": rows, "against": names[0], "differences": pairs, "units": [len(first), unit], "notes": notes}


def score_subject(one: Subject, file: str | Path, column: str | None) -> TextScores:
    """Score one model on the texts of a file or folder."""
    if one.task == NGRAM:
        return score_ngram(one.path, file, column)
    from lmworks.runtime.predictor import load

    if (one.path / "adapter_config.json").is_file() and not (one.path / "config.json").is_file():
        from lmworks.training.finetune import open_adapted

        predictor = open_adapted(one.path, "text-generation")
    else:
        predictor = load(one.path, "text-generation")
    return score_texts(predictor.runtime, predictor.tokenizer, read_texts(file, column))


def score_ngram(path: Path, file: str | Path, column: str | None) -> TextScores:
    """Score an n-gram model, a document at a time: every line and its end; of words the blanks must be single ones."""
    from lmworks.verbs.ngram_folder import load, split

    opened = load(path)
    tokens = "\n".join(sorted(opened.names)) if opened.tokenizer is None else opened.tokenizer.backend.to_str()
    scores = TextScores(tokens=tokens)
    for text in read_texts(file, column):
        lines = lines_of(text)
        coded = [line.encode("utf-8", "replace") for line in lines]
        stream = opened.encode(coded)
        logprobs, _ = opened.model.score(stream)
        sizes = opened.sizes(coded, stream)
        nats = np.add.reduceat(-logprobs, np.cumsum(sizes) - sizes)
        if opened.tokenizer is not None:
            scores.is_whole = scores.is_whole and all(map(opened.tokenizer.knows, lines))
        elif scores.is_whole:
            known = not (stream == opened.unknown).any()
            scores.is_whole = known and all(b" ".join(split(line)) == line for line in coded)
        score_lines(text, nats, sizes, scores)
    return scores


def comparable(a: TextScores, b: TextScores) -> str | None:
    """Return what two models can be compared by: bits per byte, or per token where they have the same ones."""
    if a.is_whole and b.is_whole:
        return "bits_per_byte"
    alike = a.tokens == b.tokens and np.array_equal(a.sums[:, TOKENS], b.sums[:, TOKENS])
    return "bits_per_token" if alike else None


def on_labels(subjects: Mapping[str, Subject], file: str | Path, columns: Mapping[str, Any], seed: int) -> Values:
    """Let models answer the same labelled examples."""
    from lmworks.verbs.finetuning import say

    parts: dict[str, Float64] = {}
    rows: Values = {}
    scores: Mapping[str, Any] = {}
    truth: Sequence[Any] = ()
    how: dict[str, Any] = {"task": None, "long": None, "runtime": "auto", "dtype": "auto", "code": ()}
    for name, one in subjects.items():
        start = time.perf_counter()
        task, said, examples, labels = say(one.path, file, **how, **columns)
        if parts and list(truth) != list(examples.references):
            raise InputError("the models read different labels from the same data", where=str(file))
        truth = examples.references
        metrics = score(task, said, truth, labels=labels)
        rows[name] = {**metrics, "examples": len(truth), "seconds_to_score": round(time.perf_counter() - start, 2)}
        rows[name]["said"] = said
    words = {label for row in rows.values() for label in row["said"] if isinstance(label, str)}  # one table for all
    for name, row in rows.items():
        parts[name], scores = parts_of(task, row.pop("said"), truth, also=sorted(words))
        row["intervals"] = {key: list(span) for key, span in bootstrap_all(parts[name], scores, seed=seed).items()}
    names = list(rows)
    pairs: Values = {}
    for name in names[1:]:
        pairs[name] = {key: asdict(paired_difference(parts[names[0]], parts[name], measure, seed=seed))
                       for key, measure in scores.items()}  # fmt: skip
        if "accuracy" in scores and "classification" in task and not task.startswith("token"):
            a, b = parts[names[0]][:, 0] > 0, parts[name][:, 0] > 0
            only = int((a & ~b).sum()), int((b & ~a).sum())
            pairs[name]["accuracy"] |= {"only_the_first_right": only[0], "only_this_right": only[1],
                                        "p_mcnemar": mcnemar(*only)}  # fmt: skip
    correct(pairs)
    return {"models": rows, "against": names[0], "differences": pairs, "units": [len(truth), "examples"], "notes": []}


def correct(pairs: Values) -> None:
    """Add the p-value to go by: McNemar's, or that of swaps; raised for the number of models (Holm)."""
    for key in {key for row in pairs.values() for key in row}:
        cells = [row[key] for row in pairs.values() if key in row]
        for cell, p in zip(cells, holm([c.get("p_mcnemar", c["p_randomization"]) for c in cells]), strict=True):
            cell["p"] = p


def score_tables(file: str, scored: Values) -> list[Table]:
    """Return the scores of all models on one file with their intervals, and their differences from the first."""
    rows, (count, unit) = scored["models"], scored["units"]
    first = next(iter(rows.values()))
    known = (*SHOWN, "accuracy", "f1", "micro_f1", "precision", "recall", "exact_match", "mse", "spearman")
    keys = [key for key in known if any(row.get(key) is not None for row in rows.values())]
    main = next((key for key in keys if any(key in row["intervals"] for row in rows.values())), keys[0])
    cells: list[tuple[Cell, ...]] = [
        (name, row[main], interval(row["intervals"].get(main)), *(row.get(key) for key in keys if key != main))
        for name, row in rows.items()
    ]
    names = [key.replace("_", " ") for key in keys if key != main]
    title = f"On {file}: {counted(count, unit.removesuffix('s'))}, {first['seconds_to_score']:.3g} s for the first"
    tables = [Table(title, ("model", main.replace("_", " "), "95 %", *names), tuple(cells))]
    cells = [
        (name, key.replace("_", " "), found["value"], interval((found["low"], found["high"])), found["p"],
         verdict(found["p"]))
        for name, row in scored["differences"].items() for key, found in row.items()
    ]  # fmt: skip
    if cells:
        head = ("model", "score", "difference", "95 %", "p", "")
        tables.append(Table(f"Against {scored['against']}", head, tuple(cells)))
    return tables


def interval(span: Sequence[float] | None) -> str | None:
    """Write both ends of an interval."""
    return None if span is None else " to ".join(f"{end:.4g}" for end in span)


def verdict(p: float) -> str:
    """Say what a p-value says."""
    return "differs" if p < 0.05 else "could be chance"


def across(names: Sequence[str], found: Values, values: Values) -> list[Table]:
    """Return what each model is worth on each file: against the first file, and against the first model."""
    files = list(found)
    key = "bits_per_byte" if "bits_per_byte" in found[files[0]]["models"][names[0]] else "accuracy"
    others = [found[file]["differences"].get(name, {}) for file in files for name in names[1:]]
    if others and all("bits_per_token" in one for one in others):
        key = "bits_per_token"  # something is lost, but all have the same tokens
    if any(key not in found[file]["models"][name] for file in files for name in names):
        return []
    rows, kept = [], {}
    for name in names:
        scores = [found[file]["models"][name][key] for file in files]
        gaps = [less(score, scores[0]) for score in scores[1:]]
        changes = [less(score, found[file]["models"][names[0]][key]) for file, score in zip(files, scores, strict=True)]
        rows.append((name, *scores, *gaps, *changes[1:]))
        kept[name] = {"domain_gap": dict(zip(files[1:], gaps, strict=True)),
                      "against_the_first_model": dict(zip(files, changes, strict=True))}  # fmt: skip
    values["across"] = {"score": key, "in_domain": files[0], "models": kept}
    short = [Path(file).name for file in files]
    head = ("model", *short, *(f"{file} − {short[0]}" for file in short[1:]),
            *(f"{file}: change from {names[0]}" for file in short[1:]))  # fmt: skip
    return [Table(f"In and out of domain: {key.replace('_', ' ')}", head, tuple(rows))]


def less(a: float | None, b: float | None) -> float | None:
    """Return a − b where both are known."""
    return None if a is None or b is None else a - b
