"""Clean a corpus of any size: named steps, a choice of languages, duplicates; each with what it did.

Documents are read one at a time, cleaned in batches by worker processes, and written in their order. Where duplicates
are looked for, cleaned documents wait on the disk beside the output until all are known.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.base.files import STAGED, new_file, write_text
from lmworks.base.knobs import check_useful
from lmworks.base.pool import map_batches, show_progress
from lmworks.base.report import Report, Table, counted
from lmworks.text.clean import DEFAULT_STEPS, STEPS, choose_steps
from lmworks.text.duplicates import Fingerprints, key, sign
from lmworks.text.language import check_languages, identify
from lmworks.text.open import STDIN, plain_ending
from lmworks.text.stream import Record, Unit, cut, list_files, make_batches, stream_documents, total_bytes
from lmworks.text.write import check_ending, open_packed, to_bytes

Dedup = Literal["exact", "near"]
CHANGES = ("documents", "gone", "came")
THRESHOLD = 0.8  # Jaccard similarity of near duplicates


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done to each document: the steps in order, the choice, what tells duplicates, and how it is written."""

    steps: tuple[str, ...]
    languages: tuple[str, ...] = ()
    among: tuple[str, ...] = ()
    min_chars: int = 1
    exact: bool = False
    near: bool = False
    ending: str = ".jsonl"
    unit: Unit = "file"


@dataclass
class Tally:
    """What was done so far: documents and characters, by step, by reason, by language and encoding."""

    read: Counter[str] = field(default_factory=Counter)  # documents, characters
    written: Counter[str] = field(default_factory=Counter)
    steps: Counter[tuple[str, str]] = field(default_factory=Counter)  # (step, one of CHANGES)
    removed: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    encodings: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Count what another tally counted."""
        for name, counts in vars(self).items():
            counts.update(vars(other)[name])


@dataclass(frozen=True)
class Done:
    """A batch after cleaning: the documents to write, and what tells duplicates."""

    records: list[bytes]
    lengths: list[int]
    keys: NDArray[np.uint64] | None
    signatures: NDArray[np.uint16] | None
    tally: Tally


def clean(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    steps: str = DEFAULT_STEPS,
    dedup: Dedup | None = None,
    threshold: float = THRESHOLD,
    language: str = "",
    among: str = "",
    min_chars: int = 1,
    column: str | None = None,
    unit: Unit = "file",
    encoding: str | None = None,
    stdin: str = "txt",
    workers: int = 1,
    report: str | Path | None = None,
    overwrite: bool = False,
) -> Report:
    """Clean files, folders and standard input ("-") into one .jsonl or .txt file (also .zst, .gz); whole or absent.

    `steps` are names in order, with commas between them. `language` keeps the documents in these languages, `among`
    says which there can be at all. `report` is an HTML page to write. Raises InputError for what cannot be used.
    """
    out, started = Path(out), time.perf_counter()
    files = list_files([Path(path) for path in paths])
    check(out, files, threshold, overwrite)
    if min_chars < 0:
        raise InputError("no text is that short", found=f"--min-chars {min_chars}", expected="0 or more")
    plan = Plan(
        steps=choose_steps(parse_names(steps)),
        languages=parse_names(language.lower()),
        among=parse_names(among.lower()),
        min_chars=max(1, min_chars),
        exact=dedup is not None,
        near=dedup == "near",
        ending=plain_ending(out),
        unit=unit,
    )
    named = set(plan.languages) - {"und"}
    strange = sorted(named - set(plan.among)) if plan.among else []
    check_useful({
        "--threshold is for near duplicates": (dedup != "near" and threshold != THRESHOLD, "no --dedup near"),
        "--stdin is for standard input": (stdin != "txt" and STDIN not in dict(files), "no - among the files"),
        "--language keeps what --among rules out": (bool(strange), ", ".join(strange)),
    })  # fmt: skip
    if named:
        check_languages(sorted(named))
    total = Tally()
    with show_progress("cleaning", total_bytes(files)) as tell:
        documents = stream_documents(
            files, column=column, encoding=encoding, stdin_ending=f".{stdin.lstrip('.')}", tell=tell
        )
        batches = map_batches(partial(clean_batch, plan), make_batches(documents), workers=workers)
        with closing(batches), new_file(out) as staged:
            packed = out.suffix.lower()
            if dedup is None:
                with open_packed(staged, packed) as file:
                    for done in batches:
                        file.write(b"".join(done.records))
                        total.add(done.tally)
            else:
                with open_packed(staged, packed) as file:
                    write_new(file, batches, staged, threshold if plan.near else None, total)
            if not total.written["documents"]:
                raise nothing_left(total, [name for _, name in files])
    found = make_report(total, plan, out, threshold, workers, time.perf_counter() - started)
    if report is not None:
        write_text(report, found.to_html())
    return found


def check(out: Path, files: Sequence[tuple[Path, str]], threshold: float, overwrite: bool) -> None:
    """Raise InputError for an output that cannot be, or a threshold out of range."""
    check_ending(out)
    if any(path.exists() and path.resolve() == out.resolve() for path, _ in files):
        raise InputError("the output is one of the inputs", found=str(out), fix="choose another -o")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists already", fix="add --overwrite to replace it, or choose another -o")
    if not 0 < threshold <= 1:
        raise InputError("the similarity of duplicates is out of range", found=str(threshold), expected="above 0, to 1")


def parse_names(text: str) -> tuple[str, ...]:
    """Return the names of a list: "a, b" -> ("a", "b")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def clean_batch(plan: Plan, batch: Sequence[Record]) -> Done:
    """Clean some documents, and count what was done."""
    tally, records, texts, lengths = Tally(), [], [], []
    for document in cut_batch(plan, batch, tally):
        tally.read["documents"] += 1
        tally.encodings[document.encoding] += 1
        text = take_steps(document.text, plan.steps, tally)
        code = identify(text, plan.among) if plan.languages or plan.among else ""
        tally.languages.update([code] if code else [])
        reason = why_removed(text, code, plan)
        if reason:
            tally.removed[reason] += 1
            continue
        texts.append(text)
        lengths.append(len(text))
        extra = {"language": code} if code else {}
        records.append(to_bytes(document, text, plan.ending, unit=plan.unit, extra=extra))
    tally.written.update(documents=len(records), characters=sum(lengths))
    keys = np.array([key(text) for text in texts], np.uint64) if plan.exact else None
    return Done(records, lengths, keys, sign(texts) if plan.near else None, tally)


def cut_batch(plan: Plan, batch: Sequence[Record], tally: Tally) -> Iterator[Record]:
    """Yield the documents of some files; a book's boilerplate can only be told before it is cut."""
    for document in batch:
        tally.read["characters"] += len(document.text)
        if plan.unit != "file" and "boilerplate" in plan.steps:
            text = take_steps(document.text, ("boilerplate",), tally)
            document = replace(document, text=text)
        yield from cut(document, plan.unit)


def take_steps(text: str, steps: Iterable[str], tally: Tally) -> str:
    """Return the text after each step, and count the documents that a step changed, and characters gone and come."""
    for name in steps:
        after = STEPS[name](text)
        if after != text:
            before_counts, after_counts = Counter(text), Counter(after)
            tally.steps[name, "documents"] += 1
            tally.steps[name, "gone"] += (before_counts - after_counts).total()
            tally.steps[name, "came"] += (after_counts - before_counts).total()
            text = after
    return text


def why_removed(text: str, code: str, plan: Plan) -> str:
    """Return why a document is left out, or nothing."""
    if not text.strip():
        return "empty"
    if len(text) < plan.min_chars:
        return "too short"
    return "another language" if plan.languages and code not in plan.languages else ""


def write_new(file: BinaryIO, batches: Iterable[Done], staged: Path, threshold: float | None, total: Tally) -> None:
    """Write the documents that repeat no earlier one, in order; they wait in a folder beside the output."""
    folder = staged.with_name(f"{staged.name.removesuffix(STAGED)}.waiting{STAGED}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with ExitStack() as stack:
            prints = stack.enter_context(Fingerprints(folder, threshold=threshold))
            waiting = stack.enter_context((folder / "documents").open("w+b"))
            sizes = stack.enter_context((folder / "sizes").open("w+b"))
            for done in batches:
                total.add(done.tally)
                assert done.keys is not None
                prints.add(done.keys, done.signatures)
                waiting.writelines(done.records)
                sizes.write(np.array([*zip(map(len, done.records), done.lengths, strict=True)], np.int64).tobytes())
            first = prints.groups()
            total.removed["exact duplicate"] = prints.exact
            total.removed["near duplicate"] = int((first != np.arange(len(first))).sum()) - prints.exact
            waiting.seek(0)
            for place, (size, characters) in enumerate(read_sizes(sizes)):
                record = waiting.read(size)
                if first[place] == place:
                    file.write(record)
                else:
                    total.written.subtract({"documents": 1, "characters": characters})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_sizes(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield (bytes, characters) of each document."""
    file.seek(0)
    while data := file.read(1 << 20):
        yield from map(tuple, np.frombuffer(data, np.int64).reshape(-1, 2).tolist())


def nothing_left(total: Tally, names: Sequence[str]) -> InputError:
    """Return the error for a corpus of which nothing is written."""
    reasons = ", ".join(f"{counted(n, 'document')} {reason}" for reason, n in total.removed.items() if n)
    where = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    if set(total.removed) <= {"empty"}:
        return InputError("there is no text here", where=where, found=reasons or "no documents")
    return InputError("nothing is left after cleaning", where=where, found=reasons, fix="loosen the choice")


def make_report(total: Tally, plan: Plan, out: Path, threshold: float, workers: int, seconds: float) -> Report:
    """Say what was read, changed, removed and written."""
    steps: list[tuple[str | int, ...]] = [(name, *(total.steps[name, what] for what in CHANGES)) for name in plan.steps]
    removed = {reason: number for reason, number in sorted(total.removed.items()) if number or "duplicate" in reason}
    if not plan.near:
        removed.pop("near duplicate", None)
    values: dict[str, Any] = {
        "out": str(out),
        "read": dict(total.read),
        "written": dict(total.written),
        "steps": [dict(zip(("step", *CHANGES), row, strict=True)) for row in steps],
        "removed": removed,
        "encodings": dict(total.encodings.most_common()),
        "languages": dict(total.languages.most_common()),
        "threshold": threshold if plan.near else None,
        "workers": workers,
        "seconds": round(seconds, 3),
    }
    documents, characters = "documents", "characters"
    rows: list[tuple[str, int, int | None]] = [("read", total.read[documents], total.read[characters])]
    rows += [(f"removed: {reason}", number, None) for reason, number in removed.items()]
    rows.append(("written", total.written[documents], total.written[characters]))
    tables = [
        Table("Documents", ("", documents, characters), tuple(rows)),
        Table("Steps, in order", ("step", "documents changed", "characters gone", "characters come"), tuple(steps)),
        Table("Encodings", ("encoding", documents), tuple(total.encodings.most_common())),
    ]
    if total.languages:
        tables.append(Table("Languages", ("language", documents), tuple(total.languages.most_common())))
    notes = []
    if plan.exact and plan.unit == "file" and total.read[documents] < 20:
        notes.append("Duplicates are whole documents; --unit paragraph or line looks within plain text.")
    return Report(f"Cleaned text in {out}", values, tuple(tables), notes=tuple(notes))
