"""Add changed copies of labelled or other texts, for training; never for what a model is judged by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.files import new_file
from lmworks.base.pool import map_batches, show_progress
from lmworks.base.report import Report, Table
from lmworks.text.augment import WAYS, augment
from lmworks.text.open import plain_ending
from lmworks.text.stream import Record, list_files, make_batches, stream_documents, total_bytes
from lmworks.text.write import open_packed, to_bytes
from lmworks.verbs.cleaning import check, parse_names


def augment_corpus(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    copies: int = 1,
    ways: str = "swap,drop,typo",
    share: float = 0.1,
    seed: int = 0,
    column: str | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> Report:
    """Write each document and after it `copies` changed ones, with its columns and what was done to them ("augmented").

    The ways take turns. A copy that is equal to its text or to an earlier copy is left out. Raises InputError for what
    cannot be used.
    """
    out, chosen = Path(out), parse_names(ways)
    wrong = next((way for way in chosen if way not in WAYS), None)
    if wrong is not None or not chosen:
        fix = did_you_mean(wrong or "", WAYS).strip()
        raise InputError(f'there is no way "{wrong or ""}" to augment', expected=", ".join(WAYS), fix=fix)
    if copies < 1 or not 0 < share <= 1:
        raise InputError(
            "nothing would change", found=f"{copies} copies, a share of {share}", expected="1 or more, 0 to 1"
        )
    files = list_files([Path(path) for path in paths])
    check(out, files, 1.0, overwrite)
    total: Counter[str] = Counter()
    with show_progress("augmenting", total_bytes(files)) as tell, new_file(out) as staged:
        documents = stream_documents(files, column=column, tell=tell)
        work = partial(augment_batch, chosen, copies, share, seed, plain_ending(out))
        batches = map_batches(work, make_batches(documents), workers=workers)
        with closing(batches), open_packed(staged, out.suffix.lower()) as file:
            for records, counts in batches:
                file.write(b"".join(records))
                total.update(counts)
        if not total["as it was"]:
            raise InputError("there is no text here", where=", ".join(name for _, name in files)[:200])
    rows = tuple((name, total[name]) for name in ("as it was", *chosen))
    return Report(f"Augmented text in {out}", {"out": str(out), "documents": dict(rows), "seed": seed},
                  (Table("Documents", ("", "documents"), rows),))  # fmt: skip


def augment_batch(
    ways: tuple[str, ...], copies: int, share: float, seed: int, ending: str, batch: Sequence[Record]
) -> tuple[list[bytes], Counter[str]]:
    """Return the documents and their copies as they are written, and how many of each kind there are."""
    records: list[bytes] = []
    counts: Counter[str] = Counter()
    for document in batch:
        if not document.text.strip():
            continue
        document = replace(document, row=document.row or {"text": document.text, "source": document.name})
        records.append(to_bytes(document, document.text, ending, extra={"augmented": None}))
        counts["as it was"] += 1
        seen = {document.text}
        for copy in range(copies):
            way = ways[copy % len(ways)]
            text = augment(document.text, way, share=share, seed=f"{seed} {copy}")
            if text not in seen:
                seen.add(text)
                counts[way] += 1
                records.append(to_bytes(document, text, ending, extra={"augmented": way}))
    return records, counts
