"""What `lmworks compare` finds in a folder: its size, how it was trained, and how it learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmworks.base.chart import Chart
from lmworks.base.errors import InputError
from lmworks.base.files import read_json
from lmworks.base.report import Cell, Table
from lmworks.evaluation.curves import METRICS, Curve, read_curve
from lmworks.verbs.ngram_folder import ARRAYS, TYPE
from lmworks.verbs.run import RUN_FILE

NGRAM = "n-gram"


@dataclass(frozen=True)
class Subject:
    """A folder to be compared; `scale` turns a loss of its curve into bits per byte, None where that is unknown."""

    name: str
    path: Path
    task: str  # NGRAM, or what the model was made for
    report: dict[str, Any]
    parameters: int | None
    bytes: int
    curve: Curve | None
    scale: float | None
    data_sha256: str | None

    @property
    def seconds(self) -> float | None:
        """How long training took."""
        found = self.report.get("train_seconds")
        return found if found is not None else None if self.curve is None else self.curve.seconds

    def values(self) -> dict[str, Any]:
        """Return the facts by name."""
        found: dict[str, Any] = {
            "task": self.task, "parameters": self.parameters, "bytes_on_disk": self.bytes, "train_seconds": self.seconds
        }  # fmt: skip
        if self.curve is None:
            return found
        best, near, scale = self.curve.best, self.curve.near, self.scale
        learned = {
            "steps": self.curve.steps, "best_step": best.step, "validation_loss": best.loss, "gap": self.curve.gap,
            "near_best_step": near.step, "near_best_seconds": near.seconds, "near_best_tokens": near.tokens,
            "validation_bits_per_byte": None if scale is None else best.loss * scale,
        }  # fmt: skip
        return found | learned


def read_subjects(sources: Sequence[str | Path]) -> dict[str, Subject]:
    """Look at each folder; raise InputError for what is no run and no model."""
    from lmworks.base.hub import find_folder

    if not sources:
        raise InputError("nothing to compare", fix="name folders of models or of runs")
    found: dict[str, Subject] = {}
    for source in sources:
        path = Path(source)
        local = path.exists() or path.with_name(path.name + ".partial").exists()
        name = str(source).rstrip("/")
        if name in found:
            raise InputError("a folder was named twice", found=name, fix="leave one out")
        found[name] = read_subject(name, path if local else find_folder(str(source)))
    return found


def read_subject(name: str, path: Path) -> Subject:
    """Look at one folder, file of an n-gram model, or interrupted run."""
    path = path if path.exists() else path.with_name(path.name + ".partial")
    report = read_json(path / "report.json") if (path / "report.json").is_file() else {}
    receipts = [read_json(path / name) for name in ("lmworks.json", RUN_FILE) if (path / name).is_file()]
    receipt = receipts[0] if receipts else {}
    logs = [path / METRICS, path / "training" / METRICS]
    curve = next((read_curve(log) for log in logs if log.is_file()), None)
    task, parameters = look(path, receipt)
    if task is None and curve is None:
        raise InputError("this is no model and no run", where=str(path),
                         expected="a model folder, a run with training/metrics.jsonl, or an n-gram model")  # fmt: skip
    tokens, size, bits = (report.get(key) for key in ("validation_tokens", "validation_bytes", "bits_per_byte"))
    return Subject(
        name, path, task or "unfinished run", report, parameters or report.get("parameters"), weigh(path), curve,
        tokens / size / math.log(2) if tokens and size and bits is not None else None, receipt.get("data_sha256"),
    )  # fmt: skip


def look(path: Path, receipt: dict[str, Any]) -> tuple[str | None, int | None]:
    """Return what a folder was made for, and its parameters."""
    from lmworks.base.safetensors_header import check_header
    from lmworks.models.families import read_config, read_kind
    from lmworks.tasks.registry import find_task

    if path.suffix == ".arpa" or ((path / ARRAYS).is_file() and is_ngram(path)) or list(path.glob("*.arpa")):
        return NGRAM, receipt.get("ngram", {}).get("parameters")
    if path.is_file() or not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            return find_task(read_kind(read_config(path))), count(sorted(path.glob("adapter_model.safetensors")))
        return None, None
    weights = sorted(path.glob("*.safetensors"))
    parameters = sum(info.size for file in weights for info in check_header(file).values())
    return find_task(read_kind(read_config(path))), parameters or None


def count(files: Sequence[Path]) -> int | None:
    """Return the numbers in safetensors files."""
    from lmworks.base.safetensors_header import check_header

    return sum(info.size for file in files for info in check_header(file).values()) or None


def is_ngram(path: Path) -> bool:
    """Tell an n-gram model's folder from a network's."""
    return (path / "config.json").is_file() and read_json(path / "config.json").get("model_type") == TYPE


def weigh(path: Path) -> int:
    """Return the bytes of a model's own files, without logs and checkpoints."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def common_level(subjects: Sequence[Subject], reach: float | None) -> tuple[str, float, bool] | None:
    """Return the unit, the loss that all runs reach (or `reach`), and whether it is in bits per byte.

    Losses compare in bits per byte where the runs held out the same text, else for the same data and tokenizer; None
    where they do not compare.
    """
    runs = [one for one in subjects if one.curve is not None]
    if len(runs) < 2:
        return None
    bytewise = all(one.scale is not None for one in runs) and len({validated(one) for one in runs}) == 1
    alike = {(one.data_sha256, vocabulary(one)) for one in runs}
    if not bytewise and (len(alike) > 1 or None in next(iter(alike))):
        return None
    worst = max(one.curve.best.loss * (one.scale if bytewise and one.scale else 1.0) for one in runs if one.curve)
    return ("bits per byte" if bytewise else "nats"), worst if reach is None else reach, bytewise


def validated(one: Subject) -> tuple[Any, ...]:
    """Return what tells one held-out text from another."""
    settings = one.report.get("settings", {})
    return one.data_sha256, one.report.get("validation_bytes"), settings.get("validation"), settings.get("seed")


def vocabulary(one: Subject) -> str | None:
    """Return the hash of a model's tokenizer."""
    from lmworks.base.files import sha256

    file = one.path / "tokenizer.json"
    return sha256(file) if file.is_file() else None


def run_tables(subjects: Sequence[Subject], reach: float | None) -> tuple[list[Table], list[Chart], dict[str, Any]]:
    """Return the facts of all, their convergence to a common loss, their curves, and the same as values."""
    facts = {one.name: one.values() for one in subjects}
    columns = {"task": "made for", "parameters": "parameters", "bytes_on_disk": "bytes", "steps": "steps",
               "train_seconds": "seconds", "validation_loss": "held-out loss",
               "validation_bits_per_byte": "bits per byte", "gap": "gap"}  # fmt: skip
    used = [key for key in columns if any(row.get(key) is not None for row in facts.values())]
    if len({one.task for one in subjects}) == 1:
        used.remove("task")
    rows: list[tuple[Cell, ...]] = [(name, *(row.get(key) for key in used)) for name, row in facts.items()]
    tables = [Table("Runs", ("model", *(columns[key] for key in used)), tuple(rows))]
    values: dict[str, Any] = {"runs": facts}
    level = common_level(subjects, reach)
    runs = [one for one in subjects if one.curve is not None]
    bytewise = level is not None and level[2]
    soon: list[tuple[Cell, ...]] = [
        (one.name, facts[one.name]["best_step"], facts[one.name]["near_best_step"]) for one in runs
    ]
    head: tuple[str, ...] = ("model", "best step", "within 5 %")
    title = "How soon"
    if level is not None:
        unit, loss, _ = level
        found = {one.name: arrival(one, loss, bytewise) for one in runs}
        values["convergence"] = {"unit": unit, "level": loss, "reached": found}
        keys = ("step", "tokens", "seconds")
        soon = [(*row, *((found[str(row[0])] or {}).get(key) for key in keys)) for row in soon]
        head, title = (*head, *keys), f"How soon; step, tokens and seconds to {loss:.4f} {unit}"
    tables += [Table(title, head, tuple(soon))] if soon else []
    charts = [
        Chart("Held-out loss", x, "bits per byte" if bytewise else "nats a scored token", tuple(
            (one.name, tuple((float(getattr(moment, x)), moment.loss * scale_of(one, bytewise))
                             for moment in one.curve.moments)) for one in runs if one.curve is not None))
        for x in ("step", "seconds") if runs
    ]  # fmt: skip
    return tables, charts, values


def arrival(one: Subject, loss: float, bytewise: bool) -> dict[str, Any] | None:
    """Return when a run came to this loss."""
    assert one.curve is not None
    moment = one.curve.reached(loss / scale_of(one, bytewise) * (1 + 1e-12))
    return None if moment is None else {"step": moment.step, "tokens": moment.tokens, "seconds": moment.seconds}


def scale_of(one: Subject, bytewise: bool) -> float:
    """Return by what to multiply a loss of the curve."""
    return one.scale if bytewise and one.scale is not None else 1.0
