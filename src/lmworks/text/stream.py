"""Documents one at a time from files, folders and standard input, of any size, in flat memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO

from lmworks.base.errors import InputError
from lmworks.text.open import STDIN, is_once, missing
from lmworks.text.read import READERS, Document, Part, describe, find_files, open_parts

Unit = Literal["file", "paragraph", "line"]
LONGEST_PART = 1 << 22  # characters of plain text: a longer file, paragraph or line is cut, best between paragraphs
BATCH_TEXT, BATCH_DOCUMENTS = 1 << 19, 2000  # characters, documents
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


@dataclass(frozen=True)
class Record(Document):
    """A document with the row of the table that it comes from, and the column that holds its text."""

    row: dict[str, Any] | None = None
    column: str = "text"


def list_files(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return each file below the paths with the name to report it by; InputError where there is none."""
    found: list[tuple[Path, str]] = []
    for path in paths:
        if path == STDIN:
            found.append((path, "stdin"))
        elif path.is_dir():
            files = [(file, file.relative_to(path).as_posix()) for file in find_files(path)]
            if not files:
                raise InputError(
                    "no text files here", where=str(path), found=describe(path), expected=", ".join(sorted(READERS))
                )
            found += files
        elif path.exists():
            found.append((path, path.name))
        else:
            raise missing(path)
    return found


def total_bytes(files: Iterable[tuple[Path, str]]) -> int | None:
    """Return the bytes of all files on the disk; None where standard input or a pipe is among them."""
    paths = [path for path, _ in files]
    return None if any(map(is_once, paths)) else sum(path.stat().st_size for path in paths)


def stream_documents(
    files: Iterable[tuple[Path, str]],
    *,
    column: str | None = None,
    encoding: str | None = None,
    stdin_ending: str = ".txt",
    tell: Callable[[int], None] | None = None,
) -> Iterator[Record]:
    """Yield the documents of the files in order, as `read_documents` does, but hold one at a time.

    Plain text that is longer than LONGEST_PART is cut into parts. `tell` hears how many bytes were read.
    """
    for path, name in files:
        ending = stdin_ending if path == STDIN else None
        parts, found = open_parts(path, column, plain=read_parts, ending=ending, encoding=encoding, tell=tell)
        for part in parts:
            yield Record(name + part.suffix, part.text, found, part.row, part.column)


def read_parts(stream: TextIO, path: Path, column: str | None) -> Iterator[Part]:
    """Yield a plain text, in numbered parts where it is long."""
    parts = cut_long(stream)
    first, second = next(parts), next(parts, None)
    if second is None:
        yield Part("", first)
        return
    yield from (Part(f":{number}", text) for number, text in enumerate(chain([first, second], parts), 1))


def cut(document: Record, unit: Unit) -> list[Record]:
    """Return a plain text or page as documents: as it is, its paragraphs or its lines, without blank ones."""
    if unit == "file" or document.row is not None:
        return [document]
    whole = re.sub("\r\n?", "\n", document.text)  # an old Macintosh ends its lines in \r
    texts = BLANK_LINES.split(whole) if unit == "paragraph" else whole.split("\n")
    kept = [text.strip("\r\n") for text in texts if text.strip()]
    return [replace(document, name=f"{document.name}:{i}", text=text) for i, text in enumerate(kept, 1)]


def cut_long(stream: TextIO) -> Iterator[str]:
    """Yield a text in parts of at most LONGEST_PART characters, cut after a blank line, a line or a word."""
    held = stream.read(LONGEST_PART)
    while more := stream.read(max(1, LONGEST_PART - len(held)) if len(held) < LONGEST_PART else 1):
        if len(held) < LONGEST_PART:
            held += more
            continue
        end = next((at + len(mark) for mark in ("\n\n", "\n", " ") if (at := held.rfind(mark)) > len(held) // 2), 0)
        end = end or len(held)
        yield held[:end]
        held = held[end:] + more
    yield held


def make_batches(documents: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield the documents in batches of some hundred thousand characters, in order."""
    batch: list[Record] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_TEXT or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
