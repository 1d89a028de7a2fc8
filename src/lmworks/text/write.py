"""Write documents as .jsonl or .txt, packed or not, one after the other."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any, BinaryIO, cast

from lmworks.base.errors import InputError
from lmworks.base.optional import require
from lmworks.text.clean import mend_surrogates
from lmworks.text.open import PACKED, plain_ending
from lmworks.text.stream import Record, Unit

WRITTEN = (".jsonl", ".txt")


def check_ending(out: Path) -> None:
    """Raise InputError unless the name says how to write."""
    if out.is_dir():
        raise InputError(f"cannot write to {out}", found="a folder", expected="the name of a file", fix="-o OUT.jsonl")
    if plain_ending(out) not in WRITTEN:
        raise InputError(
            f"{out.name} does not say how to write",
            expected="a name that ends in .jsonl or .txt, and maybe .zst or .gz",
            fix="-o corpus.jsonl",
        )
    if out.suffix.lower() == ".zst":
        require("zstandard", extra="data")


def open_packed(path: Path, ending: str) -> BinaryIO:
    """Open a file to write to, packed as the ending says (".zst", ".gz"); the same bytes for the same text."""
    if ending not in PACKED:
        return path.open("wb")
    if ending == ".gz":
        raw = path.open("wb", buffering=0)
        packed = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0)
        packed.myfileobj = raw  # to be closed with it
        return cast(BinaryIO, packed)
    library = require("zstandard", extra="data")
    return cast(BinaryIO, library.ZstdCompressor(level=9).stream_writer(path.open("wb")))


def to_bytes(document: Record, text: str, ending: str, *, unit: Unit = "file", extra: dict[str, Any]) -> bytes:
    """Return a document as a line of JSON with the columns it had, or as text and a blank line (a line end by line)."""
    text = mend_surrogates(text)
    if ending == ".txt":
        end = "\n" if unit == "line" else "\n\n"
        return (text.strip("\r\n") + end).encode("utf-8")
    row = {"text": text, "source": document.name}
    if document.row is not None:
        row = {**document.row, document.column: text}
    try:
        line = json.dumps({**row, **extra}, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        line = json.dumps(finite({**row, **extra}), ensure_ascii=False, default=str)
    return (mend_surrogates(line) + "\n").encode("utf-8")


def finite(value: Any) -> Any:
    """Return a value of a row with null for what is no number, or infinite: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
