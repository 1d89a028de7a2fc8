"""The data of a fine-tuning run: read, checked, and a tenth of them held out where no validation file is given."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.report import counted
from lmworks.models.families import read_config, read_kind
from lmworks.tasks.registry import find_task
from lmworks.text.labelled import Labelled, check_labels, read_labelled
from lmworks.text.read import Document
from lmworks.text.split import split_documents
from lmworks.training.mixture import Domain, check_weights, find_split, name_domains, read_weight
from lmworks.training.tuning import Tuning

TUNABLE = (
    "text-classification", "token-classification", "question-answering", "image-classification", "text-generation",
    "fill-mask", "feature-extraction",
)  # fmt: skip
HELD_OUT = 0.1  # of the training data, where no validation file is given
HELD_STREAM = 2**32 + 16
PathLike = str | Path


def choose_task(task: str | None, folder: Path) -> str:
    """Return the task that is named, or the checkpoint's own; raise InputError where neither can be fine-tuned."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError("an adapter cannot be fine-tuned further", where=str(folder), expected="a whole model",
                         fix="lmworks merge makes a LoRA a whole model; else start from its base")  # fmt: skip
    found = task or find_task(read_kind(read_config(folder)))
    if found in TUNABLE and (task or found != "feature-extraction"):
        return found
    what = f"no fine-tuning for the task {found!r}" if task else "this checkpoint has no head that says what to learn"
    near = did_you_mean(found, TUNABLE) if task else ""
    raise InputError(what, expected=", ".join(TUNABLE), fix=f"choose one with --task;{near}".rstrip(";"))


def read_data(
    train: Path, validation: PathLike | None, task: str, split: str | None, seed: int, columns: dict[str, Any],
    also: Sequence[Path] = (), more: Labelled | None = None,
) -> tuple[Labelled, Labelled]:  # fmt: skip
    """Return the training and the validation data; raise InputError where their labels differ.

    `also` are other files of the run, to which the columns belong as well; `more` are examples to train on as well.
    """
    check_header(columns["header"], train, train if validation is None else Path(validation), *also)
    first, _, second = (split or "").partition(",")
    kind = "text-generation" if task == "fill-mask" else task
    data = read_labelled(train, kind, split=first or None, **columns)
    if task == "fill-mask" and not all(isinstance(example, str) for example in data.examples):
        raise InputError("fill-mask learns from plain texts", where=str(train), found="prompts or conversations")
    if more is not None:
        check_labels(data, more)
        data = replace(data, examples=[*data.examples, *more.examples], references=[*data.references, *more.references])
    if validation is None and not second:
        return count_copies(*hold_out(data, seed))
    held = Path(validation) if validation is not None else train
    other = check_labels(data, read_labelled(held, kind, split=second or (None if validation else first), **columns))
    if task in ("text-classification", "image-classification"):
        check_all_labels(data, other)
    return count_copies(data, other)


def count_copies(data: Labelled, other: Labelled) -> tuple[Labelled, Labelled]:
    """Return the data with a note on how many validation examples are training examples too."""
    known = {repr(example) for example in data.examples}
    if copies := sum(repr(example) in known for example in other.examples):
        note = f"{copies} of {counted(len(other), 'validation example')} are also in the training data."
        other = replace(other, notes=(*other.notes, note))
    return data, other


def check_header(header: bool, *files: Path) -> None:
    """Raise InputError for --no-header where no file has rows that could be one."""
    if not header and not any(is_table(file) or file.is_dir() for file in files):
        raise InputError("only a table has a first row that may name the columns", found="--no-header",
                         where=str(files[0]), expected=".csv or .tsv", fix="leave it out")  # fmt: skip


def check_plain(
    path: Path, long: str | None, column: str | None, *, label_column: str | None, header: bool, split: str | None
) -> None:
    """Raise InputError for options of labelled data where a language model is scored on texts."""
    nested = path.suffix.lower() in (".json", ".jsonl") and column is None
    given = {"--long": long, "--label-column": label_column, "--no-header": None if header else True,
             "--split": None if nested else split}  # fmt: skip
    if asked := [option for option, value in given.items() if value is not None]:
        raise InputError("a language model is scored on texts, which have no labels", found=" ".join(asked),
                         fix="leave it out; a table without a header is told by --text-column NUMBER")  # fmt: skip


def is_table(file: Path) -> bool:
    """Tell a table by its ending."""
    return file.suffix.lower() in (".csv", ".tsv")


def also_files(tuning: Tuning) -> list[Path]:
    """Return the files of --also."""
    return [find_split(read_weight(text)[0])[0] for text in tuning.also]


def read_domains(data: Labelled, task: str, tuning: Tuning, columns: dict[str, Any]) -> list[Domain]:
    """Return the files of --also with their weights; of each a tenth is held out. Their labels must be known.

    --split is that of the main file: another file's own is written behind it, FILE:SPLIT=WEIGHT.
    """
    weighed = [read_weight(text) for text in tuning.also]
    check_weights([weight for _, weight in weighed])
    domains = []
    for name, (file, weight) in zip(name_domains([file for file, _ in weighed]), weighed, strict=True):
        train, held_out = read_other(file, task, tuning.seed, columns)
        domains.append(Domain(name, weight, check_labels(data, train), check_labels(data, held_out)))
    return domains


def read_other(file: Path, task: str, seed: int, columns: dict[str, Any]) -> tuple[Labelled, Labelled]:
    """Return the training and the held-out data of another file than the main one: FILE, or FILE:SPLIT."""
    path, split = find_split(file)
    try:
        return read_data(path, None, task, split, seed, {**columns, "header": columns["header"] or not is_table(path)})
    except InputError as error:
        if error.fix.startswith("--split"):  # which is that of the main file
            error.fix = f"write {path}:NAME" + error.fix.removeprefix("--split NAME").replace("NAME", f"{path}:NAME", 1)
        raise


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

    Copies of an example stay on one side. Of a few plain texts each gives its own last part.
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
    names = data.references if single else [None] * len(data)
    numbers = draw(seed, 0, len(data), stream=HELD_STREAM).tolist()
    copies: dict[str, list[int]] = {}
    for place in sorted(range(len(data)), key=numbers.__getitem__):
        copies.setdefault(repr(data.examples[place]), []).append(place)
    groups: dict[Any, list[list[int]]] = {}
    for unit in copies.values():
        groups.setdefault(names[unit[0]], []).append(unit)
    if all(len(units) == 1 for units in groups.values()):  # nothing but copies: they are on both sides, and said to be
        groups = {name: [[i] for unit in units for i in unit] for name, units in groups.items()}
    left, places = Counter(names), set[int]()
    for name, share in allot(groups, len(data)).items():
        taken = 0
        for unit in [one for one in groups[name] if len(one) <= share] or [min(groups[name], key=len)]:
            lost = Counter(names[i] for i in unit)
            fits = taken < share and (taken == 0 or taken + len(unit) <= share)
            if fits and all(left[one] > times for one, times in lost.items()):  # never a label's last row
                places.update(unit)
                left.subtract(lost)
                taken += len(unit)
    if not places and len(copies) > 1:  # one row of each label, say
        places.update(list(copies.values())[-1])
    if not places:
        raise InputError("one example cannot be trained on and held out", where=data.where,
                         fix="give more examples; in a CoNLL file a blank line ends each sentence")  # fmt: skip
    held_out = take(data, sorted(places))
    if lacking := set(names) - {names[i] for i in places}:
        note = f"{len(lacking)} of {counted(len(set(names)), 'label')} have no held-out example: too few rows."
        held_out = replace(held_out, notes=(*data.notes, note))
    return take(data, [i for i in range(len(data)) if i not in places]), held_out


def allot(groups: Mapping[Any, Sequence[Sequence[int]]], count: int) -> dict[Any, int]:
    """Return how many rows of each group to hold out: a tenth, rounded.

    Where groups are too small for one, what a tenth of all lacks comes from the largest remainders; half a group stays.
    """
    sizes = {name: sum(map(len, units)) for name, units in groups.items()}
    most = {name: sizes[name] // 2 if len(units) > 1 else 0 for name, units in groups.items()}
    shares = {name: min(round(HELD_OUT * size), most[name]) for name, size in sizes.items()}
    missing = 0 if all(shares.values()) else max(1, round(HELD_OUT * count)) - sum(shares.values())
    while missing > 0 and (able := [name for name in groups if shares[name] < most[name]]):
        for name in sorted(able, key=lambda name: shares[name] - HELD_OUT * sizes[name])[:missing]:
            shares[name] += 1
            missing -= 1
    return shares


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
