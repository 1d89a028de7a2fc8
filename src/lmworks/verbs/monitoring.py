"""`lmworks monitor fit`: teach a model folder its own limits on data that it has not learnt.

The first part of the data says what is known (class means, vectors); the held-out part gives the temperature, the
threshold and the reference for drift. Without --validation a tenth is held out: the very tenth that `finetune` held out
of the same file with the same seed, so that the model has not seen it.

Shapes: N texts, L labels, D features.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks import __version__
from lmworks.base.errors import InputError
from lmworks.base.files import check_output, new_folder, own_file, read_json, sha256, write_json, write_text
from lmworks.base.hub import find_folder, find_local
from lmworks.base.report import Report
from lmworks.evaluation.calibration import confidence, ece, fit_temperature, nll, reliability
from lmworks.evaluation.monitor import (
    ARRAYS,
    CLASSIFY,
    FACTS,
    FORMAT,
    WRITE,
    Monitor,
    attach,
    files_of,
    hash_files,
    prompt_scores,
)
from lmworks.evaluation.ood import (
    OF_FEATURES,
    SCORES,
    Mahalanobis,
    auroc,
    choose_known,
    choose_threshold,
    energy_score,
    fit_mahalanobis,
    nearest_score,
    softmax_score,
)
from lmworks.export.receipt import RECEIPT
from lmworks.models.families import read_config, read_kind
from lmworks.runtime.onnx_runtime import FILES
from lmworks.runtime.predictor import Predictor, load
from lmworks.tasks.registry import find_task
from lmworks.text.labelled import Labelled, read_labelled
from lmworks.text.read import read_documents
from lmworks.training.measure import number_labels
from lmworks.training.mixture import find_split
from lmworks.verbs.finetune_data import fingerprint, read_data, take
from lmworks.verbs.monitoring_report import Measured, make_report

PathLike = str | Path
PAGE = "monitor.html"
DEFAULTS = ("nearest", "energy")  # where no out-of-scope texts choose: nearest, energy where there are no features
READ = 20_000  # texts at most that say what is known
KEPT, VECTORS = 2000, 500  # held-out texts whose numbers, and whose vectors, the reference keeps
PASSAGE = 128  # tokens of a text that a writer is measured on


@dataclass(frozen=True)
class Read:
    """What the model says of some texts."""

    logits: NDArray[np.float64]  # (N, L)
    features: NDArray[np.float32] | None  # (N, D)
    lengths: NDArray[np.int64]  # (N,)
    targets: NDArray[np.int64]  # (N,); empty where there are no labels


def fit_monitor(
    model: PathLike, data: PathLike, out: PathLike | None = None, *, validation: PathLike | None = None,
    out_of_scope: PathLike | None = None, false_alarms: float = 0.05, score: str = "auto", dtype: str = "auto",
    split: str | None = None, text_column: str | None = None, label_column: str | None = None, header: bool = True,
    seed: int = 0, revision: str | None = None, overwrite: bool = False,
) -> Report:  # fmt: skip
    """Fit a monitor on labelled data and write it into the model's folder, or into a copy of it, `out`.

    `out_of_scope` are texts that the model cannot answer (FILE or FILE:SPLIT): they choose the score, by AUROC.
    Raises InputError for a task that has no monitor, and for labels that the model does not have.
    """
    if not 0.0001 <= false_alarms <= 0.5:
        raise InputError("--false-alarms is out of range", found=str(false_alarms), expected="0.0001 to 0.5")
    if score not in ("auto", *SCORES):
        raise InputError("there is no such score", found=score, expected=", ".join(("auto", *SCORES)))
    if out is None and find_local(model) is None:
        raise InputError("a model of the Hub stays as it was fetched", found=str(model), fix="give -o FOLDER")
    folder = find_folder(model, revision=revision)
    task = check_task(folder)
    if out is not None:
        check_output(
            out, overwrite=overwrite, need_bytes=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        )
    graphs = any((folder / "onnx" / name).is_file() for name in FILES.values())
    predictor = load(folder, runtime="onnx" if graphs else "torch", dtype=dtype)
    columns = {"text_column": text_column, "label_column": label_column, "header": header}
    known, held = read_data(Path(data), validation, task, split, seed, columns)
    strange = None if out_of_scope is None else read_strange(Path(out_of_scope), task, columns)
    if task == WRITE:
        facts, arrays, measured = measure_writer(predictor, held, strange, false_alarms)
    else:
        facts, arrays, measured = measure_classifier(predictor, known, held, strange, false_alarms, score, seed)
    facts = {
        "format": FORMAT, "made_by": f"lmworks {__version__}", "task": task, "runtime": predictor.runtime.name,
        "dtype": predictor.runtime.dtype, **facts, "false_alarms": false_alarms, "seed": seed,
        "data": {"file": Path(data).name, "sha256": fingerprint(known, held), "known": len(known),
                 "held_out": len(held), "out_of_scope": 0 if strange is None else len(strange)},
        "files": hash_files(folder, files_of(folder, predictor.runtime.name, predictor.runtime.dtype)),
    }  # fmt: skip
    report = make_report(str(out or model), facts, measured)
    if out is None:
        save(folder, Monitor(facts, arrays), report)
    else:
        with new_folder(Path(out)) as staged:
            for path in folder.rglob("*"):
                own_file(path)
            shutil.copytree(folder, staged, dirs_exist_ok=True)
            save(staged, Monitor(facts, arrays), report)
    return report


def check_task(folder: Path) -> str:
    """Return the task of a folder; raise InputError for one that has no monitor."""
    config = read_config(folder)
    task = find_task(read_kind(config))
    if task not in (CLASSIFY, WRITE):
        raise InputError(f"there is no monitor for {task}", where=str(folder), expected=f"{CLASSIFY} or {WRITE}")
    if task == CLASSIFY and (
        config.problem_type not in (None, "single_label_classification") or len(config.labels) < 2
    ):
        raise InputError("a monitor needs labels that exclude each other", where=str(folder),
                         found=config.problem_type or "one label", expected="single_label_classification")  # fmt: skip
    return task


def read_strange(file: Path, task: str, columns: dict[str, Any]) -> list[Any]:
    """Return the texts of FILE or FILE:SPLIT; a plain file has one a line, and labels are not looked at."""
    path, split = find_split(file)
    if path.suffix.lower() in (".txt", ".md"):
        return [line for document in read_documents(path) for line in document.text.splitlines() if line.strip()]
    found = read_labelled(path, task, split=split, **columns).examples
    return list(found)


def measure_classifier(
    predictor: Predictor, known: Labelled, held: Labelled, strange: list[Any] | None, rate: float, score: str, seed: int
) -> tuple[dict[str, Any], dict[str, Any], Measured]:
    """Return what monitor.json and monitor.safetensors hold of a classifier, and what the report shows."""
    attach(predictor, None)
    labels: tuple[str, ...] = predictor.prepared.facts.labels  # type: ignore[union-attr]
    rng = np.random.default_rng(seed)
    if len(known) > READ:
        known = take(known, sorted(rng.choice(len(known), READ, replace=False).tolist()))
    near, far = read(predictor, known.examples, known, labels), read(predictor, held.examples, held, labels)
    odd = None if strange is None else read(predictor, strange, None, labels)
    possible = [name for name in SCORES if near.features is not None or name not in OF_FEATURES]
    if score not in ("auto", *possible):
        raise InputError(f"{score} needs the model's features, which its graph does not give",
                         expected=", ".join(possible), fix="export it again, or choose another --score")  # fmt: skip
    found: dict[str, Any] = {}
    if near.features is not None:
        kept = choose_known(near.features, near.targets, seed=seed)
        found = {"mahalanobis": fit_mahalanobis(near.features, near.targets), "nearest": kept}
    inside = {name: score_all(name, far, found) for name in possible}
    outside = {} if odd is None else {name: score_all(name, odd, found) for name in possible}
    rocs = {name: auroc(outside[name], inside[name]) for name in outside}
    chosen, why = score, "as asked"
    if score == "auto" and rocs:
        chosen, why = max(rocs, key=lambda name: rocs[name]), "the highest AUROC against the out-of-scope texts"
    elif score == "auto":
        chosen = next(name for name in DEFAULTS if name in possible)
        why = (
            "the default: it takes no shape of the classes for granted"
            if chosen == DEFAULTS[0]
            else "the graph gives no features"
        )
    thresholds = {name: choose_threshold(values, rate) for name, values in inside.items()}
    calibration, temperature, curves = calibrate(far)
    sure, said = confidence(far.logits, temperature), far.logits.argmax(1)
    arrays: dict[str, Any] = {"known": found["nearest"]} if chosen == "nearest" else {}
    if chosen == "mahalanobis":
        arrays = {"whiten": found["mahalanobis"].whiten, "means": found["mahalanobis"].means}
    rows = np.sort(rng.permutation(len(said))[:KEPT])
    arrays |= keep_samples(rows, confidence=sure, score=inside[chosen], length=far.lengths)
    if far.features is not None:
        arrays["features"] = far.features[
            rows[:VECTORS] if len(rows) <= VECTORS else np.sort(rng.choice(rows, VECTORS, replace=False))
        ]
    right = said == far.targets
    facts = {
        "score": chosen, "why": why, "threshold": thresholds[chosen], "thresholds": thresholds, "auroc": rocs,
        "temperature": temperature, "calibration": calibration, "accuracy": float(right.mean()),
        "accuracy_kept": float((right & (inside[chosen] <= thresholds[chosen])).mean()),
        "recall": {name: float((outside[name] > thresholds[name]).mean()) for name in outside},
        "reference": {"texts": len(said), "classes": dict(zip(labels, np.bincount(said, minlength=len(labels)).tolist(),
                                                              strict=True))},
    }  # fmt: skip
    return facts, arrays, Measured(curves, inside[chosen], outside.get(chosen))


def read(predictor: Predictor, examples: list[Any], labelled: Labelled | None, labels: tuple[str, ...]) -> Read:
    """Run texts; raise InputError for a label that the model does not have."""
    wanted = () if labelled is None else labelled.references
    place = {label: i for i, label in enumerate(number_labels(labels, wanted))}
    for i, label in enumerate(wanted):
        if label not in place:
            raise InputError("a label of the data is not one of the model's", found=str(label),
                             where=f"{labelled and labelled.where}, example {i + 1}",
                             expected=", ".join(labels[:8]) + (" …" if len(labels) > 8 else ""))  # fmt: skip
    rows = predictor(list(examples), check=True, long="window")
    features = None if rows[0][1] is None else np.stack([row[1] for row in rows])
    targets = np.array([place[label] for label in wanted], np.int64)
    return Read(np.stack([row[0] for row in rows]), features, np.array([row[2] for row in rows]), targets)


def score_all(name: str, texts: Read, found: dict[str, Any]) -> NDArray[np.float64]:
    """Return a score (N,) by its name."""
    if name in OF_FEATURES:
        assert texts.features is not None
        fitted = found[name]
        return (
            fitted.score(texts.features) if isinstance(fitted, Mahalanobis) else nearest_score(texts.features, fitted)
        )
    return (softmax_score if name == "softmax" else energy_score)(texts.logits)


def calibrate(texts: Read) -> tuple[dict[str, Any], float, dict[str, list[tuple[int, float, float]]]]:
    """Return NLL and ECE before and after, the temperature, and the two reliability curves.

    What is measured after comes of two halves, each with the temperature of the other: no text judges its own.
    """
    right = texts.logits.argmax(1) == texts.targets
    halves = np.arange(len(right)) % 2 == 0
    after, costs = np.empty(len(right)), 0.0
    for here in (halves, ~halves):
        warm = fit_temperature(texts.logits[~here], texts.targets[~here])
        after[here] = confidence(texts.logits[here], warm)
        costs += nll(texts.logits[here], texts.targets[here], warm) * here.sum() / len(here)
    before = confidence(texts.logits)
    facts = {"before": {"ece": ece(before, right), "nll": nll(texts.logits, texts.targets)},
             "after": {"ece": ece(after, right), "nll": float(costs)}}  # fmt: skip
    curves = {"before": reliability(before, right), "after": reliability(after, right)}
    return facts, fit_temperature(texts.logits, texts.targets), curves


def measure_writer(
    predictor: Predictor, held: Labelled, strange: list[Any] | None, rate: float
) -> tuple[dict[str, Any], dict[str, Any], Measured]:
    """Return the same of a model that writes: how much each passage surprises it."""
    inside, lengths = prompt_scores(predictor, passages(predictor, held.examples))
    outside = None if strange is None else prompt_scores(predictor, passages(predictor, strange))[0]
    threshold = choose_threshold(inside, rate)
    rows = np.arange(min(len(inside), KEPT))
    facts = {
        "score": "perplexity", "why": "the log-perplexity of the prompt: a model that writes has no classes",
        "threshold": threshold, "thresholds": {"perplexity": threshold},
        "auroc": {} if outside is None else {"perplexity": auroc(outside, inside)},
        "recall": {} if outside is None else {"perplexity": float((outside > threshold).mean())},
        "reference": {"texts": len(inside)},
    }  # fmt: skip
    return facts, keep_samples(rows, score=inside, length=lengths), Measured({}, inside, outside)


def passages(predictor: Predictor, texts: list[Any]) -> list[str]:
    """Return the texts, long ones in passages of PASSAGE tokens; raise InputError for what is no plain text."""
    found = []
    for text in texts:
        if not isinstance(text, str):
            raise InputError("a monitor of a model that writes is fitted on plain texts", found=type(text).__name__)
        ids = predictor.tokenizer.encode(text)
        found += [predictor.tokenizer.decode(ids[i : i + PASSAGE]) for i in range(0, len(ids), PASSAGE)] or [text]
    return found


def keep_samples(rows: NDArray[np.int64], **numbers: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
    """Return some of each array's numbers."""
    return {name: values[rows].astype(np.float32) for name, values in numbers.items()}


def save(folder: Path, monitor: Monitor, report: Report) -> None:
    """Write the monitor and its page, and let the receipt know of them."""
    monitor.write(folder)
    write_text(folder / PAGE, report.to_html())
    if (folder / RECEIPT).is_file():
        receipt = read_json(folder / RECEIPT)
        if isinstance(receipt.get("files"), dict):
            receipt["files"] |= {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
                                 for name in (FACTS, ARRAYS, PAGE)}  # fmt: skip
            write_json(folder / RECEIPT, receipt)
