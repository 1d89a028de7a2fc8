"""Share a corpus out into train, validation and test files: seeded, by label if asked, near duplicates on one side."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.files import new_folder, write_json, write_text
from lmworks.base.pool import map_batches, show_progress
from lmworks.base.report import Report, Table, counted
from lmworks.text.duplicates import Fingerprints, key, sign
from lmworks.text.open import is_once
from lmworks.text.read import find_column
from lmworks.text.split import share_out
from lmworks.text.stream import Record, Unit, cut, list_files, make_batches, stream_documents, total_bytes
from lmworks.text.write import to_bytes
from lmworks.verbs.cleaning import THRESHOLD, parse_names

NAMES = {2: ("train", "validation"), 3: ("train", "validation", "test")}
RECEIPT = "split.json"


@dataclass(frozen=True)
class Prints:
    """A batch of documents: what tells duplicates, and the labels."""

    keys: NDArray[np.uint64]
    signatures: NDArray[np.uint16]
    labels: list[str]


def split(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    shares: str = "0.8,0.1,0.1",
    seed: int = 0,
    stratify: str | None = None,
    threshold: float = THRESHOLD,
    column: str | None = None,
    unit: Unit = "file",
    encoding: str | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> Report:
    """Write `out`/train.jsonl, validation.jsonl and test.jsonl (two shares: no test); the folder is whole or absent.

    Documents that are alike by `threshold` come into one file. `stratify` is a column whose values are shared out
    alike. About 40 bytes a document are held. Raises InputError for what cannot be used.
    """
    out, wanted = Path(out), parse_shares(shares)
    files = list_files([Path(path) for path in paths])
    if any(is_once(path) for path, _ in files):
        raise InputError("standard input and pipes can be read only once", fix="write a file, which is read twice")
    check(out, overwrite)
    read = partial(stream_documents, files, column=column, encoding=encoding)
    with new_folder(out) as staged:
        with show_progress("comparing", total_bytes(files)) as tell, TemporaryDirectory(dir=staged) as scratch:
            batches = map_batches(partial(fingerprint, unit, stratify), make_batches(read(tell=tell)), workers=workers)
            with closing(batches), Fingerprints(Path(scratch), threshold=threshold) as prints:
                labels: dict[str, int] = {}
                numbers, keys = [], []
                for batch in batches:
                    prints.add(batch.keys, batch.signatures)
                    keys.append(batch.keys)
                    strata = [labels.setdefault(label, len(labels)) for label in batch.labels]
                    numbers.append(np.array(strata, np.int64))
                if not prints.count:
                    raise InputError("there is no text here", where=", ".join(name for _, name in files)[:200])
                groups = prints.groups()
        places = share_out(groups, np.concatenate(keys), np.concatenate(numbers), wanted, seed=seed)
        names = NAMES[len(wanted)]
        if len(set(places.tolist())) < len(wanted):
            many = f"{counted(len(groups), 'document')}, {len(set(groups.tolist())):,} that are not near duplicates"
            raise InputError(
                "a share would be empty", found=many, fix="give more documents, or --unit paragraph or line"
            )
        tables = write_shares(staged, read(), places, names, unit, stratify)
        found = report(out, groups, places, names, tables, wanted, seed, stratify, threshold)
        write_json(staged / RECEIPT, found.to_dict())
        write_text(staged / "report.html", found.to_html())
    return found


def parse_shares(text: str) -> list[float]:
    """Return two or three numbers that add up to 1."""
    try:
        shares = [float(part) for part in parse_names(text)]
    except ValueError:
        shares = []
    if len(shares) not in NAMES or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise InputError("these are no shares", found=text, expected="two or three parts of 1, such as 0.8,0.1,0.1")
    return shares


def check(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something else, or a split that is not to be replaced."""
    if out.exists() and not out.is_dir():
        raise InputError(f"cannot write to {out}", found="a file", expected="a folder", fix="choose another -o")
    if out.exists() and any(out.iterdir()):
        if not (out / RECEIPT).exists():
            raise InputError(f"{out} holds files that lmworks did not write", fix="choose another -o")
        if not overwrite:
            raise InputError(f"{out} holds a split already", fix="add --overwrite to replace it, or choose another -o")


def fingerprint(unit: Unit, stratify: str | None, batch: Sequence[Record]) -> Prints:
    """Return what tells duplicates among some documents, and their labels."""
    documents = [document for whole in batch for document in cut(whole, unit)]
    labels = [label_of(document, stratify) for document in documents]
    texts = [document.text for document in documents]
    return Prints(np.array([key(text) for text in texts], np.uint64), sign(texts), labels)


def label_of(document: Record, stratify: str | None) -> str:
    """Return the value that is to be shared out alike; "" where none is."""
    if stratify is None:
        return ""
    names = list(document.row or {})
    at = find_column(names, stratify)
    if at is None or document.row is None:
        raise InputError(
            f'no column "{stratify}" to share out by',
            where=document.name,
            found="columns " + ", ".join(names) if names else "plain text",
            fix=did_you_mean(stratify, names).strip(),
        )
    return str(document.row[names[at]])


def write_shares(
    folder: Path, documents: Any, places: NDArray[np.int8], names: Sequence[str], unit: Unit, stratify: str | None
) -> list[Counter[str]]:
    """Write each document into the file of its share; return the labels of each."""
    counts: list[Counter[str]] = [Counter() for _ in names]
    with ExitStack() as stack:
        written = [stack.enter_context((folder / f"{name}.jsonl").open("wb")) for name in names]
        rest = iter(places.tolist())
        for one in (part for whole in documents for part in cut(whole, unit)):
            if (place := next(rest, None)) is None:
                raise changed()
            written[place].write(to_bytes(one, one.text, ".jsonl", extra={}))
            counts[place][label_of(one, stratify)] += 1
    if next(rest, None) is not None:
        raise changed()
    return counts


def changed() -> InputError:
    """Say that the second reading found other documents than the first."""
    return InputError("the files changed while they were split", fix="wait until nobody writes to them, and try again")


def report(
    out: Path,
    groups: NDArray[np.int64],
    places: NDArray[np.int8],
    names: Sequence[str],
    counts: Sequence[Counter[str]],
    shares: Sequence[float],
    seed: int,
    stratify: str | None,
    threshold: float,
) -> Report:
    """Say how many documents each share has, of each label, and how many were held together."""
    sizes = [int((places == i).sum()) for i in range(len(names))]
    together = int((np.bincount(groups)[groups] > 1).sum())
    values = {
        "out": str(out),
        "documents": dict(zip(names, sizes, strict=True)),
        "groups": len(set(groups.tolist())),
        "documents_with_near_duplicates": together,
        "seed": seed,
        "threshold": threshold,
        "labels": {name: dict(sorted(c.items())) for name, c in zip(names, counts, strict=True)} if stratify else {},
    }
    rows = [(n, size, size / len(places), share) for n, size, share in zip(names, sizes, shares, strict=True)]
    tables = [Table("Documents", ("", "documents", "share", "wanted"), tuple(rows))]
    if stratify:
        labels = sorted(set().union(*counts))
        tables.append(
            Table(f"By {stratify}", (stratify, *names), tuple((label, *(c[label] for c in counts)) for label in labels))
        )
    note = f"{counted(together, 'document')} with near duplicates (similarity {threshold}) stay with them on one side."
    return Report(f"Split in {out}", json.loads(json.dumps(values)), tuple(tables), notes=(note,))
