"""The knobs that a search varies: ranges and lists of choices, written as lr=1e-5..1e-3:log or batch_size=8,16,32."""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lmworks.base.errors import InputError, did_you_mean
from lmworks.training.tuning import LEARNING_RATES, LISTS, Tuning

FIXED = (*LISTS, "seed", "shots", "draws", "track", "workers")  # --seeds repeats a variant; the others are no choice
Value = str | int | float | bool | None
LARGEST_GRID = 10_000


@dataclass(frozen=True)
class Knob:
    """One knob that varies: between two numbers, or over choices."""

    name: str
    low: float = 0
    high: float = 0
    log: bool = False
    whole: bool = False  # integers only
    choices: tuple[Value, ...] = ()

    def __str__(self) -> str:
        if self.choices:
            return f"{self.name}={','.join(map(str, self.choices))}"
        return f"{self.name}={self.low:g}..{self.high:g}{':log' if self.log else ''}"

    def place(self, value: float) -> float:
        """Return where a value lies in the range: 0 is its low end and 1 its high end."""
        low, high, here = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (here - low) / (high - low)


def read_space(texts: Sequence[str], tuning: Tuning) -> tuple[Knob, ...]:
    """Return the knobs that vary; raise InputError for one that is unknown, empty, out of range, or also fixed."""
    knobs: list[Knob] = []
    names = [f.name for f in fields(Tuning) if f.name not in FIXED]
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if name not in names:
            fixed = name in FIXED
            fix = "--seeds 3 repeats each variant" if name == "seed" else did_you_mean(name, names).strip()
            raise InputError(f"{name!r} cannot be searched" if fixed else f"there is no knob {name!r}",
                             where=f"--space {text}", expected=", ".join(names), fix=fix)  # fmt: skip
        if not equals or not values.strip():
            raise InputError(f"no values for {name}", where=f"--space {text}",
                             expected="a range, 1e-5..1e-3:log, or a list, 8,16,32")  # fmt: skip
        if any(knob.name == name for knob in knobs):
            raise InputError(f"{name} is in the space twice", where=f"--space {text}", fix="give it once")
        if getattr(tuning, name) != getattr(Tuning(), name):
            raise InputError(f"{name} is both fixed and searched", found=f"{getattr(tuning, name)} and {text}",
                             fix=f"leave out --{name.replace('_', '-')}, or take it out of --space")  # fmt: skip
        knobs.append(read_knob(name, values.strip(), text))
    combinations = itertools.product(*(knob.choices or (knob.low, knob.high) for knob in knobs))
    for row in itertools.islice(combinations, LARGEST_GRID):  # each in its range, and none excludes another
        settings_of(tuning, dict(zip((knob.name for knob in knobs), row, strict=True)))
    return tuple(knobs)


def settings_of(tuning: Tuning, params: Mapping[str, Value]) -> Tuning:
    """Return a trial's knobs; raise InputError for values that cannot go together."""
    change: dict[str, Any] = dict(params)
    return replace(tuning, **change).check()


def read_knob(name: str, values: str, text: str) -> Knob:
    """Return the knob of one --space."""
    allowed = kinds(name)
    if ".." in values:
        ends, _, scale = values.partition(":")
        low, _, high = ends.partition("..")
        if scale not in ("", "log") or not {int, float} & set(allowed):
            raise InputError(f"{name} has no such range", where=f"--space {text}",
                             expected="LOW..HIGH or LOW..HIGH:log of numbers")  # fmt: skip
        first, last = (read_value(name, end, text) for end in (low, high))
        if not (isinstance(first, int | float) and isinstance(last, int | float) and first < last):
            raise InputError("the range is empty", where=f"--space {text}", found=f"{low} to {high}",
                             expected="the lower number first")  # fmt: skip
        if scale and first <= 0:
            raise InputError("a log range begins above 0", where=f"--space {text}", found=low)
        return Knob(name, first, last, bool(scale), float not in allowed)
    choices = tuple(read_value(name, one, text) for one in values.split(","))
    if len(set(choices)) < len(choices):
        raise InputError("a value is given twice", where=f"--space {text}", found=values)
    return Knob(name, choices=choices)


def kinds(name: str) -> tuple[Any, ...]:
    """Return what a knob's values may be: int, float, bool, NoneType, or a tuple of words."""
    hint = get_type_hints(Tuning)[name]
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(get_args(one) if get_origin(one) is Literal else one for one in options)


def read_value(name: str, text: str, where: str) -> Value:
    """Return one value in its knob's type."""
    text, allowed = text.strip(), kinds(name)
    if type(None) in allowed and text.lower() == "none":
        return None
    for kind in allowed:
        if kind is bool and text.lower() in ("true", "yes", "false", "no"):
            return text.lower() in ("true", "yes")
        if isinstance(kind, tuple) and text in kind:
            return text
        if kind in (int, float):
            try:
                number: float = kind(text)
            except ValueError:
                continue
            if math.isfinite(number):
                return number
    words = [word for kind in allowed if isinstance(kind, tuple) for word in kind]
    usual = "true or false" if bool in allowed else "a number" if float in allowed else "a whole number"
    raise InputError(f"{name} cannot be {text!r}", where=f"--space {where}", expected=", ".join(words) or usual,
                     fix=did_you_mean(text, words).strip())  # fmt: skip


def default_space(tuning: Tuning, *, halving: bool, grid: bool) -> tuple[Knob, ...]:
    """Return lr within a factor of 5 of the method's default, the batch size and the epochs, less what is fixed.

    Halving stops trials between epochs, so that it leaves their number alone.
    """
    usual, rate = Tuning(), LEARNING_RATES[tuning.method]
    knobs = [Knob("lr", choices=(rate / 4, rate, rate * 4)) if grid else Knob("lr", rate / 5, rate * 5, log=True)]
    knobs.append(Knob("batch_size", choices=(8, 16, 32)))
    if not halving:
        knobs.append(Knob("epochs", choices=(1, 2, 3)) if grid else Knob("epochs", 1, 4, whole=True))
    return tuple(knob for knob in knobs if getattr(tuning, knob.name) == getattr(usual, knob.name))


def make_grid(knobs: Sequence[Knob], seeds: Sequence[int]) -> list[dict[str, Value]]:
    """Return every combination of the values; the seeds, where there are several, vary fastest."""
    lists: list[Sequence[Value]] = []
    for knob in knobs:
        if not knob.choices and (not knob.whole or knob.log):
            raise InputError("a grid needs a list of values", where=f"--space {knob}",
                             fix=f"--space {knob.name}=A,B,C, or another --search")  # fmt: skip
        lists.append(knob.choices or range(int(knob.low), int(knob.high) + 1))
    if (size := math.prod(map(len, lists)) * len(seeds)) > LARGEST_GRID:
        raise InputError("the grid is too large", found=f"{size:,} runs", expected=f"{LARGEST_GRID:,} at most",
                         fix="--search tpe chooses among them")  # fmt: skip
    names = [knob.name for knob in knobs] + ["seed"] * (len(seeds) > 1)
    if len(seeds) > 1:
        lists.append(seeds)
    return [dict(zip(names, row, strict=True)) for row in itertools.product(*lists)]
