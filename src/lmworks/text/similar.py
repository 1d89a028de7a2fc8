"""Texts that mean the same, to train and score sentence embeddings on.

row                          example                        reference
two texts                    (text, text)                   (): they mean the same
two texts and a score        (text, text)                   number from -1 to 1: the cosine that they should have
anchor, positive, negative   (text, text, text)             ()
text and label               text                           label: texts of one label belong together
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lmworks.base.errors import InputError
from lmworks.text.read import find_column

if TYPE_CHECKING:
    from lmworks.text.labelled import Columns

GROUPS = (
    ("anchor", "positive", "negative"), ("query", "positive", "negative"), ("anchor", "positive"),
    ("query", "positive"), ("query", "answer"), ("sentence1", "sentence2"), ("text1", "text2"),
    ("premise", "hypothesis"),
)  # fmt: skip
SCORE = ("score", "similarity", "similarity_score", "label")


def read_similar(row: dict[str, Any], where: str, columns: Columns) -> tuple[Any, Any]:
    """Return the text or texts of a row, and their label, score or ()."""
    texts = read_group(row, where, columns)
    if len(texts) == 1:
        label = columns.reference(row, where)
        if not isinstance(label, str | int):
            raise InputError("this is no label", where=where, found=repr(label)[:80], expected="a name")
        return texts[0], str(label).strip()
    names = list(row)
    scored = columns.label or next((name for name in SCORE if find_column(names, name) is not None), None)
    if scored is None or (len(texts) == 3 and columns.label is None):
        return texts, ()
    if len(texts) == 3:
        raise InputError("a triplet has no score", where=where, fix="leave --label-column out")
    return texts, read_score(columns.value(row, where, scored, SCORE, "score"), where, scored)


def read_group(row: dict[str, Any], where: str, columns: Columns) -> tuple[str, ...]:
    """Return the texts of a row, one to three."""
    names, wanted = list(row), columns.text
    if wanted is None:
        bare = ("1", "2") if names == ["1", "2"] else None
        group = bare or next((g for g in GROUPS if all(find_column(names, name) is not None for name in g)), None)
        wanted = None if group is None else ",".join(group)
    exact = wanted is None or find_column(names, wanted) is not None
    parts: list[str | None] = [wanted] if wanted is None or exact else [*wanted.split(",")]
    if len(parts) > 3:
        raise InputError(
            "a row holds at most an anchor, a positive and a negative", where=where, found=f"{len(parts)} columns"
        )
    return tuple(columns.joined(row, where, part) for part in parts)


def read_score(value: Any, where: str, name: str) -> float:
    """Return a score from -1 to 1."""
    try:
        score = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not -1 <= score <= 1:
        raise InputError(
            f'column "{name}" holds no similarity',
            where=where,
            found=repr(value)[:60],
            expected="a number from 0 (nothing in common) to 1 (the same meaning)",
            fix="divide the scores by the highest there can be; or name another --label-column",
        )
    return score
