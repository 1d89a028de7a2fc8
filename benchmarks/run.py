"""Run every benchmark row and write RESULTS.md: each row is a ratio against a peer measured in the same run.

    python benchmarks/run.py [--only NAME]

A script beside this file prints a JSON list of rows: {"what", "ours", "peer", "unit", "ratio", "target"}.
`ratio` is above 1 where we are better; `target` is what we want to reach (None: no target).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPTS = ("startup", "cold", "load", "full_size", "encode", "graphs", "decode", "train_step", "lora")
PACKAGES = ("lmworks", "torch", "transformers", "peft", "onnxruntime", "tokenizers", "numpy")


def processor() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    """Run the scripts one after the other; RESULTS.md is rewritten after each, so that nothing measured is lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SCRIPTS, action="append")
    chosen = parser.parse_args().only or SCRIPTS
    lines = ["| what | ours | peer | ratio | target |", "|--|--|--|--|--|"]
    failed = []
    for name in chosen:
        done = subprocess.run([sys.executable, str(HERE / f"{name}.py")], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(name)
        else:
            lines += [show(row) for row in json.loads(done.stdout.splitlines()[-1])]
        print("\n".join(lines), flush=True)
        write(
            lines, not_measured=[other for other in SCRIPTS if other not in chosen[: chosen.index(name) + 1]] + failed
        )
    return 1 if failed else 0


def show(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    target = "" if row["target"] is None else f"{row['target']:g}×"
    ours, peer = (f"{row[side]:.4g} {row['unit']}" for side in ("ours", "peer"))
    return f"| {row['what']} | {ours} | {peer} | {row['ratio']:.2f}× | {target} |"


def write(lines: list[str], *, not_measured: list[str]) -> None:
    """Write RESULTS.md with the machine, the versions and what is missing."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    missing = f"\nNot measured in this run: {', '.join(not_measured)}.\n" if not_measured else ""
    (HERE / "RESULTS.md").write_text(
        "# Benchmark results\n\n"
        "Written by `make bench`. Ours and the peer alternate in one run; ratios above 1 mean that ours is better. "
        "Absolute figures depend on the machine and on what else it does; compare ratios only.\n\n"
        f"{date.today().isoformat()}, {processor()}, load {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {versions}\n\n" + "\n".join(lines) + f"\n{missing}",
        encoding="utf-8",
    )


if __name__ == "__main__":
    sys.exit(main())
