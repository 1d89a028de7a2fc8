"""What `lmworks monitor fit` and `check` show: tables, reliability and score curves, the statistics over windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.chart import Chart
from lmworks.base.report import Cell, Report, Table

POINTS = 60  # of a drawn curve


@dataclass(frozen=True)
class Measured:
    """What is drawn of a fit."""

    reliability: dict[str, list[tuple[int, float, float]]]  # (texts, confidence, accuracy) of each bin
    inside: NDArray[np.float64]  # scores of held-out texts
    outside: NDArray[np.float64] | None  # of out-of-scope texts


def make_report(title: str, facts: dict[str, Any], measured: Measured) -> Report:
    """Say what was fitted, for programs and for people."""
    rows: list[tuple[Cell, ...]] = [
        (name, value, facts["auroc"].get(name), facts["recall"].get(name), "chosen" if name == facts["score"] else "")
        for name, value in facts["thresholds"].items()
    ]
    columns = ("score", "threshold", "AUROC", "out-of-scope recall", "")
    tables = [Table(f"Out of domain, at {facts['false_alarms']:.1%} false alarms", columns, tuple(rows))]
    charts = [score_chart(measured, facts)]
    notes = [f"The score is {facts['score']}: {facts['why']}."]
    if "calibration" in facts:
        pairs = [(when, found["ece"], found["nll"]) for when, found in facts["calibration"].items()]
        tables.insert(
            0, Table(f"Calibration, temperature {facts['temperature']:.3f}", ("", "ECE", "NLL"), tuple(pairs))
        )
        charts.insert(0, reliability_chart(measured))
        notes.append(
            f"Of the held-out texts {facts['accuracy']:.1%} are labelled right, {facts['accuracy_kept']:.1%} where one "
            "that is flagged counts as wrong."
        )
    values = {name: value for name, value in facts.items() if name != "files"}
    return Report(f"{title}: monitor", values, tuple(tables), tuple(charts), notes=tuple(notes))


def reliability_chart(measured: Measured) -> Chart:
    """Draw accuracy over confidence."""
    series = [(name, tuple((said, right) for _, said, right in bins)) for name, bins in measured.reliability.items()]
    diagonal = ("ideal", ((0.0, 0.0), (1.0, 1.0)))
    return Chart("Reliability: accuracy of held-out texts by confidence, 15 bins", "confidence", "accuracy",
                 (*series, diagonal))  # fmt: skip


def score_chart(measured: Measured, facts: dict[str, Any]) -> Chart:
    """Draw which share of texts scores at most so much."""
    lines = [("held out", measured.inside)]
    lines += [] if measured.outside is None else [("out of scope", measured.outside)]
    series = tuple((name, quantiles(values)) for name, values in lines)
    edge = ("threshold", ((facts["threshold"], 0.0), (facts["threshold"], 1.0)))
    return Chart(f"Share of texts by {facts['score']} score", facts["score"], "share", (*series, edge))


def quantiles(values: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    """Return points of a distribution function."""
    shares = np.linspace(0, 1, POINTS)
    return tuple(zip(np.quantile(values, shares).tolist(), shares.tolist(), strict=True))
