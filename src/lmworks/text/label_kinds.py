"""One kind of label for all rows: names, lists of names, or numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from lmworks.base.errors import InputError

INTEGER = re.compile(r"[+-]?\d+")
GAPS = ("nan", "inf", "infinity", "na", "n/a", "null", "none", "?", "-", "")  # instead of a number
SLIPS = 0.1  # of a column of numbers at most; with more that are none it holds names


def unify(references: list[Any], places: Sequence[str], *, is_table: bool) -> list[Any]:
    """Return labels of one kind, names, tuples of names or numbers; integers are names, among numbers with a point not.

    Raises InputError for a mixture, as of 1 and "x" in JSON.
    """
    kinds, integers = set(map(type, references)), [is_integer(r) for r in references]
    if is_table and kinds == {str}:
        if not all(integers) and all(map(is_number, references)):
            return [float(r) for r in references]
        check_numbers(references, places)
    kind = type(references[0])
    if integers[0] and (float in kinds or (int in kinds and all(integers))):
        kind = float if float in kinds else int
    for reference, integer, where in zip(references, integers, places, strict=True):
        if type(reference) is not kind and not (kind in (float, int) and integer):
            raise InputError(
                "labels of different kinds",
                where=where,
                found=f"{reference!r}, after {KINDS[kind]}",
                expected="a name, a list of names, or a number in every row",
                fix="" if kinds & {tuple, float} else "write every name in quotes",
            )
    if kind is bool:
        return [str(r).lower() for r in references]
    return [float(r) if kind is float else str(r) if kind is int else r for r in references]


def check_numbers(references: Sequence[str], places: Sequence[str]) -> None:
    """Raise InputError for a column of numbers with gaps or slips, whose every number would become a class."""
    odd = [i for i, reference in enumerate(references) if not is_number(reference)]
    numbers = [r for r in references if is_number(r)]
    if not odd or all(INTEGER.fullmatch(r) for r in numbers):
        return
    if len(odd) <= SLIPS * len(references) or all(references[i].lower().lstrip("+-") in GAPS for i in odd):
        raise InputError(
            "this label is no number, but the others are",
            where=places[odd[0]],
            found=f"{references[odd[0]]!r}; {len(odd)} such of {len(references)}",
            expected="a finite number in every row",
            fix="correct it, or remove the row; labels that are names and look like numbers go into a .jsonl",
        )


KINDS: dict[type, str] = {
    str: "names", float: "numbers", int: "integers", bool: "true and false", tuple: "lists of names",
}  # fmt: skip


def is_integer(label: Any) -> bool:
    """Tell an integer, or its digits."""
    return type(label) is int or (isinstance(label, str) and bool(INTEGER.fullmatch(label)))


def is_number(text: str) -> bool:
    """Tell a finite decimal number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
