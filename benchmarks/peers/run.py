"""Time ours beside peers, each in an environment of its own, in turn; write results.json and RESULTS.md beside it.

    python benchmarks/peers/prepare.py all
    python benchmarks/peers/run.py [--only TEXT] [--threads 2] [--rounds 7] [--without TEXT] [--tiny --out FOLDER]

A race is one task, model and precision. Its contestants start one after the other, answer once, and count only when
their logits are near those of transformers in float32. Then they take turns: figures are medians over the rounds, and
a ratio is the median of the ratios within a round, between the best of ours and the peer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from models import make_model
from prepare import BUILD, is_prepared, python
from race import Contestant, Outcome, race
from table import write_table

HERE = Path(__file__).parent
LIMITS = {
    "fp32": 2e-3,
    "16-bit": 0.03,
    "int8": 0.1,
    "int4": 0.5,
}  # of the logits, relative; llama.cpp rounds inside attention
TINY = {"llama-110m": "llama-tiny", "gpt2-124m": "gpt2-tiny", "bert-base": "bert-tiny", "llama-17m": "llama-tiny",
        "gpt2-17m": "gpt2-tiny"}  # fmt: skip
PEERS: dict[str, tuple[str, str]] = {  # name in a table -> script, environment
    "ours": ("work_ours.py", ""),
    "transformers": ("work_transformers.py", "transformers"),
    "llama.cpp": ("work_llama_cpp.py", "llama_cpp"),
    "CTranslate2": ("work_ctranslate2.py", "ctranslate2"),
    "onnxruntime-genai": ("work_genai.py", "genai"),
    "OpenVINO": ("work_openvino.py", "openvino"),
    "ONNX Runtime": ("work_onnxruntime.py", "optimum"),
    "our graph": ("work_browser.py", ""),
    "optimum's graph": ("work_browser.py", ""),
}
Entry = tuple[str, str, dict[str, Any]]  # peer, its setting in words, what its worker must know


@dataclass
class Race:
    """One task, model and precision, and who takes part."""

    task: str  # "decode", "one row", "ragged", "browser"
    model: str
    precision: str
    entries: list[Entry]
    threads: int | None = None  # None: what the command line says

    def name(self, threads: int) -> str:
        what = {"decode": "decode", "browser": "decode in Chromium", "one row": "1 × 128 tokens",
                "ragged": "32 rows of 8 to 256 tokens"}[self.task]  # fmt: skip
        return f"{self.model}, {what}, {self.precision}, {threads} thread{'s' * (threads > 1)}"


DECODE: dict[str, list[Entry]] = {
    "fp32": [
        ("ours", "torch fp32", {"runtime": "torch", "dtype": "fp32"}),
        ("ours", "onnx fp32", {"runtime": "onnx", "dtype": "fp32"}),
        ("transformers", "generate, fp32", {"dtype": "fp32"}),
        ("transformers", "static cache, compiled, fp32", {"dtype": "fp32", "compiled": True}),
        ("llama.cpp", "F32", {"type": "F32"}),
        ("CTranslate2", "float32", {"compute": "float32"}),
        ("onnxruntime-genai", "fp32", {"precision": "fp32"}),
    ],
    "16-bit": [
        ("ours", "torch bf16", {"runtime": "torch", "dtype": "bf16"}),
        ("transformers", "generate, bf16", {"dtype": "bf16"}),
        ("transformers", "static cache, compiled, bf16", {"dtype": "bf16", "compiled": True}),
        ("llama.cpp", "F16", {"type": "F16"}),
        ("llama.cpp", "BF16", {"type": "BF16"}),
        ("CTranslate2", "bfloat16", {"compute": "bfloat16"}),
    ],
    "int8": [
        ("ours", "onnx int8", {"runtime": "onnx", "dtype": "int8"}),
        ("llama.cpp", "Q8_0", {"type": "Q8_0"}),
        ("CTranslate2", "int8_float32", {"compute": "int8_float32"}),
        ("onnxruntime-genai", "int8", {"precision": "int8"}),
    ],
    "int4": [
        ("ours", "onnx q4", {"runtime": "onnx", "dtype": "q4"}),
        ("llama.cpp", "Q4_0", {"type": "Q4_0"}),
        ("onnxruntime-genai", "int4, accuracy level 4",
         {"precision": "int4", "extra": ["int4_accuracy_level=4", "int4_block_size=32"]}),
    ],
}  # fmt: skip


def encode(precision: str, sizes: Sequence[int | None]) -> list[Entry]:
    """Return who encodes at this precision; peers with each size of batch."""
    ours: dict[str, list[Entry]] = {
        "fp32": [
            ("ours", "torch fp32", {"runtime": "torch", "dtype": "fp32"}),
            ("ours", "onnx fp32", {"runtime": "onnx", "dtype": "fp32"}),
        ],
        "16-bit": [("ours", "torch bf16", {"runtime": "torch", "dtype": "bf16"})],
        "int8": [("ours", "onnx int8", {"runtime": "onnx", "dtype": "int8"})],
    }
    peers: dict[str, list[Entry]] = {
        "fp32": [
            ("transformers", "fp32", {"dtype": "fp32"}),
            ("OpenVINO", "f32", {"hint": "f32"}),
            ("ONNX Runtime", "fp32", {"dtype": "fp32"}),
        ],
        "16-bit": [
            ("transformers", "fp32, matmul precision medium", {"dtype": "fp32", "medium": True}),
            ("transformers", "bf16", {"dtype": "bf16"}),
            ("OpenVINO", "bf16", {"hint": "bf16"}),
        ],
        "int8": [("ONNX Runtime", "dynamic int8", {"dtype": "int8"})],
    }
    words = {None: ", padded as they come"} if sizes == [None] else {}
    entries = list(ours[precision])
    for peer, setting, how in peers[precision]:
        for size in sizes:
            batch = "" if words else ", padded as they come" if size is None else f", sorted, batches of {size}"
            entries.append((peer, setting + batch, {**how, "batch": size}))
    return entries


def browser(dtype: str) -> list[Entry]:
    """Return both graphs in Chromium."""
    return [(f"{who} graph", dtype, {"graph": graph, "dtype": dtype})
            for who, graph in (("our", "ours"), ("optimum's", "optimum"))]  # fmt: skip


RACES = [
    *(Race("decode", model, precision, entries)
      for model in ("llama-110m", "gpt2-124m") for precision, entries in DECODE.items()),
    *(Race("one row", "bert-base", precision, encode(precision, [None])) for precision in ("fp32", "16-bit", "int8")),
    *(Race("ragged", "bert-base", precision, encode(precision, [None, 4])) for precision in ("fp32", "16-bit", "int8")),
    *(Race("browser", model, {"fp32": "fp32", "q8": "int8"}[dtype], browser(dtype), threads)
      for model in ("llama-17m", "gpt2-17m") for dtype in ("fp32", "q8") for threads in (1, 2)),
]  # fmt: skip


def main() -> int:
    """Run the races; results are written after each, beside those of earlier runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="races whose name has this text; several: all of them")
    parser.add_argument(
        "--without", action="append", default=[], help="leave contestants out whose setting has this text"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="tiny models: does it run at all?")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and RESULTS.md")
    a = parser.parse_args()
    path = a.out / "results.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for chosen in RACES:
        model = TINY[chosen.model] if a.tiny else chosen.model
        threads = chosen.threads or a.threads
        name = chosen.name(threads).replace(chosen.model, model)
        if a.only and not all(text in name for text in a.only):
            continue
        entries = [
            entry for entry in chosen.entries if not any(text in f"{entry[0]}: {entry[1]}" for text in a.without)
        ]
        known[name] = measure(replace(chosen, model=model, entries=entries), threads, a.rounds)
        path.write_text(json.dumps(known, indent=1) + "\n")
        write_table(known, a.out / "RESULTS.md")
        print(name, *(show(row) for row in known[name]["rows"]), sep="\n  ", flush=True)
    return 0


def measure(chosen: Race, threads: int, rounds: int) -> dict[str, Any]:
    """Run one race; return its rows and the state of the machine."""
    folder = BUILD / "models" / chosen.model
    task = make_model(chosen.model, folder)["tasks"]["decode" if chosen.task == "browser" else chosen.task]
    setting = {**task["setting"], "model": str(folder), "threads": threads,
               "task": "decode" if "tokens" in task["setting"] else "encode"}  # fmt: skip
    present, absent = [], []
    for peer, words, how in chosen.entries:
        script, environment = PEERS[peer]
        program = str(python(environment)) if environment else sys.executable
        command = [program, str(HERE / script)]
        who = Contestant(f"{peer}: {words}", command, how, ours=peer in ("ours", "our graph"))
        if environment and not is_prepared(environment):
            absent.append(Outcome(who, problem=f"not installed: prepare.py {environment}"))
        else:
            present.append(who)
    loads = [os.getloadavg()[0]]
    outcomes = race(
        present, setting, task["reference"], rounds=rounds, limit=LIMITS[chosen.precision],
        logs=BUILD / "logs" / chosen.name(threads).replace(" ", "-").replace(",", ""),
    )  # fmt: skip
    loads.append(os.getloadavg()[0])
    unit = "tokens/s" if setting["task"] == "decode" else "rows/s"
    return {"date": date.today().isoformat(), "loads": loads, "cores": os.cpu_count(), "rounds": rounds, "unit": unit,
            "tokens": task["setting"].get("tokens"), "rows": make_rows([*outcomes, *absent])}  # fmt: skip


def make_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return a row a contestant: its figures and distance, and how much faster the best of ours is."""
    ours = [outcome for outcome in outcomes if outcome.contestant.ours and outcome.problem is None]
    best = max(ours, key=lambda outcome: outcome.median, default=None)
    rows = []
    for outcome in outcomes:
        row: dict[str, Any] = {"who": outcome.contestant.name, "ours": outcome.contestant.ours}
        row |= {key: getattr(outcome, key) for key in ("distance", "equal", "problem")}
        row["problem"] = row["problem"] and row["problem"].replace(f"{BUILD.parents[1]}/", "")
        if outcome.problem is None and outcome.figures:
            row |= {"figures": outcome.figures, "median": outcome.median}
            if best and not outcome.contestant.ours:
                ratios = sorted(a / b for a, b in zip(best.figures, outcome.figures, strict=True))
                row |= {"ratio": statistics.median(ratios), "ratios": [ratios[0], ratios[-1]]}
        rows.append(row)
    return rows


def show(row: dict[str, Any]) -> str:
    """Return a row in one line."""
    if row["problem"]:
        return f"{row['who']}: {row['problem']}"
    ratio = f", ours is {row['ratio']:.2f}x" if "ratio" in row else ""
    return f"{row['who']}: {row['median']:.4g}{ratio}, distance {row['distance']:.1e}, equal {row['equal']}"


if __name__ == "__main__":
    sys.exit(main())
