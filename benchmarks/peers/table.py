"""The results as a page of tables."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from prepare import HERE


def write_table(results: dict[str, Any], path: Path) -> None:
    """Write every race as a table: medians with the slowest and fastest round, ratios with theirs."""
    lines = [
        "# Ours beside peers, each in an environment of its own",
        "",
        "Written by `benchmarks/peers/run.py`. Weights are random and the same for all; a contestant counts when its "
        "logits are near those of transformers in float32 (distance: |a − b| / |b|; equal: greedy tokens before the "
        "first that differs; from 16 bits on random weights soon part). All of a race take turns; the figure is the "
        "median of the rounds, with the slowest and the fastest. *ours ÷ it* is the median of the ratios within a "
        "round between the best of ours and the peer: above 1, ours is faster. Compare only within a table.",
        "",
        f"Machine: {processor()}, {platform.system()}, Python {platform.python_version()}. Peers: "
        + "; ".join(sorted(pinned()))
        + ".",
    ]
    for name, race in results.items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{race['date']}, {race['rounds']} rounds, load {race['loads'][0]:.1f} before and {race['loads'][1]:.1f} "
            f"after on {race['cores']} cores",
            "",
            f"| | {race['unit']} | ours ÷ it | distance | equal |",
            "|--|--|--|--|--|",
            *(line(row, race) for row in race["rows"]),
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def line(row: dict[str, Any], race: dict[str, Any]) -> str:
    """Return one line of a table."""
    who = f"**{row['who']}**" if row["ours"] else row["who"]
    distance = "" if row["distance"] is None else f"{row['distance']:.0e}"
    equal = "" if row["equal"] is None else f"{row['equal']} of {race['tokens']}"
    if row["problem"]:
        problem = row["problem"].replace("|", "/")
        return f"| {who} | {problem} | | {distance} | {equal} |"
    spread = f"{row['median']:.4g} ({min(row['figures']):.4g} to {max(row['figures']):.4g})"
    ratio = f"{row['ratio']:.2f}× ({row['ratios'][0]:.2f} to {row['ratios'][1]:.2f})" if "ratio" in row else ""
    return f"| {who} | {spread} | {ratio} | {distance} | {equal} |"


def pinned() -> set[str]:
    """Return what the requirements files pin."""
    lines = [line for path in (HERE / "requirements").glob("*.txt") for line in path.read_text().splitlines()]
    return {line.replace("==", " ") for line in lines if "==" in line}


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    for entry in info.read_text().splitlines() if info.exists() else []:
        if entry.startswith("model name"):
            return entry.partition(":")[2].strip()
    return platform.processor() or platform.machine()
