"""Run every benchmark row and write RESULTS.md: each row is a ratio against a peer measured in the same run.

    python benchmarks/run.py [--only NAME]

A script beside this file prints a JSON list of rows: {"what", "ours", "peer", "unit", "ratio", "target"}.
`ratio` is above 1 where we are better; `target` is what we want to reach (None: no target).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = ("startup", "load", "decode", "train_step")
PACKAGES = ("lmworks", "torch", "transformers", "onnxruntime", "tokenizers", "numpy")


def processor() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    """Run the scripts one after the other, print the rows, rewrite RESULTS.md when all were run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SCRIPTS)
    only = parser.parse_args().only
    rows = []
    for name in [only] if only else SCRIPTS:
        done = subprocess.run([sys.executable, str(HERE / f"{name}.py")], stdout=subprocess.PIPE, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
    lines = ["| what | ours | peer | ratio | target |", "|--|--|--|--|--|"]
    for row in rows:
        target = "" if row["target"] is None else f"{row['target']:g}×"
        lines.append(
            f"| {row['what']} | {row['ours']:.4g} {row['unit']} | {row['peer']:.4g} {row['unit']} "
            f"| {row['ratio']:.2f}× | {target} |"
        )
    table = "\n".join(lines)
    print(table)
    if only is None:
        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        (HERE / "RESULTS.md").write_text(
            "# Benchmark results\n\n"
            "Written by `make bench`. Ours and the peer alternate in one run; ratios above 1 mean that ours is better. "
            "Absolute figures depend on the machine; compare ratios only.\n\n"
            f"{date.today().isoformat()}, {processor()}, Python {platform.python_version()}, {versions}\n\n{table}\n",
            encoding="utf-8",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
