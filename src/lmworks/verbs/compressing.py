"""Make a model smaller with one call: round it, prune it, factorize it, or name a budget and let it choose.

lmworks quantize MODEL -o OUT --bits 4                                one way
lmworks quantize MODEL --data DATA --budget "accuracy>=-1%, …" -o OUT   every way, measured: the best, or a refusal

OUT is a model folder that every verb opens. It has the published layout where that can say what the model is (zeros,
fewer neurons); else a config that no other reader takes for the published model's (models/compact_files.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lmworks.base.errors import InputError
from lmworks.base.files import check_output, new_folder, read_json, write_json, write_text
from lmworks.base.hub import find_folder
from lmworks.base.optional import require
from lmworks.base.report import Cell, Report, Table
from lmworks.models.families import TASKS, read_config, read_kind
from lmworks.tasks.registry import find_task
from lmworks.text.labelled import Labelled
from lmworks.verbs.compress_knobs import Pruning, Quantizing
from lmworks.verbs.compress_trial import folder_bytes, judge
from lmworks.verbs.finetune_data import fingerprint, read_data
from lmworks.verbs.finetuning import match_labels

if TYPE_CHECKING:
    from lmworks.models.heads import Model
    from lmworks.training.finetune import Setup

PathLike = str | Path
PULSES = 100  # times that a gradual run makes new zeros
GRADIENT_BATCHES = 16


@dataclass(frozen=True)
class Source:
    """What is made smaller: a folder, its task, and examples of it."""

    name: str
    folder: Path
    task: str
    data: Labelled | None = None
    held_out: Labelled | None = None
    problem: str | None = None

    def open(self) -> Model:
        """Read the model anew."""
        from lmworks.compress.quantize import check_plain
        from lmworks.models.checkpoint import load_model

        model = load_model(self.folder, TASKS[self.task])
        check_plain(model)
        return model


def open_source(
    model: PathLike, data: PathLike | None, validation: PathLike | None, columns: dict[str, Any], *, seed: int = 0,
    revision: str | None = None,
) -> Source:  # fmt: skip
    """Find the model and read its data; without `validation` a tenth of them is held out."""
    require("torch", extra="torch")
    folder = find_folder(model, revision=revision)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError("an adapter is merged before it is made smaller", where=str(folder),
                         fix=f"lmworks merge {folder} -o MERGED")  # fmt: skip
    config = read_config(folder)
    task = find_task(read_kind(config))
    if data is None:
        if validation is not None:
            raise InputError("--validation is held out beside --data", fix="give --data as well")
        if any(value not in (None, True) for value in columns.values()):
            raise InputError("columns and parts are those of --data", found="no --data", fix="give --data FILE")
        return Source(str(model), folder, task)
    from lmworks.training.measure import problem_type

    columns = {"header": True, **columns}
    split = columns.pop("split", None)
    train, held_out = read_data(Path(data), validation, task, split, seed, columns)
    train, held_out = match_labels(train, config), match_labels(held_out, config)
    if train.labels:
        train, held_out = replace(train, labels=config.labels), replace(held_out, labels=config.labels)
    return Source(str(model), folder, task, train, held_out, problem_type(train))


def apply_quantizing(model: Model, source: Source, how: Quantizing) -> dict[str, Any]:
    """Quantize a model in place; return what was chosen and measured."""
    from lmworks.compress.calibrate import choose_skips, find_spans, read_batches
    from lmworks.compress.quantize import find_linears, quantize, rounding_error

    grid, spans, facts, skip = how.grid(), None, {}, list(how.skip)
    if (grid.activations == "static" or how.tolerance is not None) and source.data is None:
        raise InputError("calibration needs examples", found="no --data", fix="give --data FILE")
    if source.data is not None and (grid.activations == "static" or how.tolerance is not None):
        from lmworks.training.finetune import open_predictor

        batches = read_batches(open_predictor(source.folder, source.task), source.data)
        if grid.activations == "static":
            spans = find_spans(model, batches, percentile=how.percentile)
        if how.tolerance is not None:
            chosen, ranked, left = choose_skips(model, batches[:8], grid, limit=how.tolerance, spans=spans)
            skip += [name for name in chosen if name not in skip]
            facts = {"sensitivity": ranked, "divergence": left}
    errors = {name: rounding_error(w.weight.detach(), grid) for name, w in find_linears(model, head=False).items()}
    quantize(model, grid, embeddings=how.embeddings, skip=skip, spans=spans)
    return {"grid": grid.to_dict(), "skipped": skip, "rounding_error": errors, **facts}


def apply_pruning(model: Model, source: Source, how: Pruning, run: Path) -> tuple[Model, dict[str, Any]]:
    """Prune or factorize a model, and fine-tune it where that is asked for; return it and what was done."""
    from lmworks.compress.lowrank import lower_ranks
    from lmworks.compress.prune import Gradual, prune, shrink, sparsity

    facts: dict[str, Any] = {}
    before = sum(p.numel() for p in model.parameters())
    if how.energy is not None:
        done = lower_ranks(model, energy=how.energy)
        facts["ranks"] = {name: {"rank": rank, "energy": energy} for name, (rank, energy) in done.items()}
    elif how.structured:
        taylor = how.importance == "taylor"
        if taylor:
            add_gradients(set_up_training(model, source, how))
        shrink(model, neurons=how.sparsity, heads=how.heads, gradients=taylor)
        model.zero_grad(set_to_none=True)
    elif not how.epochs:
        prune(model, how.sparsity, scope=how.scope)
    if how.epochs:
        setup = set_up_training(model, source, how)
        plain = how.energy is None and not how.structured
        half = max(setup.data.steps // 2, 1)
        gradual = (
            [Gradual(model, how.sparsity, begin=0, end=half, every=half // PULSES, scope=how.scope)] if plain else []
        )
        facts["train_seconds"] = train(setup, source, how, run, gradual)
    c = model.config
    sizes = {"intermediate_size": c.intermediate_size, "num_attention_heads": c.num_attention_heads}
    after = sum(p.numel() for p in model.parameters())
    zeros = sparsity(model) if how.energy is None else {}
    return model, {**facts, "sparsity": zeros.get("all", 0.0), "sparsity_by_layer": zeros, **sizes,
                   "parameters": after, "parameters_before": before}  # fmt: skip


def set_up_training(model: Model, source: Source, how: Pruning) -> Setup:
    """Prepare the data and the loss for a model that is there already."""
    from lmworks.training.finetune import set_up
    from lmworks.training.tuning import Tuning

    assert source.data is not None
    assert source.held_out is not None
    tuning = Tuning(epochs=max(how.epochs, 1), lr=how.lr, batch_size=how.batch_size, seed=how.seed).check()
    return set_up(source.folder, source.data, source.held_out, task=source.task, tuning=tuning, opened=(model, False))


def add_gradients(setup: Setup) -> None:
    """Leave in `grad` the gradient of the loss over some batches."""
    model = setup.model.eval()
    for step in range(min(setup.data.steps, GRADIENT_BATCHES)):
        batch = setup.data.batch(step)
        from lmworks.training.machine import to_device

        loss = setup.objective(model, to_device(batch, next(model.parameters()).device)) / setup.objective.count(batch)
        loss.backward()  # type: ignore[no-untyped-call]


def train(setup: Setup, source: Source, how: Pruning, run: Path, callbacks: Sequence[Any]) -> float:
    """Fine-tune in place; return the seconds."""
    from lmworks.training.finetune import tune
    from lmworks.training.tuning import Tuning

    assert source.held_out is not None
    tuning = Tuning(epochs=how.epochs, lr=how.lr, batch_size=how.batch_size, seed=how.seed).check()
    run.mkdir(parents=True, exist_ok=True)
    tuned = tune(setup, source.held_out, run, task=source.task, tuning=tuning, stream=sys.stderr, callbacks=callbacks)
    return tuned.result.seconds


def quantize(
    model: PathLike, out: PathLike, *, how: Quantizing | None = None, data: PathLike | None = None,
    validation: PathLike | None = None, revision: str | None = None, overwrite: bool = False, **columns: Any,
) -> Report:  # fmt: skip
    """Write a model in whole numbers to the new folder `out`; with data also its scores before and after.

    `columns`: text_column, label_column, header, split of the data. Raises InputError for what cannot be quantized.
    """
    how = how or Quantizing()
    how.grid()
    check_output(out, overwrite=overwrite)
    source = open_source(model, data, validation, columns, revision=revision)
    small = source.open()
    facts = apply_quantizing(small, source, how)
    return publish(source, small, Path(out), "quantized", {**facts, "settings": asdict(how)})


def prune(
    model: PathLike, out: PathLike, *, how: Pruning | None = None, data: PathLike | None = None,
    validation: PathLike | None = None, revision: str | None = None, overwrite: bool = False, **columns: Any,
) -> Report:  # fmt: skip
    """Write a pruned, shrunk or factorized model to the new folder `out`; with data also its scores before and after.

    Raises InputError for what cannot be pruned.
    """
    how = (how or Pruning()).check(data)
    check_output(out, overwrite=overwrite)
    source = open_source(model, data, validation, columns, seed=how.seed, revision=revision)
    with TemporaryDirectory(prefix="lmworks-") as run:
        small, facts = apply_pruning(source.open(), source, how, Path(run) / "training")
    return publish(source, small.eval(), Path(out), "pruned", {**facts, "settings": asdict(how)})


def publish(source: Source, model: Model, out: Path, done: str, facts: dict[str, Any]) -> Report:
    """Write the folder, read it back, score it, and write the report and, last, the receipt."""
    from lmworks.export.receipt import write_receipt
    from lmworks.models.compact_files import compact_layers
    from lmworks.models.families import unsayable
    from lmworks.models.folder import write_folder
    from lmworks.runtime.predictor import load

    if out.resolve() == source.folder.resolve():
        raise InputError("the output would replace the model itself", where=str(out), fix="choose another -o")
    own = bool(compact_layers(model) or unsayable(model.config, model.kind))
    before = folder_bytes(source.folder)
    with new_folder(out) as staged:
        write_folder(model, source.folder, staged)
        size = folder_bytes(staged)
        values: dict[str, Any] = {
            "out": str(out), "model": source.name, "task": source.task, "bytes": size, "bytes_before": before,
            "size_share": size / before, "published_layout": not own, **facts,
        }  # fmt: skip
        if source.held_out is not None:
            values["scores_before"], _ = judge(load(source.folder, source.task), source.held_out, source.problem)
            values["scores"], _ = judge(load(staged, source.task), source.held_out, source.problem)
            values["data_sha256"] = fingerprint(*filter(None, (source.data, source.held_out)))
        report = describe(values, done)
        write_json(staged / "report.json", report.to_dict())
        write_text(staged / "report.html", report.to_html())
        write_receipt(
            staged,
            {**keep_settings(source), "base": source.name, done: {k: v for k, v in values.items() if k != "out"}},
        )
    return report


def describe(values: dict[str, Any], done: str) -> Report:
    """Return the report of one way."""
    rows: list[tuple[Cell, ...]] = [("MB", values["bytes_before"] / 1e6, values["bytes"] / 1e6)]
    if "parameters" in values:
        rows.append(("parameters", values["parameters_before"], values["parameters"]))
        rows.append(("zeros among the body's weights", None, values["sparsity"]))
    rows += [(name, values["scores_before"].get(name), value) for name, value in values.get("scores", {}).items()]
    tables = [Table("Before and after", ("what", "before", "after"), tuple(rows))]
    errors = values.get("rounding_error", {})
    if errors:
        worst = sorted(errors.items(), key=lambda row: -row[1])[:8]
        minds = values.get("sensitivity", {})
        lines = tuple((name, e, minds.get(name), "as it was" if name in values["skipped"] else "") for name, e in worst)
        columns = ("layer", "rounding error", "divergence if it alone is rounded", "")
        tables.append(Table("The layers that lose most", columns, lines))
    notes = []
    if not values["published_layout"]:
        notes.append(
            "This folder is lmworks' own: its config has the key lmworks_quantization, and transformers refuses it."
        )
    if done == "pruned" and values["published_layout"] and values["sparsity"]:
        notes.append("Zeros take as much room and time as other numbers; --structured makes the matrices smaller.")
    return Report(f"{values['out']}: {values['model']} {done}", values, tables=tuple(tables), notes=tuple(notes))


def keep_settings(source: Source) -> dict[str, Any]:
    """Return what the source's receipt says of reading long texts, for the receipt of what is made of it."""
    path = source.folder / "lmworks.json"
    receipt = read_json(path) if path.is_file() else {}
    settings = receipt.get("settings", {})
    kept = {name: settings[name] for name in ("long", "max_length") if name in settings}
    return {"task": source.task, "settings": kept} if receipt.get("task") == source.task and kept else {}
