"""Knobs of a verb: a dataclass whose fields are the command line's flags, checked in one way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from lmworks.base.errors import InputError, did_you_mean

T = TypeVar("T")


def read_knobs(kind: type[T], given: Mapping[str, Any]) -> T:
    """Return the knobs of these names; an unknown one is an InputError with a suggestion."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            near = did_you_mean(name, known).strip()
            raise InputError(f"there is no knob {name!r}", expected=", ".join(known), fix=near)
    return kind(**given)


def check_useful(useless: Mapping[str, tuple[bool, str]]) -> None:
    """Raise InputError for the first rule that is broken: why a knob would do nothing -> (whether it is so, found)."""
    for reason, (broken, found) in useless.items():
        if broken:
            raise InputError(reason, found=found, fix="leave out one of them" if " and " in found else "leave it out")


def check_belongs(knobs: object, plain: object, belongs: Mapping[str, tuple[str, Sequence[str]]]) -> None:
    """Raise InputError for a knob that was set without a choice it belongs to; `plain` has every knob's default."""
    for name, (other, wanted) in belongs.items():
        said = getattr(knobs, other)
        if said not in wanted and getattr(knobs, name) != getattr(plain, name):
            option, owner = (f"--{one.replace('_', '-')}" for one in (name, other))
            choices = " or ".join((", ".join(wanted[:-1]), wanted[-1]) if len(wanted) > 1 else wanted)
            raise InputError(f"{option} belongs to {choices}", found=f"{owner} {said}", fix=f"{owner} {wanted[0]}")


def check_ranges(knobs: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise InputError for the first knob outside its range; one that is None says nothing."""
    for name, (low, high) in ranges.items():
        value = getattr(knobs, name)
        if value is not None and not low <= value <= high:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} is out of range", found=str(value), expected=f"{low} to {high}")
