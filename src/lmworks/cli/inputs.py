"""Where a verb's texts come from: arguments, a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.base.errors import InputError

Texts = Annotated[tuple[str, ...], Parameter(help="Texts; none: --file, or standard input, one text a line.")]
File = Annotated[
    Path | None, Parameter(help="Read the texts from a file: one a line, or the rows of a csv, tsv or jsonl.")
]
Column = Annotated[str | None, Parameter(help="The column of csv, tsv or jsonl that holds the text.")]


def read_texts(texts: tuple[str, ...], file: Path | None, column: str | None) -> tuple[list[str], bool]:
    """Return the texts and whether they are one text that was given as an argument."""
    if texts and file is not None:
        raise InputError("texts were given twice", found="arguments and --file", fix="leave one of them out")
    if texts:
        return list(texts), len(texts) == 1
    if file is not None:
        return read_lines(file, column), False
    if sys.stdin.isatty():
        raise InputError(
            "no text", fix="give it as an argument, with --file, or on standard input: lmworks … < texts.txt"
        )
    found = [line for line in sys.stdin.read().split("\n") if line.strip()]
    if not found:
        raise InputError("no text", where="standard input", expected="one text a line")
    return found, False


def read_lines(file: Path, column: str | None) -> list[str]:
    """Return the lines of a plain file that are not blank, or the rows of a table."""
    from lmworks.text.read import read_documents

    documents = read_documents(file, column=column)
    if file.suffix.lower() in {".csv", ".tsv", ".jsonl"}:
        return [document.text for document in documents]
    found = [line for document in documents for line in document.text.splitlines() if line.strip()]
    if not found:
        raise InputError("no text", where=str(file), expected="one text a line")
    return found
