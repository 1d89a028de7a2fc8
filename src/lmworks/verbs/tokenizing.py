"""`lmworks tokenizer train` and `inspect`: a tokenizer in a folder of its own, and what is inside one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lmworks import __version__
from lmworks.base.errors import InputError
from lmworks.base.files import check_output, new_folder, read_json
from lmworks.base.report import Cell, Report, Table
from lmworks.base.threads import read_memory
from lmworks.export.receipt import write_receipt
from lmworks.text.open import is_once
from lmworks.tokens.look import (
    cut_up,
    find_traps,
    find_unused,
    follow,
    has_byte_fallback,
    list_steps,
    longest_tokens,
    open_tokenizer,
)
from lmworks.tokens.need import estimate_need
from lmworks.tokens.stream import Texts
from lmworks.tokens.tokenizer import USUAL, Tokenizer
from lmworks.tokens.train import Recipe, train_tokenizer

LEARNED = ("bpe", "wordpiece", "unigram")  # kinds that are asked for a size; of the others it is a limit


def train(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    column: str | None = None,
    sample: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Train a tokenizer on the texts of files and folders, cleaned as for `train`, and write it to a new folder.

    Memory does not grow with the texts, but with what is distinct in them; it is estimated first, and more than is free
    is refused. `sample`: a share below 1, or a number of documents. Raises InputError where the texts cannot fill the
    vocabulary.
    """
    plan = (recipe or Recipe()).check()
    check_output(out, overwrite=overwrite)
    texts: Texts = Texts(paths, column=column, sample=sample, seed=seed)
    values: dict[str, Any] = {"out": str(out), **asdict(plan), "special": plan.specials}
    given: Any = texts
    if any(map(is_once, texts.files)):  # which cannot be read again
        given = list(texts)
        size = texts.characters
    else:
        share = sample if sample is not None and sample < 1 else 1.0
        size = round(texts.bytes * share)
    need = estimate_need(plan, given, size)
    values |= {"distinct_pieces_estimate": need.pieces, "memory_bytes_estimate": need.memory}
    free = (read_memory() or (0, 0))[1]
    if dry_run:
        rows: tuple[tuple[Cell, ...], ...] = (
            ("text", f"{size / 1e6:,.1f} MB"),
            ("distinct pieces", f"about {need.pieces:,}"),
            ("memory", f"about {need.memory / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free"),
        )
        return Report("What this training would need", values, tables=(Table("Estimate", ("what", "value"), rows),))
    if free and need.memory > free:
        raise InputError(
            "the training needs more memory than is free", found=f"{free / 1e6:,.0f} MB free",
            expected=f"about {need.memory / 1e6:,.0f} MB", fix="train on a part of the texts: --sample 0.1, say",
        )  # fmt: skip
    tokenizer = train_tokenizer(given, **vars(plan))
    check_filled(plan, tokenizer, texts)
    values |= {
        "vocab_size": tokenizer.vocab_size, "vocab_size_asked": plan.size, "characters": texts.characters,
        "encodings": sorted(texts.encodings), "data_sha256": texts.sha256, "sample": sample, "seed": seed,
        "lossless": tokenizer.is_lossless,
    }  # fmt: skip
    with new_folder(out) as staged:
        tokenizer.save(staged)
        facts = {k: v for k, v in values.items() if k != "out"}
        write_receipt(staged, {"lmworks": __version__, "tokenizer": facts})
    return describe(values, tokenizer)


def check_filled(plan: Recipe, tokenizer: Tokenizer, texts: Texts) -> None:
    """Raise InputError where a vocabulary that is to be learned has fewer tokens than were asked for."""
    if plan.kind in LEARNED and plan.vocab_size is not None and tokenizer.vocab_size < plan.vocab_size:
        fewer = ", or --min-frequency 1" if plan.frequency > 1 else ""
        raise InputError(
            "these texts do not hold so many tokens",
            where=f"{texts.characters:,} characters",
            found=f"--vocab-size {plan.vocab_size}",
            expected=f"at most {tokenizer.vocab_size}",
            fix=f"--vocab-size {tokenizer.vocab_size}{fewer}, or more text",
        )


def describe(values: dict[str, Any], tokenizer: Tokenizer) -> Report:
    """Return the report of a training."""
    rows: tuple[tuple[Cell, ...], ...] = (
        ("kind", values["kind"] + (f" of {values['level']}s" if values["kind"] == "bpe" else "")),
        ("tokens", tokenizer.vocab_size),
        ("special tokens", ", ".join(values["special"])),
        ("characters read", values["characters"]),
        ("encoding", ", ".join(values["encodings"])),
        ("memory, by the estimate", f"{values['memory_bytes_estimate'] / 1e6:,.0f} MB"),
    )
    notes = []
    if tokenizer.vocab_size < values["vocab_size_asked"]:
        what = "words" if values["kind"] == "word" else "characters"
        notes.append(f"The texts have no more {what} that are frequent enough: fewer tokens than were asked for.")
    if not tokenizer.is_lossless:
        notes.append("Not every text comes back from its tokens: lmworks tokenizer compare shows how much is lost.")
    title = f"{values['out']}: a tokenizer of {tokenizer.vocab_size:,} tokens"
    return Report(title, values, tables=(Table("Tokenizer", ("what", "value"), rows),), notes=tuple(notes))


def inspect(source: str | Path, text: str | None = None) -> Report:
    """Look into a tokenizer, or the tokenizer of a model: its steps, tokens and traps, and how it cuts a text.

    Raises InputError for what is no tokenizer.
    """
    tokenizer, folder = open_tokenizer(source)
    rows = read_rows(folder)
    unused, traps, longest = find_unused(tokenizer, rows), find_traps(tokenizer, rows), longest_tokens(tokenizer)
    steps = list_steps(tokenizer)
    added = sorted(tokenizer.backend.get_added_tokens_decoder().items())
    special = {name: id for name in USUAL if (id := tokenizer.find(name)) is not None}
    values: dict[str, Any] = {
        "tokenizer": str(source), "model": steps and next(kind for stage, kind, _ in steps if stage == "model"),
        "vocab_size": tokenizer.vocab_size, "embedding_rows": rows, "lossless": tokenizer.is_lossless,
        "byte_fallback": has_byte_fallback(tokenizer), "model_max_length": tokenizer.model_max_length,
        "special_tokens": {name: {"id": id, "token": tokenizer.token(id)} for name, id in special.items()},
        "added_tokens": [{"id": id, "token": token.content, "special": token.special} for id, token in added],
        "steps": [{"stage": stage, "type": kind, "settings": said} for stage, kind, said in steps],
        "unused": {name: len(found) for name, found in unused.items()},
        "longest_tokens": [{"id": id, "text": found} for id, found in longest], "warnings": traps,
    }  # fmt: skip
    facts: tuple[tuple[Cell, ...], ...] = (
        ("tokens", tokenizer.vocab_size),
        ("rows of the embedding", rows),
        ("every text comes back", "yes" if tokenizer.is_lossless else "no"),
        ("every byte has a token", "yes" if values["byte_fallback"] else "no"),
        ("longest text", tokenizer.model_max_length),
        *((name.replace("_", " "), f"{tokenizer.token(id)} ({id})") for name, id in special.items()),
        ("added tokens", ", ".join(token.content for _, token in added[:12]) + (" …" if len(added) > 12 else "")),
        *((f"unused: {name.replace('_', ' ')}", len(found)) for name, found in unused.items() if found),
    )
    tables = [
        Table("Tokenizer", ("what", "value"), facts),
        Table("Steps", ("stage", "step", "settings"), tuple(steps)),
        Table("Longest tokens", ("id", "text"), tuple((id, visible(found)) for id, found in longest)),
    ]
    if text is not None:
        pieces, (normal, words) = cut_up(tokenizer, text), follow(tokenizer, text)
        back = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False)
        values |= {"text": text, "normalized": normal, "words": words, "tokens": pieces, "round_trip": back == text}
        lines = tuple((p["id"], p["token"], visible(p["text"]), p["start"], p["end"]) for p in pieces)
        tables.insert(0, Table(f"{len(pieces)} tokens", ("id", "token", "text", "from", "to"), lines))
        if normal != text:
            traps = [*traps, f"The text was rewritten first: {visible(normal)}"]
        if back != text:
            traps = [*traps, f"The text does not come back from its tokens: {visible(back)}"]
    return Report(f"The tokenizer of {source}", values, tables=tuple(tables), notes=tuple(traps))


def read_rows(folder: Path) -> int | None:
    """Return the rows of the embedding that a model folder's config.json speaks of, or None."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    rows = config.get("vocab_size")
    return rows if isinstance(rows, int) else None


def visible(text: str) -> str:
    """Return a text with its blanks to be seen: " a\\n" -> "␣a⏎"."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
