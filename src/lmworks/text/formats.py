"""From the files that people keep labelled data in to rows: a dict of named values, and where it stands.

    csv, tsv     a table; its first row names the columns, or they are called "1", "2", … (header=False)
    jsonl        one object a line
    parquet      a table
    json         a list of objects; SQuAD's {"data": …}; nested splits, {"train": [[text, label], …], …} (CLINC150)
    anything     for token-classification, CoNLL: a word and its tag a line (of 2 or more columns the first and the
                 last), an empty line between sentences
    QAMR         tsv without a header, its sentences in wiki-sentences.tsv beside it (github.com/uwnlp/qamr)
    a folder     of files by class, LABEL/NAME, or of splits, train/LABEL/NAME or train.jsonl

A row of SQuAD and QAMR has id, question, context and answers, each {"text", "answer_start"} (in characters); a CoNLL
sentence has tokens and tags.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lmworks.base.errors import FormatError, InputError, did_you_mean
from lmworks.base.report import counted
from lmworks.text.decode import decode
from lmworks.text.open import open_bytes, plain_ending, read_bytes
from lmworks.text.read import ELSEWHERE, check_names, parquet_rows, parse_table

Row = tuple[str, dict[str, Any]]  # where it stands ("train.csv, line 12"), and its values by column
JSON = (".json", ".jsonl", ".ndjson")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
QAMR = re.compile(r"[^\t\n]+\t[\d ]+\t\d+\t\d+\t\d+\t[^\t\n]+\t[^\t\n]*(\t[^\t\n]*)*(\n|$)")
TAG_COLUMNS = ("tag", "tags", "label", "labels", "ner", "ner_tag", "ner_tags")
INDICES = re.compile(r"(?:\d+:)?(\d+(?: \d+)*)")  # of answer words; the validators' begin with who they are
PTB = {  # how the Penn Treebank writes brackets and quotation marks
    "-LRB-": "(",
    "-RRB-": ")",
    "-LSB-": "[",
    "-RSB-": "]",
    "-LCB-": "{",
    "-RCB-": "}",
    "``": "“",
    "''": "”",
    "`": "‘",
    "'": "’",
}
CLINGS_LEFT = {*",.:;?!%", "...", ")", "]", "}", "”", "’", "n't", "'s", "'m", "'d", "'ll", "'re", "'ve"}
CLINGS_RIGHT = {"(", "[", "{", "“", "‘", "$", "#"}


def read_rows(path: Path, task: str, *, header: bool = True, split: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file or folder; raise InputError or FormatError that names the line for what is no row."""
    if path.is_dir():
        yield from read_folder(path, task, header=header, split=split)
        return
    ending = plain_ending(path)
    if ending == ".parquet" and split is None:
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(parquet_rows(path), 1))
        return
    text = read_text(path)
    if ending in JSON:
        yield from read_json(text, path, split)
        return
    if split is not None:
        raise InputError("this file has no splits", where=str(path), found=f'split "{split}"', fix="leave --split out")
    if task == "question-answering" and ending == ".tsv" and QAMR.match(text):
        yield from read_qamr(text, path)
    elif task == "token-classification" and not (ending in (".csv", ".tsv") and is_table_of_sentences(text)):
        yield from read_conll(text, path)
    elif ending in (".csv", ".tsv"):
        yield from read_table(text, path, header=header)
    else:
        raise InputError(
            f"a {ending or 'file without an ending'} does not say how it holds {task} data",
            where=str(path),
            expected=".jsonl, .json, .csv or .tsv, or a folder",
            fix="rename it, or convert it",
        )


def read_text(path: Path) -> str:
    """Return the text of a file in whatever encoding, without its byte order mark, lines ending in newlines."""
    ending = plain_ending(path)
    if ending in ELSEWHERE and ending not in JSON:
        raise InputError(f"{ending} files are not read", where=str(path), fix=ELSEWHERE[ending])
    if not path.exists():
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise InputError(f"there is no file or folder {path}", fix=f"check the path;{near}".rstrip(";")) from None
    with open_bytes(path) as file:
        text, _ = decode(read_bytes(file, -1, str(path)), str(path))
    if not text.strip():
        raise InputError("there is nothing in this file", where=str(path))
    return text.replace("\r\n", "\n")


def read_table(text: str, path: Path, *, header: bool) -> Iterator[Row]:
    """Yield the rows of a csv or tsv file; a row that is shorter than the first one lacks its last columns."""
    csv.field_size_limit(2**31 - 1)
    names: list[str] = []
    for line, fields in parse_table(io.StringIO(text, newline="\n"), path):
        where = f"{path}, line {line}"
        if not names:
            names = [name.strip() for name in fields] if header else [str(n) for n in range(1, len(fields) + 1)]
            check_names(names, where, "--no-header if the first row is data")
            if header:
                continue
        if len(fields) > len(names):
            raise InputError(
                "a row has more fields than the first one",
                where=where,
                found=f"{len(fields)} fields",
                expected=f"{len(names)}: {', '.join(names)}",
                fix='put text that holds a separator in "quotes", or give a .jsonl file',
            )
        yield where, dict(zip_longest(names, fields))


def read_json(text: str, path: Path, split: str | None) -> Iterator[Row]:
    """Yield the objects of jsonl, or of one JSON value: a list, SQuAD's, or one or more splits ("train+oos_train")."""
    lines, ending = text.strip().split("\n"), path.suffix.lower()
    value: Any = None
    if ending == ".json" or len(lines) == 1 or text.lstrip().startswith("["):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            if ending == ".json" and not is_json(lines[0]):  # else it has an object a line
                raise FormatError("this is not JSON", where=str(path), found=str(error)) from None
    rows: Iterable[Row]
    if isinstance(value, dict) and is_squad(value):
        rows = read_squad(value, path)
    elif isinstance(value, dict) and ending == ".json" and is_nested(value):
        yield from read_nested(value, path, split)
        return
    elif isinstance(value, list):
        rows = (as_row(row, f"{path}, row {number}") for number, row in enumerate(value, 1))
    else:
        rows = read_jsonl(text, path)
    if split is not None:
        raise InputError("this file has no splits", where=str(path), found=f'split "{split}"', fix="leave --split out")
    yield from rows


def is_json(line: str) -> bool:
    """Tell whether a line is a JSON value of its own."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def is_nested(value: dict[str, Any]) -> bool:
    """Tell {"train": [row, …], …} from a row whose values are lists."""
    parts = [part for part in value.values() if isinstance(part, list)]
    return bool(parts) and len(parts) == len(value) and all(isinstance(r, list | dict) for part in parts for r in part)


def read_jsonl(text: str, path: Path) -> Iterator[Row]:
    """Yield one row a line."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FormatError("a line is not JSON", where=where, found=str(error)) from None
            yield as_row(row, where)


def as_row(row: Any, where: str) -> Row:
    """Return a JSON object as a row, and [text, label] as one with these names."""
    if isinstance(row, list) and len(row) == 2:
        return where, {"text": row[0], "label": row[1]}
    if not isinstance(row, dict):
        raise FormatError(
            "a row is not a JSON object", where=where, found=repr(row)[:80], expected='{"text": …, "label": …}'
        )
    return where, row


def read_nested(splits: dict[str, list[Any]], path: Path, split: str | None) -> Iterator[Row]:
    """Yield the rows of the chosen splits, or of the only one."""
    chosen = list(splits) if split is None else [split] if split in splits else split.split("+")
    wrong = next((name for name in chosen if name not in splits), None)
    if wrong is not None or (split is None and len(splits) > 1):
        raise InputError(
            "which split?" if wrong is None else f'no split "{wrong}"',
            where=str(path),
            found="splits " + ", ".join(f"{name} ({counted(len(rows), 'row')})" for name, rows in splits.items()),
            fix="--split NAME, or NAME+NAME for more than one"
            + (f";{near}" if wrong and (near := did_you_mean(wrong, splits)) else ""),
        )
    for name in chosen:
        for number, row in enumerate(splits[name], 1):
            yield as_row(row, f"{path}, {name}, row {number}")


def is_squad(value: dict[str, Any]) -> bool:
    """Tell SQuAD's JSON: {"data": [{"paragraphs": …}, …]}."""
    articles = value.get("data")
    return isinstance(articles, list) and any(isinstance(one, dict) and "paragraphs" in one for one in articles)


def read_squad(value: dict[str, Any], path: Path) -> Iterator[Row]:
    """Yield a row a question of SQuAD 1.1 or 2.0."""
    question = ""
    try:
        for article in value["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield str(path), {**question, "context": paragraph["context"]}
    except (KeyError, TypeError) as error:
        raise FormatError(
            "this is not SQuAD's form",
            where=f"{path}, {f'at {question}'[:80] if question else 'before the first question'}",
            found=f"no {error}" if isinstance(error, KeyError) else str(error),
            expected='{"data": [{"paragraphs": [{"context": …, "qas": [{"id": …, "question": …, "answers": …}]}]}]}',
        ) from None


def read_qamr(text: str, path: Path) -> Iterator[Row]:
    """Yield a row a question of QAMR, its sentence written as people write, with the first valid answer.

    An answer is valid if its words stand side by side; where none of the three people's does, the span from the first
    to the last word of the first one counts.
    """
    source = path.with_name("wiki-sentences.tsv")
    if not source.is_file():
        raise InputError(
            "QAMR's questions need their sentences",
            where=str(path),
            expected=f"{source.name} beside it",
            fix="copy it here",
        )
    sentences = dict(line.split("\t", 1) for line in read_text(source).split("\n") if "\t" in line)
    contexts: dict[str, tuple[str, list[int], list[str]]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        where, fields = f"{path}, line {number}", line.split("\t")
        if len(fields) < 7 or fields[0] not in sentences:
            what = f"sentence {fields[0]}" if len(fields) > 6 else f"{len(fields)} columns"
            raise FormatError(
                "this is not a question of QAMR", where=where, found=what, expected=f"an id of {source.name}"
            )
        if fields[0] not in contexts:
            contexts[fields[0]] = write_out(sentences[fields[0]].split(" "))
        context, starts, words = contexts[fields[0]]
        places = [[int(i) for i in found[1].split(" ")] for f in fields[6:] if (found := INDICES.fullmatch(f))]
        places = [one for one in places if max(one) < len(words)]
        if not places:
            raise FormatError("a question without a valid answer", where=where, found=" | ".join(fields[6:]))
        best = next((one for one in places if max(one) - min(one) == len(one) - 1), places[0])
        start, end = starts[min(best)], starts[max(best)] + len(words[max(best)])
        answer = {"text": context[start:end], "answer_start": start}
        yield where, {"question": fields[5], "context": context, "answers": [answer]}


def write_out(tokens: Iterable[str]) -> tuple[str, list[int], list[str]]:
    """Return PTB tokens as a sentence, where each begins (in characters), and how each is written.

    ["-LRB-", "do", "n't", "-RRB-"] -> ("(don't)", [0, 1, 3, 6], ["(", "do", "n't", ")"])
    """
    sentence, starts, words, clings = "", [], [PTB.get(token, token) for token in tokens], True
    for word in words:
        sentence += "" if clings or word in CLINGS_LEFT else " "
        starts.append(len(sentence))
        sentence += word
        clings = word in CLINGS_RIGHT
    return sentence, starts, words


def is_table_of_sentences(text: str) -> bool:
    """Tell a table with a column "tokens" from CoNLL's word a line, where blank lines part words without blanks."""
    first, _, body = text.partition("\n")
    names = [name.strip(' "').casefold() for name in re.split(r"[,;\t]", first)]
    single = "\n\n" in body.strip() and " " not in body and not re.search(r"""^"?\[+["']""", body, re.MULTILINE)
    return ("tokens" in names or "words" in names) and not single


def read_conll(text: str, path: Path) -> Iterator[Row]:
    """Yield a row a sentence; columns are parted by tabs, or else by blanks. Comments and -DOCSTART- are no words."""
    tokens: list[str] = []
    tags: list[str] = []
    begin = 1
    first, *others = text.split("\n")
    name = re.split(r"[\t ]+", first.strip())[-1]
    if name.casefold() in TAG_COLUMNS and not any(re.split(r"[\t ]+", one.strip())[-1] == name for one in others):
        first = ""  # it names the columns
    for number, line in enumerate([first, *others, ""], 1):
        if not line.strip():
            if tokens:
                yield f"{path}, line {begin}", {"tokens": tokens, "tags": tags}
            tokens, tags, begin = [], [], number + 1
            continue
        if line.startswith("-DOCSTART-") or (not tokens and line.startswith("# ") and "=" in line):
            continue
        fields = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
        if len(fields) < 2 or not fields[0] or not fields[-1].strip():
            raise InputError(
                "a word without a tag" if fields[0] else "a tag without a word",
                where=f"{path}, line {number}",
                found=repr(line)[:80],
                expected="WORD, a tab or blanks, TAG; an empty line after each sentence",
            )
        tokens.append(fields[0])
        tags.append(fields[-1].strip())


def read_folder(path: Path, task: str, *, header: bool, split: str | None) -> Iterator[Row]:
    """Yield the files below LABEL/ as rows {"text" or "image", "label"}, or what the split's folder or file holds."""
    inside = {p.stem if p.is_file() else p.name: p for p in sorted(path.iterdir()) if not p.name.startswith(".")}
    if split is not None:
        if split not in inside:
            raise InputError(
                f'no split "{split}"',
                where=str(path),
                found=", ".join(inside) or "an empty folder",
                fix=f"--split NAME;{did_you_mean(split, inside)}".rstrip(";"),
            )
        yield from read_rows(inside[split], task, header=header)
        return
    column, endings = ("image", IMAGES) if task == "image-classification" else ("text", (".txt",))
    found = 0
    for folder in sorted(p for p in inside.values() if p.is_dir()):
        for file in sorted(p for p in folder.rglob("*") if p.suffix.lower() in endings and p.is_file()):
            found += 1
            yield str(file), {column: str(file) if column == "image" else read_text(file), "label": folder.name}
    classes = task in ("text-classification", "image-classification")
    if not found or not classes:
        raise InputError(
            f"this folder holds no {task} data",
            where=str(path),
            found=", ".join(p.name for p in inside.values())[:200] or "nothing",
            expected=f"a folder for each class, with {' '.join(endings)} files" if classes else "a file",
            fix="give a file, or --split NAME for one of a folder's files",
        )
