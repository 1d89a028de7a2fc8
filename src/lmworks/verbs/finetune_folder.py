"""What a fine-tuning run leaves: its folder, the scores of the baselines, the model with report and receipt.

The folder is `OUT.partial` until everything is done; then it is renamed to OUT, so OUT is complete or absent.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmworks.base.files import own_file, read_json, write_json, write_text
from lmworks.base.report import Report
from lmworks.tasks.embed import FeatureExtraction
from lmworks.text.labelled import Labelled
from lmworks.training.tuning import ADAPTERS, Tuning
from lmworks.verbs.finetune_data import fingerprint
from lmworks.verbs.run import run_folder

if TYPE_CHECKING:
    from lmworks.training.finetune import Setup, Tuned

BASELINES = "baselines.json"  # in the run's training folder: they need the model as it was
PathLike = str | Path


@contextmanager
def tuning_folder(out: Path, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Yield the folder of a run, which no other process may use; at its end it is `out`, without the checkpoints."""
    from lmworks.training.state import hold

    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    if partial.is_dir():
        with hold(partial):  # before anything in it is touched: another process may be at work there
            pass
    with run_folder(out, resume=resume, overwrite=overwrite) as run, hold(run):
        (run / "training").mkdir(exist_ok=True)
        yield run
    for path in (out / "training").rglob("*.*"):
        if path.is_dir():  # the curves stay
            shutil.rmtree(path)


def find_baselines(path: Path | None, setup: Setup, data: Labelled, held_out: Labelled) -> dict[str, dict[str, float]]:
    """Return the metrics of the baselines; those of an interrupted run where it left them."""
    from lmworks.training.baseline import frozen_features, majority, no_answer
    from lmworks.training.measure import measure

    if path is not None and path.exists():
        return {name: dict(value) for name, value in read_json(path).items()}
    found: dict[str, dict[str, float]] = {}
    if data.task == "feature-extraction":
        found["before training"] = measure(setup.predictor, held_out)
    elif data.references[0] is not None:
        name = "random span" if data.task == "question-answering" else "majority"
        found[name] = majority(data, held_out)
        if data.task == "question-answering" and not all(held_out.references):
            found["always no answer"] = no_answer(held_out)
        frozen = frozen_features(setup.model, setup.data, held_out, setup.model.config.labels)
        if frozen is not None:
            found["frozen features"] = frozen
    if path is not None:
        write_json(path, found)
    return found


def publish(
    run: Path, folder: Path, name: PathLike, tuned: Tuned, setup: Setup, data: Labelled, held_out: Labelled,
    baselines: dict[str, dict[str, float]], tuning: Tuning, task: str, out: Path,
    *, amend: Callable[[Report], Report] | None = None, more: Mapping[str, Any] | None = None,
) -> Report:  # fmt: skip
    """Write the model, or its adapter, with tokenizer, report and, last of all, the receipt.

    `amend` adds to the report what another verb has to say, `more` are its facts for the receipt.
    """
    from lmworks.export.receipt import write_receipt
    from lmworks.models.checkpoint import save_model
    from lmworks.training.adapter_save import save_adapter
    from lmworks.training.embed_files import write_recipe
    from lmworks.verbs.summary import versions
    from lmworks.verbs.tuning_report import make_report

    kept = ("generation_config.json",) if setup.model.config.causal else ()
    for file in (*kept, "preprocessor_config.json"):
        if (folder / file).is_file():
            shutil.copyfile(own_file(folder / file), run / file)
    if tuning.method in ADAPTERS:
        base = folder.resolve() if Path(name).is_dir() else name  # a relative path would hold from here only
        save_adapter(setup.model, run, base=str(base))
    else:
        save_model(setup.model, run)
    if setup.tokenizer is not None:
        setup.tokenizer.save(run)
    if isinstance(setup.predictor.prepared, FeatureExtraction):
        write_recipe(folder, run, setup.predictor.prepared, hidden_size=setup.model.config.hidden_size)
    report = make_report(tuned, setup, data, held_out, baselines, tuning, task=task, name=str(name), out=out)
    report = report if amend is None else amend(report)
    facts = {
        "data_sha256": fingerprint(data, held_out),
        "seed": tuning.seed,
        "task": task,
        "labels": list(setup.model.config.labels) if data.labels else [],
        "base": str(name),
        "settings": asdict(tuning),
        "scores": {key: report.values[key] for key in ("metrics", "baselines", "validation_loss", "best_step")},
        "versions": versions(),
        **(more or {}),
    }
    write_json(run / "report.json", report.to_dict())
    write_text(run / "report.html", report.to_html())
    write_receipt(run, facts)
    return report
