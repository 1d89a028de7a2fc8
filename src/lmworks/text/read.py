"""Read documents from a file or a folder: txt, md, html, csv, tsv, jsonl, parquet, in any encoding, also .gz and .zst.

A text file or page is one document; a table has one document a row, from the column that is asked for.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from lmworks.base.errors import InputError, did_you_mean, from_os_error
from lmworks.base.optional import require
from lmworks.text.html import main_text
from lmworks.text.open import STDIN, WHOLE, missing, open_text, plain_ending, read_lines

DEFAULT_COLUMN = "text"
ROWS = 256  # of a parquet file that are held at a time, beside what its writer packed together
QUOTED = re.compile('"(?:[^"]|"")*"')
ELSEWHERE = {  # formats that a text folder often holds: how to bring them here
    ".json": "write it as .jsonl, one object a line",
    ".zip": "unpack it",
    ".pdf": "export it as plain text",
    ".docx": "export it as plain text",
    ".epub": "export it as .html or plain text",
}


@dataclass(frozen=True)
class Document:
    """One text, where it comes from, and the encoding it was in."""

    name: str
    text: str
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Part:
    """A text of a file, what to add to the file's name for it, and the row and column it comes from."""

    suffix: str
    text: str
    row: dict[str, Any] | None = None
    column: str = DEFAULT_COLUMN


def read_documents(path: str | Path, *, column: str | None = None) -> list[Document]:
    """Return the documents of a file, or of every readable file below a folder, in sorted order.

    `column` names the text column of csv, tsv and jsonl, or gives its number from 1 where a table has no header;
    without it the column called "text" is taken. Raises InputError that names the file for anything that holds no text.
    """
    path = Path(path)
    if path.is_dir():
        files = list(find_files(path))
        if not files:
            raise InputError(
                "no text files here", where=str(path), found=describe(path), expected=", ".join(sorted(READERS))
            )
        documents = [document for file in files for document in read_file(file, column, file.relative_to(path))]
    elif path.is_file():
        documents = list(read_file(path, column, Path(path.name)))
    else:
        raise missing(path)
    if not any(document.text.strip() for document in documents):
        raise InputError(
            "there is no text here", where=str(path), found="nothing but blanks" if documents else "nothing"
        )
    return documents


def find_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a known kind below a folder, hidden ones and links to folders left out."""
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            if not name.startswith(".") and plain_ending(path) in READERS and path.is_file():
                yield path


def refuse(error: OSError) -> None:
    """Turn a folder that cannot be listed into an error instead of leaving it out."""
    raise from_os_error(error, "this folder cannot be read") from None


def describe(folder: Path) -> str:
    """Return what a folder without text files holds: "nothing", or the endings of its files with a hint."""
    endings = sorted({p.suffix.lower() or p.name for p in folder.rglob("*") if p.is_file()})
    hints = [f"{ending}: {ELSEWHERE[ending]}" for ending in endings if ending in ELSEWHERE]
    return "; ".join([", ".join(endings[:8]), *hints]) if endings else "nothing"


def read_file(path: Path, column: str | None, name: Path) -> Iterator[Document]:
    """Yield the documents of one file, read by its ending; an ending that says nothing is read as plain text."""
    parts, encoding = open_parts(path, column)
    for part in parts:
        yield Document(name.as_posix() + part.suffix, part.text, encoding)


def open_parts(
    path: Path,
    column: str | None = None,
    *,
    plain: Reader | None = None,
    ending: str | None = None,
    encoding: str | None = None,
    tell: Callable[[int], None] | None = None,
) -> tuple[Iterator[Part], str]:
    """Return the texts of one file or standard input ("-"), one at a time, and the encoding they were in.

    `plain` reads plain text (as one document by default); `ending` says what the file holds where its name does not.
    """
    ending = plain_ending(path) if ending is None else ending
    if ending in ELSEWHERE:
        raise InputError(f"{ending} files are not read", where=str(path), fix=ELSEWHERE[ending])
    if ending == ".parquet":
        return read_parquet(path, column, tell), "utf-8"
    stream, encoding = open_text(path, encoding=encoding, tell=tell)
    reader = READERS.get(ending, read_plain)
    reader = plain if plain is not None and reader is read_plain else reader
    named = Path(f"stdin{ending}") if path == STDIN else path  # a table's ending says what parts its fields
    return guard(reader(stream, named, column), stream, str(named), encoding), encoding


def guard(parts: Iterator[Part], stream: TextIO, name: str, encoding: str) -> Iterator[Part]:
    """Yield the texts and close the file; bytes that are not in its encoding after all are an InputError."""
    with stream:
        try:
            yield from parts
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name} does not go on as {encoding}, as it begins",
                found=f"{error.object[error.start : error.start + 4]!r}",
                fix="name its --encoding, or convert it: iconv -f OLD -t UTF-8",
            ) from None


def read_plain(stream: TextIO, path: Path, column: str | None) -> Iterator[Part]:
    """Yield the whole file as one document."""
    yield Part("", stream.read())


def read_html(stream: TextIO, path: Path, column: str | None) -> Iterator[Part]:
    """Yield the main text of a page."""
    yield Part("", main_text(stream.read()))


def read_parquet(path: Path, column: str | None, tell: Callable[[int], None] | None = None) -> Iterator[Part]:
    """Yield one document a row of a parquet file; a null is no document."""
    for number, row in enumerate(parquet_rows(path), 1):
        names = list(row)
        name = names[choose_column(names, column, str(path))]
        if row[name] is not None:
            yield Part(f":{number}", as_text(row[name], f"{path}, row {number}"), row, name)
    if tell is not None:
        tell(path.stat().st_size)


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file, of which some are held at a time; needs the [data] extra."""
    library = require("pyarrow.parquet", extra="data")
    try:
        with library.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=ROWS):
                yield from batch.to_pylist()
    except OSError as error:
        raise from_os_error(error, "this file cannot be read") from None
    except ValueError as error:  # as pyarrow's errors are
        raise InputError("this is no parquet file", where=str(path), found=str(error)[:200]) from None


def as_text(value: Any, where: str) -> str:
    """Return the value of a text column; anything but a string is an InputError."""
    if not isinstance(value, str):
        raise InputError("the text column does not hold text", where=where, found=type(value).__name__)
    return value


def read_table(stream: TextIO, path: Path, column: str | None) -> Iterator[Part]:
    """Yield one document a row of a csv or tsv file."""
    csv.field_size_limit(2**31 - 1)
    rows = iter(parse_table(stream, path))
    _, first = next(rows, (0, []))
    if not first:
        return
    names = names_without_header(first, path, column) or first
    check_names(names, str(path), "--column NUMBER if the first row is data")
    at = choose_column(names, column, str(path))
    for line, row in rows if names is first else chain([(1, first)], rows):
        if len(row) > len(names):
            raise InputError(
                "a row has more fields than the first one",
                where=f"{path}, line {line}",
                found=f"{len(row)} fields",
                expected=f"{len(names)}",
                fix='put text that holds a separator in "quotes", or give a .txt or .jsonl file',
            )
        if at >= len(row):
            raise InputError(
                f'a row ends before the column "{names[at]}"',
                where=f"{path}, line {line}",
                found=f"{len(row)} fields",
                expected=f"{len(names)}",
                fix="add what is missing, or take the line out",
            )
        yield Part(f":{line}", row[at], dict(zip(names, row, strict=False)), names[at])


def check_names(names: Sequence[str], where: str, other: str) -> None:
    """Raise InputError where two columns have the same name; those without one do not count."""
    twice = next((name for i, name in enumerate(names) if name.strip() and name in names[:i]), None)
    if twice is not None:
        fix = f'call one "{twice}" otherwise, or {other}'
        raise InputError("two columns have the same name", where=where, found=", ".join(names), fix=fix)


def parse_table(stream: TextIO, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, fields); tsv is taken literally if every line has as many tabs, so that a lone quote is a quote.

    Of a long tsv the first million lines or so tell.
    """
    separator = "\t"
    lines = read_lines(stream, str(path))
    kind = plain_ending(path)
    if kind == ".csv":
        first = next(lines, "")
        separator = max(",;\t", key=QUOTED.sub("", first).count)
        lines = chain([first], lines)
    elif kind == ".tsv":
        head, size = [], 0
        for line in lines:
            head.append(line)
            size += len(line)
            if size > WHOLE:
                break
        lines = chain(head, lines)
        if len({line.count("\t") for line in head if line.strip("\r\n")}) == 1:
            plain = (line.removesuffix("\n").removesuffix("\r") for line in lines)
            yield from ((i, [unquote(f) for f in line.split("\t")]) for i, line in enumerate(plain, 1) if line)
            return
    reader = csv.reader(end_lines(lines), delimiter=separator, strict=True)
    try:
        line_number = 1
        for row in reader:
            if row:
                yield line_number, row
            line_number = reader.line_num + 1
    except csv.Error as error:
        raise InputError("a row cannot be read", where=f"{path}, line {reader.line_num}", found=str(error)) from None


def end_lines(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines, cut also where an old Macintosh ended them."""
    for line in lines:
        if "\r" in line[:-2]:
            yield from re.split(r"(?<=\r)(?!\n)(?=.)", line, flags=re.DOTALL)
        else:
            yield line


def unquote(field: str) -> str:
    '''Undo a writer's quoting, `"say ""no"""` -> `say "no"`; a sentence that merely is in quotes keeps them.'''
    inner = field[1:-1]
    if field[:1] == field[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return field


def names_without_header(row: Sequence[str], path: Path, column: str | None) -> list[str]:
    """Return names for the columns of a table whose first row is data: what the file's name says, or numbers; else [].

    Tatoeba's sentence pairs are called `NAME-A-B.tsv`, with the columns id_A, A, id_B, B.
    """
    *_, a, b = ["", "", *path.stem.split("-")]
    if a and len(row) == 4 and row[0].isdecimal() and row[2].isdecimal():
        return [f"id_{a}", a, f"id_{b}", b]
    is_number = column is not None and column.isdecimal() and not all(field.isdecimal() for field in row)
    return [str(i) for i in range(1, len(row) + 1)] if is_number else []


def read_jsonl(stream: TextIO, path: Path, column: str | None) -> Iterator[Part]:
    """Yield one document a line, each a JSON object; a null is no document."""
    for number, line in enumerate(read_lines(stream, str(path)), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError("a line is not JSON", where=where, found=str(error)) from None
        if not isinstance(row, dict):
            raise InputError("a line is not a JSON object", where=where, found=type(row).__name__)
        names = list(row)
        name = names[choose_column(names, column, where)]
        if row[name] is not None:
            yield Part(f":{number}", as_text(row[name], where), row, name)


def find_column(names: Sequence[str], wanted: str | None) -> int | None:
    """Return the place of a column; its exact name wins, else case and blanks around it do not matter."""
    name = DEFAULT_COLUMN if wanted is None else wanted
    if name in names:
        return list(names).index(name)
    plain = [n.strip().casefold() for n in names]
    return plain.index(name.strip().casefold()) if name.strip().casefold() in plain else None


def choose_column(names: Sequence[str], wanted: str | None, where: str) -> int:
    """Return the place of a column, or raise InputError that lists what there is."""
    at = find_column(names, wanted)
    if at is not None:
        return at
    raise InputError(
        "which column holds the text?" if wanted is None else f'no column "{wanted}"',
        where=where,
        found="columns " + ", ".join(name if len(name) <= 40 else f"{name[:40]}…" for name in names),
        fix="--column NAME, or --column NUMBER where the table has no header"
        + (f";{did_you_mean(wanted, names)}" if wanted and did_you_mean(wanted, names) else ""),
    )


Reader = Callable[[TextIO, Path, str | None], Iterator[Part]]
READERS: dict[str, Reader] = {
    ".txt": read_plain,
    ".md": read_plain,
    ".html": read_html,
    ".htm": read_html,
    ".csv": read_table,
    ".tsv": read_table,
    ".jsonl": read_jsonl,
    ".parquet": read_plain,  # never called: open_parts knows that it is no text
}
