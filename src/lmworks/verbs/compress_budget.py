"""`--budget`: make every candidate, measure it beside the model as it is, and keep the best that meets the demands.

Where none does, nothing is written but a report with every candidate's numbers, OUT.report.html.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lmworks.base.errors import InputError, LmworksError, did_you_mean
from lmworks.base.files import check_output, new_folder, scratch_folder, write_json, write_text
from lmworks.base.report import Report
from lmworks.compress.budget import Clause, read_budget
from lmworks.compress.candidates import (
    Candidate,
    broken,
    charts,
    choose,
    compare_tables,
    frontier,
    quality_of,
    recommend,
)
from lmworks.models.families import read_config, read_kind
from lmworks.tasks.registry import find_task
from lmworks.verbs.compress_knobs import Pruning, Quantizing, say_options
from lmworks.verbs.compress_trial import main_score, measure_candidate
from lmworks.verbs.compressing import Source, apply_pruning, apply_quantizing, keep_settings, open_source
from lmworks.verbs.finetune_data import fingerprint

SCORES = ("accuracy", "f1", "precision", "recall", "macro_f1", "exact_match", "mse", "pearson", "spearman", "mrr",
          "recall_at_1", "perplexity", "cosine", "agreement")  # fmt: skip
TRAINED = ("epochs", "lr", "batch_size", "seed")  # what may be said of candidates with fewer weights
SEEN = 48  # examples that a graph's matrices are rounded for
DIVERGENCE = 0.002  # nats: what int8-mixed may say otherwise than the model as it is
WHERE = {"server": "On a server", "edge": "On a small device", "browser": "In a browser"}
PathLike = str | Path
Make = Callable[[Source, Path, Pruning], None]


def write_floats(dtype: str) -> Make:
    """Return what writes the model as it is, in a dtype."""

    def write(source: Source, folder: Path, how: Pruning) -> None:
        import torch

        from lmworks.models.folder import write_folder

        model = source.open()
        write_folder(model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]), source.folder, folder)

    return write


def write_quantized(**settings: Any) -> Make:
    """Return what writes the model in whole numbers."""

    def write(source: Source, folder: Path, how: Pruning) -> None:
        from lmworks.models.folder import write_folder

        model = source.open()
        apply_quantizing(model, source, Quantizing(**settings))
        write_folder(model, source.folder, folder)

    return write


def write_pruned(**settings: Any) -> Make:
    """Return what writes the model with fewer weights, fine-tuned as often as --epochs says."""

    def write(source: Source, folder: Path, how: Pruning) -> None:
        from lmworks.models.folder import write_folder

        with TemporaryDirectory(prefix="lmworks-") as run:
            small, _ = apply_pruning(source.open(), source, replace(how, **settings), Path(run) / "training")
        write_folder(small.eval(), source.folder, folder)

    return write


def write_graph(dtype: str) -> Make:
    """Return what writes the model as a graph."""

    def write(source: Source, folder: Path, how: Pruning) -> None:
        from lmworks.compress.calibrate import read_batches
        from lmworks.export.onnx_folder import export_graphs
        from lmworks.training.finetune import open_predictor

        assert source.data is not None
        batches = read_batches(open_predictor(source.folder, source.task), source.data, most=SEEN)
        export_graphs(source.folder, folder, to="onnx", dtypes=[dtype], batches=batches, overwrite=True)

    return write


PRUNE: dict[str, Any] = {"structured": False, "heads": 0.0, "energy": None}
NEURONS: dict[str, Any] = {**PRUNE, "structured": True, "importance": "taylor"}
CANDIDATES: dict[str, tuple[str, str, str, Make]] = {  # name -> kind, dtype of its answers, in words, what makes it
    "fp32": ("floats", "fp32", "as it is", write_floats("fp32")),
    "bf16": ("floats", "bf16", "all numbers in bfloat16", write_floats("bf16")),
    "int8": ("whole numbers", "auto", "8 bits, products too", write_quantized(bits=8)),
    "int8-static": ("whole numbers", "auto", "8 bits, inputs by calibration",
                    write_quantized(bits=8, activations="static", percentile=99.99)),
    "int8-mixed": ("whole numbers", "auto", f"int8 but the layers that mind most, divergence at most {DIVERGENCE}",
                   write_quantized(bits=8, tolerance=DIVERGENCE)),
    "int4": ("whole numbers", "auto", "4 bits in groups of 64, for weights alone", write_quantized(bits=4)),
    "onnx-int8": ("graphs", "int8", "an ONNX graph of 8 bits", write_graph("int8")),
    "onnx-q4": ("graphs", "q4", "an ONNX graph of 4 bits", write_graph("q4")),
    "pruned-50": ("fewer weights", "auto", "half of the weights are zero", write_pruned(**PRUNE, sparsity=0.5)),
    "neurons-25": ("fewer weights", "auto", "a quarter of the neurons removed", write_pruned(**NEURONS, sparsity=0.25)),
    "neurons-50": ("fewer weights", "auto", "half of the neurons removed", write_pruned(**NEURONS, sparsity=0.5)),
    "low-rank-80": ("fewer weights", "auto", "factors that keep 80 % of the energy",
                    write_pruned(**{**PRUNE, "energy": 0.8})),
}  # fmt: skip


def compress(
    model: PathLike, out: PathLike, *, budget: str, data: PathLike, validation: PathLike | None = None,
    how: Pruning | None = None, candidates: str = "", also: Sequence[PathLike] = (), revision: str | None = None,
    overwrite: bool = False, **columns: Any,
) -> Report:  # fmt: skip
    """Write the best candidate that keeps the budget to `out`; `values["picked"]` is None where none does.

    Calibration and fine-tuning see `data`, the measurements the held-out part alone. `candidates` names some of
    CANDIDATES, "a,b"; `also` are folders of other models of the same task, such as a distilled one. Raises InputError.
    """
    out = Path(out)
    demands = read_budget(budget, SCORES)
    names = choose_names(candidates)
    check_output(out, overwrite=overwrite)
    how = how or Pruning()
    chosen = [name for name in how.given() if name not in TRAINED]
    if chosen:
        raise InputError("a budget chooses what is taken away itself", found=say_options(chosen),
                         fix="leave it out, or leave out --budget")  # fmt: skip
    source = open_source(model, data, validation, columns, seed=how.seed, revision=revision)
    assert source.held_out is not None
    check_also(also, source.task)
    with scratch_folder(out) as place:
        made = measure_all(source, place, names, also, how, demands)
        base = made[0]
        metric = main_score(dict(base.found))
        picked = choose(made, base, demands, metric)
        report = describe(source, made, picked, demands, metric, budget, out)
        if picked is not None:
            keep(source, picked, report, out)
            return report
    write_text(report_path(out), report.to_html())
    return report


def choose_names(text: str) -> list[str]:
    """Return the candidates that are asked for, fp32 first; raise InputError for one that does not exist."""
    names = [name.strip() for name in text.split(",") if name.strip()] or list(CANDIDATES)
    for name in names:
        if name not in CANDIDATES:
            raise InputError(f"there is no candidate {name!r}", expected=", ".join(CANDIDATES),
                             fix=did_you_mean(name, CANDIDATES).strip())  # fmt: skip
    return ["fp32", *(name for name in dict.fromkeys(names) if name != "fp32")]


def check_also(folders: Sequence[PathLike], task: str) -> None:
    """Raise InputError for a folder that holds no model, or one of another task, before anything is measured."""
    for folder in map(Path, folders):
        found = find_task(read_kind(read_config(folder)))
        if found != task:
            raise InputError("a model of another task cannot be measured beside this one", where=str(folder),
                             found=found, expected=task)  # fmt: skip


def report_path(out: Path) -> Path:
    """Return where the report of a refusal is."""
    return out.with_name(f"{out.name}.report.html")


def measure_all(
    source: Source, place: Path, names: Sequence[str], also: Sequence[PathLike], how: Pruning, demands: Sequence[Clause]
) -> list[Candidate]:
    """Return every candidate with its numbers; one that cannot be made says why."""
    assert source.held_out is not None
    plans = [(name, *CANDIDATES[name]) for name in names]
    base: Candidate | None = None
    known: list[Any] = []
    made = []
    for name, kind, dtype, what, write in plans:
        one = Candidate(name=name, kind=kind, what=what, folder=place / name, dtype=dtype)
        try:
            (place / name).mkdir()
            write(source, place / name, how)
            one, said = measure_candidate(
                one,
                base,
                task=source.task,
                held_out=source.held_out,
                problem=source.problem,
                known=known,
                seed=how.seed,
            )
        except LmworksError as error:
            if base is None:
                raise
            one, said = replace(one, failed=error.what), []
        if base is None:
            base, known = one, said
            check_metrics(demands, one)
        made.append(one)
        tell(one)
    for folder in map(Path, also):
        name = str(folder) if folder.name in {other.name for other in made} else folder.name
        one = Candidate(name=name, kind="fewer weights", what=f"the model in {folder}", folder=folder)
        try:
            one, _ = measure_candidate(
                one, base, task=source.task, held_out=source.held_out, problem=source.problem, known=known,
                seed=how.seed,
            )  # fmt: skip
        except LmworksError as error:
            one = replace(one, failed=error.what)
        made.append(one)
        tell(one)
    return made


def check_metrics(demands: Sequence[Clause], base: Candidate) -> None:
    """Raise InputError for a score that this task does not have."""
    for clause in demands:
        if clause.metric not in base.found:
            scores = [name for name in base.found if name in SCORES]
            raise InputError(f"this task has no {clause.metric}", found=str(clause), expected=", ".join(scores),
                             fix=did_you_mean(clause.metric, scores).strip())  # fmt: skip


def tell(one: Candidate) -> None:
    """Say on standard error how far the measurements are."""
    f = one.found
    line = one.failed or f"{f['size']:.1f} MB, {f['latency']:.1f} ms, {f[main_score(dict(f))]:.4g}"
    sys.stderr.write(f"{one.name}: {line}\n")


def describe(
    source: Source, made: Sequence[Candidate], picked: Candidate | None, demands: Sequence[Clause], metric: str,
    budget: str, out: Path,
) -> Report:  # fmt: skip
    """Return the report: the table, the frontier, the charts, and what to use where."""
    base, held_out = made[0], source.held_out
    assert held_out is not None
    demanded = [clause.metric for clause in demands if clause.metric in SCORES]
    scores = list(dict.fromkeys(n for n in (metric, *demanded, "cosine", "agreement") if n in base.found))
    front = frontier(made, metric)
    advice = recommend(made, base, metric, quality_of(demands))
    values: dict[str, Any] = {
        "out": str(out) if picked else None, "model": source.name, "task": source.task, "metric": metric,
        "budget": [str(clause) for clause in demands], "picked": picked.name if picked else None,
        "met": picked is not None, "candidates": [one.to_dict() for one in made], "frontier": front,
        "broken": {one.name: broken(one, base, demands) for one in made if not one.failed},
        "recommendations": advice, "held_out": len(held_out), "report": None if picked else str(report_path(out)),
        "data_sha256": fingerprint(*filter(None, (source.data, held_out))),
    }  # fmt: skip
    notes = []
    if picked is None:
        notes.append(f"No candidate keeps {budget}: nothing was written.")
        notes += nearest(made, base, demands)
    else:
        f = picked.found
        notes.append(
            f"{picked.name} keeps the budget ({picked.what}): {metric} {f[metric]:.4g} instead of "
            f"{base.found[metric]:.4g}, {f['size_share']:.2f} of the size, {f['speed']:.2f} times as fast."
        )
        if picked.dtype == "bf16":
            notes.append("It is that fast with --dtype bf16.")
    notes.append(
        "On the frontier, where no other is better in score, size and speed at once: " + ", ".join(front) + "."
    )
    notes += [f"{WHERE[scene]}: {text}" for scene, text in advice.items()]
    if held_out.references and held_out.references[0] is not None:
        notes.append(f"Judged on {len(held_out):,} held-out examples: one of them is {1 / len(held_out):.2%}.")
    title = f"{source.name}: {budget}: " + (f"{picked.name}" if picked else "refused")
    return Report(title, values, tables=(*compare_tables(made, base, scores, demands),), charts=charts(made, metric),
                  notes=tuple(notes))  # fmt: skip


def nearest(made: Sequence[Candidate], base: Candidate, demands: Sequence[Clause]) -> list[str]:
    """Say which demand each of the nearest candidates breaks."""
    lost = {one.name: broken(one, base, demands) for one in made if not one.failed}
    fewest = min(map(len, lost.values()))
    return [f"{name} breaks only {', '.join(clauses)}." for name, clauses in lost.items() if len(clauses) == fewest]


def keep(source: Source, picked: Candidate, report: Report, out: Path) -> None:
    """Put the chosen candidate's folder in its place, with the report and the receipt."""
    from lmworks.export.receipt import RECEIPT, write_receipt

    assert picked.folder is not None
    with new_folder(out) as staged:
        shutil.copytree(picked.folder, staged, dirs_exist_ok=True)
        (staged / RECEIPT).unlink(missing_ok=True)
        write_json(staged / "report.json", report.to_dict())
        write_text(staged / "report.html", report.to_html())
        facts = {key: value for key, value in report.values.items() if key not in ("out", "report")}
        write_receipt(staged, {**keep_settings(source), "base": source.name, "compression": facts})
