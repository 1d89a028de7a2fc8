"""A budget for a smaller model, in words: "accuracy>=-1%, speed>=2x, size<=0.3x". Torch-free.

    metric   a score (accuracy, f1, perplexity …), agreement, speed, latency, throughput, size, memory
    value    a plain number of the metric, ms or MB; x: times the model as it is; with a sign: a change from it, in
             points of a score that lies between 0 and 1 (-1% is a hundredth), else as a share (+2%)

Speed is the smaller of the two speed-ups: of one text at a time, and of many.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmworks.base.errors import InputError, did_you_mean

COSTS = ("speed", "latency", "throughput", "size", "memory")
UNITS = {"latency": ("ms",), "size": ("MB", "GB"), "memory": ("MB", "GB")}
CLAUSE = re.compile(r"([A-Za-z_][\w-]*)\s*(>=|<=|>|<)\s*([+-]?)(\d+(?:\.\d+)?|\.\d+)\s*(%|x|ms|MB|GB|)", re.ASCII)
EXAMPLE = "accuracy>=-1%, speed>=2x, size<=0.3x"
HUNDREDTHS = 100.0


@dataclass(frozen=True)
class Clause:
    """One demand: a metric, how it is compared, and with what."""

    metric: str
    sign: str  # ">=" "<=" ">" "<"
    value: float  # in the unit
    unit: str  # "" "%" "x" "ms" "MB" "GB"
    change: bool  # from the model as it is

    def __str__(self) -> str:
        """Return it as it was written."""
        plus = "+" if self.change and self.value >= 0 else ""
        return f"{self.metric}{self.sign}{plus}{self.value:g}{self.unit}"

    def limit(self, base: float) -> float:
        """Return the number that is the bound, for a model whose own is `base`."""
        if self.unit == "x":
            return self.value * base
        if self.change:
            share = self.value / HUNDREDTHS if self.unit == "%" else self.value
            points = self.unit == "" or (self.metric not in COSTS and 0 <= base <= 1)
            return base + share if points else base * (1 + share)
        if self.unit == "%":
            return self.value / HUNDREDTHS * (base if self.metric in COSTS else 1)
        return self.value * {"GB": 1000}.get(self.unit, 1)

    def holds(self, found: Mapping[str, float], base: Mapping[str, float]) -> bool:
        """Say whether a candidate keeps it."""
        value, bound = found[self.metric], self.limit(base[self.metric])
        slack = 1e-9 * max(abs(bound), 1e-9)  # of rounding
        if self.sign in (">=", ">"):
            return value >= bound - slack if self.sign == ">=" else value > bound + slack
        return value <= bound + slack if self.sign == "<=" else value < bound - slack


def read_budget(text: str, metrics: Sequence[str]) -> list[Clause]:
    """Return the clauses of a budget; raise InputError, with the nearest metric, for one that cannot be measured."""
    known, clauses = [*dict.fromkeys([*metrics, *COSTS])], []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = CLAUSE.fullmatch(part)
        if found is None:
            raise InputError("this is no demand of a budget", found=part, expected=f"METRIC>=VALUE, as in {EXAMPLE}")
        metric, sign, plus, digits, unit = found.groups()
        if metric not in known:
            raise InputError(f"a budget cannot ask for {metric!r}", found=part, expected=", ".join(known),
                             fix=did_you_mean(metric, known).strip())  # fmt: skip
        if unit in ("ms", "MB", "GB") and unit not in UNITS.get(metric, ()):
            raise InputError(f"{metric} has no {unit}", found=part,
                             expected=" or ".join([*UNITS.get(metric, ()), "%", "x"]))  # fmt: skip
        if metric in ("speed", "throughput") and unit not in ("x", "%"):
            raise InputError(f"{metric} is compared with the model as it is", found=part, expected=f"{metric}>=2x")
        if plus and unit == "x":
            raise InputError("a multiple has no sign", found=part, expected=f"{metric}{sign}{digits}x")
        value = -float(digits) if plus == "-" else float(digits)
        clauses.append(Clause(metric, sign, value, unit, bool(plus)))
    if not clauses:
        raise InputError("the budget is empty", expected=EXAMPLE)
    return clauses
