"""Smaller models side by side: measured in turn with the model as it is, compared, and one chosen. Torch-free.

The best of those that keep a budget is the one with the least size times time; of equal ones the better score.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmworks.base.chart import Chart
from lmworks.base.report import Cell, Table
from lmworks.compress.budget import COSTS, Clause

LOWER = ("perplexity", "loss", "mse", "mae", "bits_per_byte")  # scores of which less is better
KINDS = ("floats", "whole numbers", "fewer weights", "graphs")
FREE = 0.01  # points of a score that a recommendation may cost where no budget says otherwise


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A smaller model in its folder, and what was measured of it: `found` has score, costs and ratios by name."""

    name: str
    kind: str
    what: str  # how it was made, in words
    folder: Path | None = None
    dtype: str = "auto"  # that its answers are computed in
    found: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""  # why it could not be made

    def to_dict(self) -> dict[str, Any]:
        """Return it for a report."""
        said = {"name": self.name, "kind": self.kind, "what": self.what, "dtype": self.dtype}
        return {**said, **({"failed": self.failed} if self.failed else dict(self.found))}


def time_in_turn(
    one: Callable[[int], Any], other: Callable[[int], Any], *, inputs: int, rounds: int
) -> tuple[float, float]:
    """Return the mean seconds of two functions over some inputs, by their number: the least of several rounds of each.

    Both are called in turn, each first in every other round, so that what else the machine does, which can only add to
    a time, falls on both. A first call each does not count.
    """
    one(0), other(0)
    least = [[math.inf, math.inf] for _ in range(inputs)]
    for turn in range(rounds):
        for i in range(inputs):
            for number in (0, 1) if (turn + i) % 2 else (1, 0):
                began = time.perf_counter()
                (one, other)[number](i)
                least[i][number] = min(least[i][number], time.perf_counter() - began)
    return statistics.fmean(pair[0] for pair in least), statistics.fmean(pair[1] for pair in least)


def broken(candidate: Candidate, base: Candidate, clauses: Sequence[Clause]) -> list[str]:
    """Return the clauses that a candidate does not keep."""
    return [str(clause) for clause in clauses if not clause.holds(candidate.found, base.found)]


def choose(
    candidates: Sequence[Candidate], base: Candidate, clauses: Sequence[Clause], metric: str
) -> Candidate | None:
    """Return the best candidate that keeps the budget, None where none does."""
    kept = [one for one in candidates if not one.failed and not broken(one, base, clauses)]
    return min(kept, key=lambda one: (price(one), -gain(one, metric)), default=None)


def price(one: Candidate) -> float:
    """Return size times time, as shares of the model as it is."""
    return one.found["size_share"] / one.found["speed"]


def gain(one: Candidate, metric: str) -> float:
    """Return a score that grows as the model gets better."""
    return -one.found[metric] if metric in LOWER else one.found[metric]


def frontier(candidates: Sequence[Candidate], metric: str) -> list[str]:
    """Return the names that no other beats in score, size and speed at once."""

    def beats(a: Candidate, b: Candidate) -> bool:
        pairs = [
            (gain(a, metric), gain(b, metric)), (-a.found["size"], -b.found["size"]),
            (a.found["speed"], b.found["speed"]),
        ]  # fmt: skip
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    made = [one for one in candidates if not one.failed]
    return [one.name for one in made if not any(beats(other, one) for other in made)]


def recommend(
    candidates: Sequence[Candidate], base: Candidate, metric: str, quality: Sequence[Clause]
) -> dict[str, str]:
    """Return a sentence for each scenario, from the measured numbers: server, edge and browser.

    `quality` are the budget's demands on scores; without any a model may lose a hundredth.
    """
    most = base.found[metric] * FREE if metric in LOWER else FREE
    least = gain(base, metric) - most

    def is_good(one: Candidate) -> bool:
        return not broken(one, base, quality) if quality else gain(one, metric) >= least

    good = [one for one in candidates if not one.failed and is_good(one)]
    scenes: dict[str, tuple[list[Candidate], Callable[[Candidate], float], str]] = {
        "server": (good, lambda one: -one.found["throughput"], "the most texts a second"),
        "edge": (good, lambda one: one.found["size_share"] * one.found["memory_share"] / one.found["latency_gain"],
                 "the least size, memory and time of one text"),
        "browser": ([one for one in good if one.kind == "graphs"], lambda one: one.found["size"],
                    "the smallest graph to fetch"),
    }  # fmt: skip
    said = {}
    for scene, (choices, key, why) in scenes.items():
        if not choices:
            graphs = any(one.kind == "graphs" and not one.failed for one in candidates)
            none = "no graph keeps the quality" if graphs else "no graph was measured"
            said[scene] = f"nothing here: {none}." if scene == "browser" else "the model as it is."
            continue
        best = min(choices, key=key)
        f = best.found
        said[scene] = (
            f"{best.name}, {why}: {metric} {f[metric]:.4g} ({f[metric] - base.found[metric]:+.2g}), "
            f"{f['size']:.1f} MB, {f['memory']:.0f} MB of memory, {f['latency']:.1f} ms a text, many texts "
            f"{f['throughput']:.2f} times as fast."
        )
    return said


def compare_tables(
    candidates: Sequence[Candidate], base: Candidate, metrics: Sequence[str], clauses: Sequence[Clause]
) -> tuple[Table, Table]:
    """Return one row a candidate: what it is worth, and how fast it is."""
    worth: list[tuple[Cell, ...]] = []
    times: list[tuple[Cell, ...]] = []
    for one in candidates:
        f = one.found
        if one.failed:
            worth.append((one.name, *[None] * (len(metrics) + 3), one.failed))
            continue
        lost = broken(one, base, clauses)
        verdict = "kept" if not lost else "not " + ", ".join(lost)
        worth.append((one.name, *(f[name] for name in metrics), f["size"], f["size_share"], f["memory"], verdict))
        times.append((one.name, f["latency"], f["latency_gain"], f["many"], f["throughput"]))
    columns = ("model", *metrics, "MB", "share", "memory MB", "budget")
    speeds = ("model", "ms a text", "times as fast", "ms of 32", "times as fast")
    return Table("Scores and sizes", columns, tuple(worth)), Table("Times, in turn with fp32", speeds, tuple(times))


def charts(candidates: Sequence[Candidate], metric: str) -> tuple[Chart, ...]:
    """Return the score over size and over time: a dot a candidate, a colour a kind."""
    made, drawn = [one for one in candidates if not one.failed], []
    for cost, label in (("size", "MB on disk"), ("latency", "ms a text")):
        series = tuple(
            (kind, tuple((one.found[cost], one.found[metric]) for one in made if one.kind == kind)) for kind in KINDS
        )
        drawn.append(Chart(f"{metric} over {label}", label, metric, series, dots=True))
    return tuple(drawn)


def quality_of(clauses: Sequence[Clause]) -> list[Clause]:
    """Return the demands on scores."""
    return [clause for clause in clauses if clause.metric not in COSTS]
