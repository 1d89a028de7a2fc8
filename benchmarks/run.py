"""Run every benchmark row and write RESULTS.md: each row is a ratio against a peer measured in the same run.

    python benchmarks/run.py [--only NAME]

A script beside this file prints a JSON list of rows: {"what", "ours", "peer", "unit", "ratio", "target"}.
`ratio` is above 1 where we are better; `target` is what we want to reach (None: no target). What is not run again
stays in RESULTS.md as it was measured.
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
SCRIPTS = (
    "startup",
    "cold",
    "load",
    "full_size",
    "encode",
    "graphs",
    "decode",
    "train_step",
    "lora",
    "flavors",
    "image",
)
PACKAGES = ("lmworks", "torch", "transformers", "peft", "onnxruntime", "tokenizers", "numpy")


def processor() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    """Run the scripts one after the other; what is measured is written after each, and the rest stays as it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SCRIPTS, action="append")
    failed = []
    for name in parser.parse_args().only or SCRIPTS:
        load = os.getloadavg()[1]
        done = subprocess.run([sys.executable, str(HERE / f"{name}.py")], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(name)
            continue
        rows = json.loads(done.stdout.splitlines()[-1])
        print("\n".join(map(show, rows)), flush=True)
        write(name, {"when": when(load), "rows": rows})
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def when(load: float) -> str:
    """Return the day, the machine, how busy it was before, and the versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{date.today().isoformat()}, {processor()}, load {load:.1f} on {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {versions}"
    )


def show(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    target = "" if row["target"] is None else f"{row['target']:g}×"
    ours, peer = (f"{row[side]:.4g} {row['unit']}" for side in ("ours", "peer"))
    return f"| {row['what']} | {ours} | {peer} | {row['ratio']:.2f}× | {target} |"


def write(name: str, section: dict[str, Any]) -> None:
    """Put a script's rows into results.json, and write RESULTS.md from all of it."""
    kept = HERE / "results.json"
    sections = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    sections[name] = section
    kept.write_text(json.dumps(sections, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    parts = [
        "# Benchmark results\n\n"
        "Written by `make bench`. Ours and the peer alternate in one run; ratios above 1 mean that ours is better. "
        "Absolute figures depend on the machine and on what else it does; compare ratios only.\n"
    ]
    for script in SCRIPTS:
        if script not in sections:
            parts.append(f"## {script}\n\nNot measured yet.\n")
            continue
        lines = ["| what | ours | peer | ratio | target |", "|--|--|--|--|--|", *map(show, sections[script]["rows"])]
        parts.append(f"## {script}\n\n{sections[script]['when']}\n\n" + "\n".join(lines) + "\n")
    (HERE / "RESULTS.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
