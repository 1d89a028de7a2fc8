"""Fine-tune a published or own model on labelled data with one call, and score one on labelled data.

    lmworks finetune MODEL TRAIN --task text-classification -o OUT      OUT is a model folder,
                                                                        or an adapter beside its base

The folder is `OUT.partial` until everything is done; then it is renamed to OUT, so OUT is complete or absent.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.files import check_output, read_json, write_json, write_text
from lmworks.base.hub import find_folder
from lmworks.base.optional import require
from lmworks.base.report import Report
from lmworks.few_shot import tune_draws
from lmworks.models.families import read_config, read_kind
from lmworks.run import check_same_run, run_folder
from lmworks.tasks.base import Long
from lmworks.tasks.embed import FeatureExtraction
from lmworks.tasks.registry import find_task
from lmworks.text.labelled import Labelled, check_labels, read_labelled
from lmworks.text.read import Document
from lmworks.text.split import split_documents
from lmworks.training.mixture import Domain, check_weights, name_domains, read_weight
from lmworks.training.tuning import ADAPTERS, Tuning

if TYPE_CHECKING:
    from lmworks.training.finetune import Setup, Tuned

TUNABLE = (
    "text-classification", "token-classification", "question-answering", "image-classification", "text-generation",
    "fill-mask", "feature-extraction",
)  # fmt: skip
HELD_OUT = 0.1  # of the training data, where no validation file is given
HELD_STREAM = 2**32 + 16
BASELINES = "baselines.json"  # in the run's training folder: they need the model as it was
PathLike = str | Path


def finetune(
    model: PathLike,
    train: PathLike,
    out: PathLike,
    *,
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
    folder to train on, "train,validation" also the one to validate on. Raises InputError for data or settings that
    cannot be used; Interrupted after Ctrl-C, and `resume` continues to the same bits.
    """
    require("torch", extra="torch")
    from lmworks.training.distributed import find_ranks
    from lmworks.training.finetune import set_up, tune

    ranks = find_ranks()
    with ranks.together():
        out, tuning = Path(out), (tuning or Tuning.from_dict(knobs)).check()
        check_output(out, overwrite=overwrite)
        folder = find_folder(model, revision=revision)
        task = choose_task(task, folder)
        columns: dict[str, Any] = {"text_column": text_column, "label_column": label_column, "header": header}
        data, held_out = read_data(Path(train), validation, task, split, tuning.seed, columns)
        domains = read_domains(data, task, tuning, columns)
        if tuning.shots is not None and ranks.world > 1:
            raise InputError("--shots trains on a few examples, in one process", fix="start without torchrun")
    if dry_run:
        from lmworks.tuning_report import estimate

        return estimate(set_up(folder, data, held_out, task=task, tuning=tuning, domains=domains), tuning, task)
    with ranks.on_first(tuning_folder(out, resume=resume, overwrite=overwrite)) as run:
        settings = {"model": str(model), "task": task, **as_json(asdict(tuning))}
        others = [part for domain in domains for part in (domain.train, domain.held_out)]
        ranks.once(lambda: check_same_run(run, settings, fingerprint(data, held_out, *others)))
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
        return ranks.once(lambda: publish(run, folder, model, *made, tuning, task, out))


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


def choose_task(task: str | None, folder: Path) -> str:
    """Return the task that is named, or the checkpoint's own; raise InputError where neither can be fine-tuned."""
    found = task or find_task(read_kind(read_config(folder)))
    if found in TUNABLE and (task or found != "feature-extraction"):
        return found
    what = f"no fine-tuning for the task {found!r}" if task else "this checkpoint has no head that says what to learn"
    near = did_you_mean(found, TUNABLE) if task else ""
    raise InputError(what, expected=", ".join(TUNABLE), fix=f"choose one with --task;{near}")


def read_data(
    train: Path, validation: PathLike | None, task: str, split: str | None, seed: int, columns: dict[str, Any]
) -> tuple[Labelled, Labelled]:
    """Return the training and the validation data; raise InputError where their labels differ."""
    first, _, second = (split or "").partition(",")
    kind = "text-generation" if task == "fill-mask" else task
    data = read_labelled(train, kind, split=first or None, **columns)
    if task == "fill-mask" and not all(isinstance(example, str) for example in data.examples):
        raise InputError("fill-mask learns from plain texts", where=str(train), found="prompts or conversations")
    if validation is None and not second:
        return hold_out(data, seed)
    held = Path(validation) if validation is not None else train
    other = check_labels(data, read_labelled(held, kind, split=second or (None if validation else first), **columns))
    if task in ("text-classification", "image-classification"):
        check_all_labels(data, other)
    return data, other


def read_domains(data: Labelled, task: str, tuning: Tuning, columns: dict[str, Any]) -> list[Domain]:
    """Return the files of --also with their weights; of each a tenth is held out. Their labels must be known."""
    weighed = [read_weight(text) for text in tuning.also]
    check_weights([weight for _, weight in weighed])
    domains = []
    for name, (file, weight) in zip(name_domains([file for file, _ in weighed]), weighed, strict=True):
        train, held_out = read_data(file, None, task, None, tuning.seed, columns)
        domains.append(Domain(name, weight, check_labels(data, train), check_labels(data, held_out)))
    return domains


def check_all_labels(data: Labelled, other: Labelled) -> None:
    """Raise InputError for a label of the training data that the validation data lack, or that is a slip of the pen."""
    seen = {label for reference in other.references for label in label_names(reference)}
    missing = [label for label in data.labels if label not in seen]
    if missing:
        near = did_you_mean(missing[0], seen)
        raise InputError(
            f'no validation example has the label "{missing[0]}"',
            where=other.where,
            found=f"{len(seen)} of {len(data.labels)} labels; missing: {', '.join(missing[:8])}",
            expected="every label of the training data",
            fix="correct the label" + near
            if near
            else "add examples of it, or leave --validation out: then a tenth of the training data is held out",
        )


def label_names(reference: Any) -> tuple[str, ...]:
    """Return the labels of one example: none for a number."""
    return () if isinstance(reference, float) else (reference,) if isinstance(reference, str) else tuple(reference)


def hold_out(data: Labelled, seed: int) -> tuple[Labelled, Labelled]:
    """Return the data without a tenth of them, and that tenth: of every label its share, chosen by the seed.

    Of a few plain texts each gives its own last part.
    """
    from lmworks.training.data import draw

    if data.references[0] is None and all(isinstance(example, str) for example in data.examples):
        texts = [Document(str(i), text) for i, text in enumerate(data.examples)]
        sides = split_documents(texts, validation=HELD_OUT, seed=seed)
        train, held = (
            replace(data, examples=[one.text for one in side], references=[None] * len(side)) for side in sides
        )
        return train, held
    single = bool(data.references) and isinstance(data.references[0], str)
    groups: dict[Any, list[int]] = {}
    for place, _ in sorted(enumerate(draw(seed, 0, len(data), stream=HELD_STREAM).tolist()), key=lambda row: row[1]):
        groups.setdefault(data.references[place] if single else None, []).append(place)
    places = {place for group in groups.values() for place in group[: round(HELD_OUT * len(group))]}
    places = places or set(next(iter(groups.values()))[: len(data) // 2])
    if not places:
        raise InputError("one example cannot be trained on and held out", where=data.where, fix="give more examples")
    return take(data, [i for i in range(len(data)) if i not in places]), take(data, sorted(places))


def take(data: Labelled, places: list[int]) -> Labelled:
    """Return some of the examples."""
    return replace(data, examples=[data.examples[i] for i in places], references=[data.references[i] for i in places])


def fingerprint(*parts: Labelled) -> str:
    """Return a SHA-256 of everything in the data."""
    digest = hashlib.sha256()
    for data in parts:
        digest.update(repr((data.task, data.labels, data.examples, data.references)).encode())
    return digest.hexdigest()


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as they come back from a file: lists for tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def find_baselines(path: Path | None, setup: Setup, data: Labelled, held_out: Labelled) -> dict[str, dict[str, float]]:
    """Return the metrics of the baselines; those of an interrupted run where it left them."""
    from lmworks.training.baseline import frozen_features, majority
    from lmworks.training.measure import measure

    if path is not None and path.exists():
        return {name: dict(value) for name, value in read_json(path).items()}
    found: dict[str, dict[str, float]] = {}
    if data.task == "feature-extraction":
        found["before training"] = measure(setup.predictor, held_out)
    elif data.references[0] is not None:
        name = "random span" if data.task == "question-answering" else "majority"
        found[name] = majority(data, held_out)
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
    from lmworks.summary import versions
    from lmworks.training.adapter_save import save_adapter
    from lmworks.training.embed_files import write_recipe
    from lmworks.tuning_report import make_report

    kept = ("generation_config.json",) if setup.model.config.causal else ()
    for file in (*kept, "preprocessor_config.json"):
        if (folder / file).is_file():
            shutil.copy(folder / file, run / file)
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
    revision: str | None = None,
    code: Sequence[str] = (),
) -> Report:
    """Score a model, or a PEFT adapter, on labelled data: accuracy, f1, precision, recall, exact_match, mse by name.

    `long` None: as the model was fine-tuned, else "error". Raises InputError for labels that the model does not have.
    """
    from lmworks.evaluation.metrics import score
    from lmworks.tuning_report import class_rows, class_table, metric_table

    folder = find_folder(model, revision=revision)
    config = read_config(folder)
    task = task or find_task(read_kind(config))
    data = read_labelled(path, task, text_column=text_column, label_column=label_column, header=header, split=split)
    if data.references[0] is None:
        raise InputError(
            f"{task} has no labels to compare with", fix="lmworks evaluate MODEL TEXT gives its perplexity"
        )
    require("torch", extra="torch")
    from lmworks.training.finetune import open_predictor
    from lmworks.training.measure import answer
    from lmworks.training.supervision import problem_type

    receipt = read_json(folder / "lmworks.json") if (folder / "lmworks.json").is_file() else {}
    settings = receipt.get("settings", {}) if receipt.get("task") == task else {}
    problem = problem_type(data)
    if data.labels:
        data = check_labels(replace(data, labels=config.labels, where=str(folder)), data)
    predictor = open_predictor(
        folder, task, long=long or settings.get("long", "error"), max_length=settings.get("max_length"), code=code
    )
    said = answer(predictor, data, problem=problem)
    labels = config.labels if data.labels else ()
    metrics = score(task, said, data.references, labels=labels)
    rows = class_rows(task, said, data.references, labels)
    values = {"model": str(model), "task": task, "examples": len(data), **metrics, "metrics": metrics, "classes": rows}
    tables = (metric_table(f"On {path}", {"this model": metrics}), *class_table(rows))
    return Report(f"{model}: {len(data):,} examples of {task}", values, tables=tables)
