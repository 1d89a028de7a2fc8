"""A load test as a report: tables for the terminal, values for programs, charts for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmworks.base.chart import Chart
from lmworks.base.report import Report, Table, counted
from lmworks.serve.load_requests import Plan

BUSY = 0.85  # of a processor: from there on the client may be what is slow
NAMES = {"latency": "whole answer", "first_token": "first token", "per_token": "each further token"}
KEYS = ("p50", "p90", "p95", "p99", "max", "mean")


def make_report(url: str, plan: Plan, steps: Sequence[dict[str, Any]], *, curve: bool) -> Report:
    """Return the report of one load, or of the steps of a curve."""
    best = max(steps, key=lambda step: float(step["requests_per_second"]))
    values: dict[str, Any] = {"url": url, "route": plan.route, "model": plan.model, "task": plan.task}
    values |= {"texts": len(plan.bodies)} | {key: value for key, value in best.items() if key != "times"}
    if curve:
        values["curve"] = [{key: value for key, value in step.items() if key != "times"} for step in steps]
    return Report(
        f"Load of {plan.route} at {url}", values,
        tables=((curve_table(steps),) if curve else ()) + (times_table(best), facts_table(best)),
        charts=curve_charts(steps) if curve else dots(best), notes=tuple(notes(plan, best, curve=curve)),
    )  # fmt: skip


def amount(step: dict[str, Any]) -> str:
    """Return what was asked in words."""
    if step["rate"] is not None:
        return f"{step['rate']:g} requests a second, arriving independently"
    return f"{counted(step['clients'], 'client')}, each asking again when answered"


def times_table(step: dict[str, Any]) -> Table:
    """Return the times in milliseconds."""
    rows = tuple(
        (name, *(1000 * step[key][column] for column in KEYS)) for key, name in NAMES.items() if step[key] is not None
    )
    return Table("Milliseconds" + (" from when it was due" if step["mode"] == "open" else ""), ("", *KEYS), rows)


def facts_table(step: dict[str, Any]) -> Table:
    """Return the counts."""
    rows: list[tuple[str | float | int | None, ...]] = [
        ("load", amount(step)), ("seconds", step["seconds"]), ("requests a second", step["requests_per_second"]),
        ("tokens a second", step["tokens_per_second"]), ("answered", step["succeeded"]), ("failed", step["failed"]),
    ]  # fmt: skip
    rows += [(f"failed: {kind}", number) for kind, number in step["errors"].items()]
    if (server := step["server"]) is not None:
        rows += [("waiting in the server, mean", server["waiting_mean"]),
                 ("waiting in the server, most", server["waiting_most"]),
                 ("rows in a batch, mean", server["rows_a_batch"]),
                 ("memory of the server, MB", server["memory_bytes_most"] / 1e6)]  # fmt: skip
    return Table("Counts", ("", ""), tuple((name, show(value)) for name, value in rows if value is not None))


def show(value: Any) -> str:
    """Print a value of a table whose rows are of different kinds."""
    return value if isinstance(value, str) else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def curve_table(steps: Sequence[dict[str, Any]]) -> Table:
    """Return one row a step."""
    open_loop = steps[0]["mode"] == "open"
    rows = tuple(
        (step["rate"] if open_loop else step["clients"], step["requests_per_second"], step["tokens_per_second"],
         *((1000 * step["latency"][key] for key in ("p50", "p99")) if step["latency"] else (None, None)),
         step["failed"])
        for step in steps
    )  # fmt: skip
    return Table("More and more", ("asked a second" if open_loop else "clients", "answered a second", "tokens a second",
                                   "p50 ms", "p99 ms", "failed"), rows)  # fmt: skip


def curve_charts(steps: Sequence[dict[str, Any]]) -> tuple[Chart, ...]:
    """Return the throughput and the latencies against what was asked."""
    key, axis = ("rate", "requests asked a second") if steps[0]["mode"] == "open" else ("clients", "clients")
    done = tuple((float(step[key]), float(step["requests_per_second"])) for step in steps)
    times = tuple(
        (p, tuple((float(step[key]), 1000.0 * step["latency"][p]) for step in steps if step["latency"]))
        for p in ("p50", "p95", "p99")
    )
    return (Chart("Throughput", axis, "answered a second", (("answered", done),)),
            Chart("Latency", axis, "milliseconds", times))  # fmt: skip


def dots(step: dict[str, Any]) -> tuple[Chart, ...]:
    """Return every answer at its time."""
    points = tuple((at, 1000 * latency) for at, latency in step["times"])
    return (Chart("Latency of each answer", "seconds", "milliseconds", (("answer", points),), dots=True),)


def notes(plan: Plan, step: dict[str, Any], *, curve: bool) -> list[str]:
    """Return what a reader should know."""
    said = []
    if curve:
        said.append(f"Most was answered at {amount(step)}; what follows is of that step.")
    if step["requests"] > len(plan.bodies):
        said.append(f"There are {counted(len(plan.bodies), 'different text')}; they came round again.")
    if step["client"]["processor_share"] > BUSY:
        said.append("The load test itself used a whole processor: the server may be able to do more.")
    return said
