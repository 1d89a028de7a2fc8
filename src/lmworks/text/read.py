"""Read documents from a file or a folder: txt, md, html, csv, tsv, jsonl, in any encoding.

A text file is one document; a table has one document a row, from the column that is asked for.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.optional import require

BOMS = (  # longest first: UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
DEFAULT_COLUMN = "text"


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    name: str
    text: str


def read_documents(path: str | Path, *, column: str | None = None) -> list[Document]:
    """Return the documents of a file, or of every readable file below a folder in sorted order.

    `column` names the text column of csv, tsv and jsonl, or gives its number from 1; without it a column called "text" is
    taken. Raises InputError that names the file for anything that holds no text.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file or folder {path}", fix="check the path")
    if path.is_file():
        documents = list(read_file(path, column))
    else:
        files = sorted(
            p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in READERS and not is_hidden(p, path)
        )
        if not files:
            raise InputError(
                "no text files here", where=str(path), found=describe(path), expected=", ".join(sorted(READERS))
            )
        documents = [document for file in files for document in read_file(file, column)]
    if not any(document.text.strip() for document in documents):
        raise InputError("there is no text here", where=str(path), found="only empty files or rows")
    return documents


def read_file(path: Path, column: str | None) -> Iterator[Document]:
    """Yield the documents of one file, read by its extension; an unknown extension is read as plain text."""
    yield from READERS.get(path.suffix.lower(), read_plain)(path, column)


def read_plain(path: Path, column: str | None) -> Iterator[Document]:
    """Yield the whole file as one document."""
    yield Document(path.name, decode(path))


def read_html(path: Path, column: str | None) -> Iterator[Document]:
    """Yield the visible text of a page: no scripts, no navigation, a line break after each block."""
    parser = require("selectolax.lexbor", extra="data")
    tree = parser.LexborHTMLParser(decode(path))
    for node in tree.css("script, style, noscript, template, nav, header, footer, aside, form, svg"):
        node.decompose()
    for node in tree.css("p, br, div, li, h1, h2, h3, h4, h5, h6, tr, pre, blockquote"):
        node.insert_after("\n")
    body = tree.css_first("main") or tree.css_first("article") or tree.body
    lines = (" ".join(line.split()) for line in (body.text() if body else "").splitlines())
    yield Document(path.name, "\n".join(line for line in lines if line))


def read_table(path: Path, column: str | None) -> Iterator[Document]:
    """Yield one document a row of a csv or tsv file; only a column given by number, or a Tatoeba file, needs no header."""
    csv.field_size_limit(2**31 - 1)
    content = io.StringIO(decode(path), newline="")
    if path.suffix.lower() == ".tsv":
        rows = csv.reader(content, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(content)
    try:
        first = next(rows, [])
        names = tatoeba_columns(path, first)
        if names is None and column is not None and column.isdecimal() and column not in first:
            names = [str(number) for number in range(1, len(first) + 1)]
        at = (names or first).index(find_column(names or first, column, path))
        for number, row in enumerate([first, *rows] if names else rows, 1 if names else 2):
            if row:
                yield Document(f"{path.name}:{number}", row[at] if at < len(row) else "")
    except csv.Error as error:
        raise InputError("this table cannot be read", where=str(path), found=str(error)) from None


def tatoeba_columns(path: Path, row: list[str]) -> list[str] | None:
    """Return id_A, A, id_B, B for a Tatoeba file of sentence pairs: NAME-A-B.tsv without a header; else None."""
    languages = path.stem.split("-")[-2:]
    if len(row) == 4 and len(languages) == 2 and row[0].isdecimal() and row[2].isdecimal():
        return [f"id_{languages[0]}", languages[0], f"id_{languages[1]}", languages[1]]
    return None


def read_jsonl(path: Path, column: str | None) -> Iterator[Document]:
    """Yield one document a line, each a JSON object."""
    for number, line in enumerate(decode(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError("a line is not JSON", where=where, found=str(error)) from None
        if not isinstance(row, dict):
            raise InputError("a line is not a JSON object", where=where, found=type(row).__name__)
        text = row[find_column(list(row), column, path)]
        if not isinstance(text, str):
            raise InputError("the text column does not hold text", where=where, found=type(text).__name__)
        yield Document(f"{path.name}:{number}", text)


READERS: dict[str, Callable[[Path, str | None], Iterator[Document]]] = {
    ".txt": read_plain,
    ".md": read_plain,
    ".html": read_html,
    ".htm": read_html,
    ".csv": read_table,
    ".tsv": read_table,
    ".jsonl": read_jsonl,
}


def find_column(columns: list[str], wanted: str | None, path: Path) -> str:
    """Return the column's name as the file spells it; upper and lower case do not matter."""
    by_lower = {name.strip().lower(): name for name in columns}
    found = by_lower.get((wanted or DEFAULT_COLUMN).lower())
    if found is None:
        what = f'no column "{wanted}"' if wanted else "which column holds the text?"
        raise InputError(
            what,
            where=str(path),
            found=", ".join(columns) or "no columns",
            fix=f"--column NAME{did_you_mean(wanted, columns) if wanted else ''}",
        )
    return found


def decode(path: Path) -> str:
    """Return a file as text: by its byte order mark, else as UTF-8, else by the encoding that fits best.

    A binary file is an InputError. NUL bytes mark one, because no text encoding but UTF-16 and UTF-32 holds them.
    """
    data = path.read_bytes()
    for mark, encoding in BOMS:
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError as error:
                raise InputError("this file is cut off or damaged", where=str(path), found=str(error)) from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if text and "\0" not in text:
        return text
    if b"\0" in data or is_binary(data):
        raise InputError(
            "this is not a text file", where=str(path), found="binary data", expected="text in any encoding"
        )
    return guess(data, path) if data else ""


def is_binary(data: bytes) -> bool:
    """Say whether more than one byte in fifty of the beginning is a control character that no text has."""
    head = data[:65536]
    odd = sum(head.count(byte) for byte in range(32) if byte not in b"\t\n\v\f\r\x1b")
    return odd * 50 > len(head)


def guess(data: bytes, path: Path) -> str:
    """Decode bytes of an unknown legacy encoding."""
    detector = require("charset_normalizer", extra="data")
    best = detector.from_bytes(data).best()
    if best is None:
        raise InputError("the encoding of this file cannot be told", where=str(path), fix="convert it to UTF-8")
    return str(best)


def is_hidden(path: Path, root: Path) -> bool:
    """Say whether a file lies in a hidden place below the root."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def describe(folder: Path) -> str:
    """Return what a folder without text files holds: 'an empty folder' or the endings of its files."""
    endings = sorted({p.suffix or p.name for p in folder.rglob("*") if p.is_file()})
    return ", ".join(endings[:8]) or "an empty folder"
