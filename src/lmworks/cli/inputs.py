"""Where a verb's texts come from: arguments, a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.base.errors import InputError

File = Annotated[
    Path | None, Parameter(help="Read the texts from a file: one a line, or the rows of a csv, tsv or jsonl.")
]
TABLES = {".csv", ".tsv", ".jsonl"}
Column = Annotated[str | None, Parameter(help="The column of csv, tsv or jsonl that holds the text.")]


def read_texts(texts: tuple[str, ...], file: Path | None, column: str | None) -> tuple[list[str], bool]:
    """Return the texts and whether they are one text that was given as an argument."""
    if texts and file is not None:
        raise InputError("texts were given twice", found="arguments and --file", fix="leave one of them out")
    if texts:
        return [mend(text) for text in texts], len(texts) == 1
    if file is not None:
        return read_lines(file, column), False
    return drop_blank(split_lines(read_stdin()), "standard input"), False


def read_lines(file: Path, column: str | None, *, blank: bool = False) -> list[str]:
    """Return the lines of a plain file, or the rows of a table; blank lines only where `blank` asks for them."""
    from lmworks.text.read import read_documents

    if file.exists() and not file.is_file() and not file.is_dir():  # a pipe, as <(command) makes one
        lines = split_lines(decode_text(file.read_bytes(), str(file)))
    else:
        documents = read_documents(file, column=column)
        if file.suffix.lower() in TABLES:
            return [document.text for document in documents]
        lines = [line for document in documents for line in split_lines(document.text)]
    return lines if blank else drop_blank(lines, str(file))


def read_whole(file: Path) -> str:
    """Return all of a file's text."""
    from lmworks.text.read import read_documents

    if file.exists() and not file.is_file() and not file.is_dir():
        return decode_text(file.read_bytes(), str(file))
    return "\n".join(document.text for document in read_documents(file))


def read_stdin() -> str:
    """Return all of standard input, decoded as files are; a terminal is an InputError, as nobody would end it."""
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("no text", fix="give it as an argument, with --file, or on standard input: … < texts.txt")
    source = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if source is None else decode_text(source.read(), "standard input")


def decode_text(data: bytes, name: str) -> str:
    """Return bytes as text: byte order mark, UTF-8, or detection."""
    from lmworks.text.decode import decode

    return decode(data, name)[0]


def split_lines(text: str) -> list[str]:
    """Return the lines of a text, whatever ends them on any system; a last empty one is none."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def drop_blank(lines: list[str], where: str) -> list[str]:
    """Return the lines that hold something; none at all is an InputError."""
    found = [line for line in lines if line.strip()]
    if not found:
        raise InputError("no text", where=where, expected="one text a line")
    return found


def mend(argument: str) -> str:
    """Return an argument with U+FFFD for bytes that are no text."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
