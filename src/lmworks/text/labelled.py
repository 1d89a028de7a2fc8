"""Labelled examples for every task, from the files of `lmworks.text.formats`.

    task                     example                                    reference
    text-classification      text, or (text, text) for two columns      label; tuple of labels (multi-label); float
    token-classification     tuple of words                             tuple of tags
    question-answering       (question, context)                        tuple of (text, start); () for no answer
    text-generation          text, {"prompt", "completion"},            None
                             or {"messages": [{"role", "content"}, …]}
    image-classification     path                                       label
    feature-extraction       text, pair or triplet of texts             label, score or (): `lmworks.text.similar`

A label is a name, an integer (its decimal digits are its name), a list of names (multi-label), or a number with a
point: then the task is regression. In a table everything is text, so labels are numbers if all of them read as such
and one has a point.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError, did_you_mean
from lmworks.text.formats import read_rows
from lmworks.text.label_kinds import INTEGER, unify
from lmworks.text.read import find_column, read_documents
from lmworks.text.similar import read_similar

TEXT = ("text", "sentence")
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question", "sentence"), ("text1", "text2"))
LABEL = ("label", "labels")
WORDS, TAGS = ("tokens", "words"), ("ner_tags", "tags", "labels")
IMAGE = ("image", "file_name", "path")


@dataclass(frozen=True)
class Labelled:
    """Examples with what a model should say of them."""

    task: str
    examples: list[Any]
    references: list[Any]
    labels: tuple[str, ...]  # integers in numeric order, others as they first appear; empty where a task has none
    where: str  # the file
    notes: tuple[str, ...] = field(default=(), compare=False)  # sentences for a report

    def __len__(self) -> int:
        return len(self.examples)


def read_labelled(
    path: str | Path,
    task: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    header: bool = True,
    split: str | None = None,
) -> Labelled:
    """Return the labelled examples of a file or folder, told by its ending and content.

    `text_column` and `label_column` name columns, or number them from 1 with header=False; "a,b" makes a pair of two
    columns, "a+b" joins them with a blank. `split` picks one of nested JSON or of a folder, "a+b" more. Raises
    InputError or FormatError that says where for whatever is no example of the task.
    """
    if task not in READERS:
        raise InputError(
            "no labelled data for this task",
            found=f"{task!r}{did_you_mean(task, READERS)}",
            expected=", ".join(READERS),
        )
    path = Path(path)
    is_table = path.suffix.lower() in (".csv", ".tsv")
    columns = Columns(text_column, label_column, header and is_table, path if path.is_dir() else path.parent)
    if task == "text-generation" and (
        (path.is_dir() and split is None) or path.suffix.lower() in (".txt", ".md", ".html")
    ):
        asked = {
            "--text-column": text_column if path.is_file() else None,
            "--label-column": label_column,
            "--split": split,
        }
        if given := [option for option, value in asked.items() if value is not None]:
            raise InputError("plain texts have no columns and no splits", where=str(path), found=" ".join(given),
                             fix="leave it out")  # fmt: skip
        examples: list[Any] = [document.text for document in read_documents(path, column=text_column)]
        return Labelled(task, examples, [None] * len(examples), (), str(path))
    rows = list(read_rows(path, task, header=header, split=split))
    if not rows:
        raise InputError(
            "there are no examples in this file",
            where=str(path),
            found="a header and no rows" if columns.header else "",
        )
    gaps = dict.fromkeys(rows[0][1])  # what the first row has and another lacks is a gap, not a column unheard of
    pairs = [READERS[task]({**gaps, **row}, where, columns) for where, row in rows]
    references = [reference for _, reference in pairs]
    labels: tuple[str, ...] = ()
    if task in ("text-classification", "image-classification"):
        references = unify(references, [where for where, _ in rows], is_table=is_table)
    if task.endswith("classification") and not isinstance(references[0], float):
        labels = names_of(references)
    notes: tuple[str, ...] = ()
    if is_table and task == "text-classification" and isinstance(references[0], float):
        few = set(references)
        if len(few) <= 10 and all(number.is_integer() for number in few):
            notes = (f"The labels are {len(few)} whole numbers written with a point: they are taken for numbers to "
                     "predict, not for classes; write 1 for 1.0 to make them classes.",)  # fmt: skip
    return Labelled(task, [example for example, _ in pairs], references, labels, str(path), notes)


def check_labels(train: Labelled, other: Labelled) -> Labelled:
    """Return `other`, its integers as numbers where `train` has numbers; raise InputError for a label unknown to it."""
    if train.task != other.task:
        raise InputError("these are data of different tasks", found=f"{train.task} and {other.task}", where=other.where)
    if not train.labels and other.labels and all(isinstance(r, str) and INTEGER.fullmatch(r) for r in other.references):
        return replace(other, references=[float(r) for r in other.references], labels=())
    labels = set(train.labels)
    for number, reference in enumerate(other.references if train.labels or other.labels else [], 1):
        for label in (reference,) if isinstance(reference, str | float) else reference:
            if label not in labels:
                known = ", ".join(train.labels[:10]) + (f" … ({len(train.labels)})" if len(train.labels) > 10 else "")
                raise InputError(
                    f'the label "{label}" does not occur in the training data',
                    where=f"{other.where}, example {number}: {str(other.examples[number - 1])[:60]!r}",
                    expected=f"{known or 'numbers'} (in {train.where})",
                    fix=f"correct it, or add examples of it;{did_you_mean(str(label), train.labels)}".rstrip(";"),
                )
    return other


@dataclass(frozen=True)
class Columns:
    """Which columns the user asked for."""

    text: str | None
    label: str | None
    header: bool  # there is a first row that names them
    folder: Path  # images are named from here

    def value(self, row: dict[str, Any], where: str, wanted: str | None, usual: Sequence[str], what: str) -> Any:
        """Return the value of the wanted column, or of the first usual one there is; None for a null or a gap."""
        names = list(row)
        for name in usual if wanted is None else (wanted,):
            at = find_column(names, name)
            if at is not None:
                return row[names[at]]
        near = "".join({did_you_mean(name, names): None for name in ([wanted] if wanted else usual)})
        option = f"--{'text' if what in ('text', 'words', 'image') else 'label'}-column"
        raise InputError(
            f'no column "{wanted}"' if wanted else f"which column holds the {what}?",
            where=where,
            found="columns " + (", ".join(name[:40] for name in names) or "none"),
            fix=f"{option} {'NUMBER' if names[:1] == ['1'] else 'NAME'}"
            + (", or --no-header if the first row is data" if self.header else "")
            + (f";{near}" if near else ""),
        )

    def texts(self, row: dict[str, Any], where: str) -> str | tuple[str, str]:
        """Return the text of a row, or its two texts."""
        names = list(row)
        wanted = "1" if self.text is None and is_bare(row) else self.text
        if wanted is None and not any(find_column(names, name) is not None for name in TEXT):
            wanted = next((",".join(p) for p in PAIRS if all(find_column(names, n) is not None for n in p)), None)
        parts = [wanted] if wanted is None or find_column(names, wanted) is not None else wanted.split(",")
        found = tuple(self.joined(row, where, part) for part in parts)
        if len(found) > 2:
            raise InputError(
                "a model reads one text or two", where=where, found=f"{len(found)} columns", fix='join them: "a+b,c"'
            )
        return (found[0], found[1]) if len(found) == 2 else found[0]

    def joined(self, row: dict[str, Any], where: str, wanted: str | None) -> str:
        """Return the text of a column, or of several named "a+b"."""
        exact = wanted is None or find_column(list(row), wanted) is not None
        names = [wanted] if wanted is None or exact else wanted.split("+")
        return " ".join(as_text(self.value(row, where, name, TEXT, "text"), where, name or "text") for name in names)

    def reference(self, row: dict[str, Any], where: str) -> Any:
        """Return the raw label of a row."""
        wanted = "2" if self.label is None and is_bare(row) else self.label
        value = self.value(row, where, wanted, LABEL, "label")
        if value is None or (isinstance(value, str) and not value.strip()):
            raise InputError(
                "a row has no label", where=where, found=str(row)[:100], fix="give it one, or remove the row"
            )
        return value


def is_bare(row: dict[str, Any]) -> bool:
    """Tell a row of a table of two columns without a header: text and label, for sure."""
    return list(row) == ["1", "2"]


def as_text(value: Any, where: str, name: str) -> str:
    """Return a text that is one, and not blank."""
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if value is None or value == "" else repr(value)[:80]
        raise InputError(f'no text in column "{name}"', where=where, found=found, fix="fill it in, or remove the row")
    return value


def read_text_row(row: dict[str, Any], where: str, columns: Columns) -> tuple[Any, Any]:
    """Return a text or pair, and its label, labels or number."""
    return columns.texts(row, where), as_label(columns.reference(row, where), where)


def as_label(value: Any, where: str) -> str | float | bool | tuple[str, ...]:
    """Return a JSON value as a label: a name, a number, true or false, or a tuple of names; `unify` makes one kind."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list) and all(type(name) in (str, int) and str(name).strip() for name in value):
        return tuple(dict.fromkeys(str(name).strip() for name in value))
    raise InputError(
        "this is no label", where=where, found=repr(value)[:80], expected="a name, a number, or a list of names"
    )


def names_of(references: Iterable[Any]) -> tuple[str, ...]:
    """Return the labels: integers in numeric order, others as they first appear; none for numbers and answers."""
    names: dict[str, None] = {}
    for reference in references:
        names.update(dict.fromkeys(n for n in ([reference] if isinstance(reference, str) else reference)))
    return tuple(sorted(names, key=int) if all(INTEGER.fullmatch(name) for name in names) else names)


def read_sentence(row: dict[str, Any], where: str, columns: Columns) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words of a sentence and their tags."""
    words = as_list(columns.value(row, where, columns.text, WORDS, "words"), where, "words")
    tags = as_list(columns.value(row, where, columns.label, TAGS, "tags"), where, "tags")
    if len(words) != len(tags):
        raise InputError(
            "words and tags differ in number",
            where=where,
            found=f"{len(words)} words and {len(tags)} tags: {' '.join(words)[:60]!r}",
            expected="a tag for each word",
        )
    return words, tags


def as_list(value: Any, where: str, what: str) -> tuple[str, ...]:
    """Return a list of words: of JSON, or in a table's field as JSON or Python write it, or separated by blanks."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.lstrip().startswith("[") else value.split()
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = value.split()
    if not isinstance(value, list) or not value or not all(isinstance(v, str | int) and v != "" for v in value):
        raise InputError(f"these are no {what}", where=where, found=repr(value)[:80], expected='a list: ["…", "…"]')
    return tuple(str(one) for one in value)


def read_question(row: dict[str, Any], where: str, columns: Columns) -> tuple[tuple[str, str], tuple[Any, ...]]:
    """Return question and context, and the answers that stand where they claim to."""
    where += f", question {row['id']}" if row.get("id") is not None else ""
    pair = replace(columns, text=columns.text or "question,context").texts(row, where)
    question, context = pair if isinstance(pair, tuple) else (pair, "")
    if row.get("is_impossible"):
        return (question, context), ()
    found = columns.value(row, where, columns.label, ("answers",), "answers")
    if isinstance(found, dict) and len({len(v) if isinstance(v, list) else -1 for v in found.values()}) == 1:
        found = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    if not isinstance(found, list) or not all(isinstance(a, dict) and isinstance(a.get("text"), str) for a in found):
        raise InputError(
            "these are no answers",
            where=where,
            found=repr(found)[:80],
            expected='a list of {"text": …, "answer_start": …}; an empty one where there is no answer',
        )
    answers = [(answer["text"], answer.get("answer_start")) for answer in found if answer["text"]]
    for text, start in answers:
        if type(start) is not int or start < 0 or not context.startswith(text, start):
            there = context[start : start + len(text)] if type(start) is int and start >= 0 else None
            raise InputError(
                "an answer is not where it should be",
                where=where,
                found=f"answer_start {start}" + (f": {there!r}" if there is not None else ""),
                expected=repr(text),
                fix=f"answer_start {context.find(text)}" if text in context else "the context must hold the answer",
            )
    return (question, context), tuple(answers)


def read_generation(row: dict[str, Any], where: str, columns: Columns) -> tuple[Any, None]:
    """Return a text, or a prompt with its completion, or a conversation with at least one answer."""
    if columns.text or columns.label:
        text = columns.texts(row, where)
        completion = columns.value(row, where, columns.label, (), "completion") if columns.label else None
        pair = (text, as_text(completion, where, columns.label or "")) if columns.label else text
        return {"prompt": pair[0], "completion": pair[1]} if isinstance(pair, tuple) else pair, None
    if row.get("messages") is not None:
        messages = row["messages"]
        shaped = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not shaped or not any(m["role"] == "assistant" for m in messages):
            raise InputError(
                "a conversation without an answer" if shaped else "these are no messages",
                where=where,
                found=repr(messages)[:80],
                expected='[{"role": "user", "content": …}, {"role": "assistant", "content": …}]',
            )
        return {"messages": messages}, None
    if row.get("prompt") is not None or row.get("completion") is not None:
        names = ("prompt", "completion")
        return {name: as_text(columns.value(row, where, name, (), name), where, name) for name in names}, None
    return columns.texts(row, where), None


def read_image(row: dict[str, Any], where: str, columns: Columns) -> tuple[str, Any]:
    """Return the path of an image that exists, named from the file's folder, and its label."""
    name = as_text(columns.value(row, where, columns.text, IMAGE, "image"), where, "image")
    path = next((path for path in (columns.folder / name, Path(name)) if path.is_file()), None)
    if path is None:
        raise InputError("there is no such image", where=where, found=name, expected=f"a file in {columns.folder}")
    return str(path), as_label(columns.reference(row, where), where)


READERS: dict[str, Callable[[dict[str, Any], str, Columns], tuple[Any, Any]]] = {
    "text-classification": read_text_row,
    "token-classification": read_sentence,
    "question-answering": read_question,
    "text-generation": read_generation,
    "image-classification": read_image,
    "feature-extraction": read_similar,
}
