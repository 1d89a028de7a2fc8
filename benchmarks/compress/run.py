"""Make real models smaller in every way and write one page: MiniLM on SST-2 and CLINC150, a decoder on books.

    LMWORKS_DATA=… python benchmarks/compress/run.py --models FOLDER [--only sst2 …] [--epochs 1] [--rows 500]

`--models` holds the fine-tuned sst2-full and clinc150 of benchmarks/finetuning; the decoder is built from books/ where
the work folder has none, and each model is distilled to half of its layers once. Every model is one call of `lmworks
prune --budget`, which measures all candidates on the test split; its numbers stay in the work folder, and
docs/compress-results.md is written of all that lie there. `--rows` takes so many training and test rows, to try it, and
prints the page instead.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmworks.base.files import write_json
from lmworks.base.threads import thread_count

COLUMNS = ("size", "size_share", "memory", "latency", "latency_gain", "many", "throughput", "agreement")
TITLES = ("MB", "share", "memory MB", "ms a text", "times as fast", "ms of 32", "times as fast", "agreement")
Report = dict[str, Any]
PAGE = Path(__file__).parents[2] / "docs" / "compress-results.md"
INTRO = """# Small models, measured

Written by `benchmarks/compress/run.py`: a published MiniLM, fine-tuned on SST-2 and on CLINC150, and a GPT-2 of four
layers trained on the books of `LMWORKS_DATA`, made smaller in every way that `--budget` knows; one seed.

The score is that of the test split, which no model has seen (of each book the last tenth), at the tuned model's own
tokens. `agreement` is the share of answers that stay what fp32 said. Times are the least of several turns beside fp32,
in {threads} thread(s); `memory` is the peak of a process that opens the folder and answers. What is trained again
(`pruned-50`, `neurons-…`, `low-rank-80` and the distilled model, of half the layers) had one epoch. The decoder had
been trained for 600 steps only: an epoch more is worth more to it than what is taken away."""


@dataclass(frozen=True)
class Case:
    """A model, what it is fine-tuned on, what it is judged by, and how much it may lose."""

    name: str
    model: Path
    train: Path
    test: Path
    budget: str
    layers: int  # of the distilled one
    lr: str


def main() -> None:
    """Run the cases that are asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/compress"))
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--epochs", default="1")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--candidates", default="")
    given = parser.parse_args()
    data = Path(os.environ["LMWORKS_DATA"])
    given.work.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        case = CASES[name](data, given.models, given.work, given.rows)
        write_json(given.work / f"{name}.json", compress(case, given.work, given.epochs, given.candidates))
    known = {name: given.work / f"{name}.json" for name in CASES}
    pages = [to_markdown(name, json.loads(path.read_text())) for name, path in known.items() if path.is_file()]
    if given.rows or given.candidates:
        print("\n\n".join(pages))
    else:
        PAGE.write_text("\n\n".join([INTRO.format(threads=thread_count()), *pages]) + "\n", encoding="utf-8")


def sst2(data: Path, models: Path, work: Path, rows: int | None) -> Case:
    """Sentences of film reviews."""
    parts = {}
    for part in ("train", "test"):
        lines = [line.rsplit("\t", 1) for line in (data / f"sst2/{part}.tsv").read_text().splitlines()]
        parts[part] = write_csv(work / f"sst2_{part}.csv", lines, rows)
    return Case("sst2", models / "sst2-full", parts["train"], parts["test"], "accuracy>=-1%, size<=0.5x", 3, "5e-5")


def clinc(data: Path, models: Path, work: Path, rows: int | None) -> Case:
    """150 intents, in scope; a few rows are a few of each."""
    whole = json.loads((data / "clinc150/data_full.json").read_text())
    parts = {part: write_csv(work / f"clinc_{part}.csv", whole[part], rows) for part in ("train", "test")}
    return Case("clinc150", models / "clinc150", parts["train"], parts["test"], "accuracy>=-1%, size<=0.5x", 3, "1e-4")


def books(data: Path, models: Path, work: Path, rows: int | None) -> Case:
    """A decoder: the last tenth of each book is what it is judged by and never sees."""
    train, test = work / "books_train.txt", work / "books_test.txt"
    texts = [path.read_text(encoding="utf-8") for path in sorted((data / "books").glob("*.txt"))]
    ends = [len(text) - len(text) // 10 for text in texts]
    most = None if rows is None else 100 * rows
    train.write_text("\n\n".join(text[:end][:most] for text, end in zip(texts, ends, strict=True)), encoding="utf-8")
    test.write_text("\n\n".join(text[end:][:most] for text, end in zip(texts, ends, strict=True)), encoding="utf-8")
    model = work / "books"
    if not model.is_dir():
        run("build", str(train), "-o", str(model), "--runtimes", "torch", "--family", "gpt2")
    return Case("books", model, train, test, "perplexity<=+2%, size<=0.5x", 2, "2e-4")


CASES = {"sst2": sst2, "clinc150": clinc, "books": books}


def write_csv(path: Path, pairs: list[list[str]], rows: int | None) -> Path:
    """Write texts and labels; `rows` of them, evenly spread, but every label once at least."""
    step = max(len(pairs) // rows, 1) if rows else 1
    first = {label: i for i, (_, label) in reversed(list(enumerate(pairs)))}
    kept = sorted({*range(0, len(pairs), step), *first.values()})
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *(pairs[i] for i in kept)])
    return path


def compress(case: Case, work: Path, epochs: str, candidates: str) -> Report:
    """Distil once, then measure every way."""
    student, out = work / f"{case.name}-distilled", work / f"{case.name}-small"
    if not student.is_dir():
        run("distill", str(case.model), str(case.train), "-o", str(student), "--layers", str(case.layers),
            "--epochs", epochs, "--lr", case.lr)  # fmt: skip
    return run("prune", str(case.model), "-o", str(out), "--overwrite", "--data", str(case.train), "--validation",
               str(case.test), "--epochs", epochs, "--lr", case.lr, "--budget", case.budget, "--also", str(student),
               *(["--candidates", candidates] if candidates else []))  # fmt: skip


def run(*arguments: str) -> Report:
    """Run a verb; return what --json prints. A refused budget, 1, has its numbers too."""
    command = [sys.executable, "-m", "lmworks", *arguments, "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}")
    report: Report = json.loads(done.stdout)
    return report


def to_markdown(name: str, report: Report) -> str:
    """Return a table of every candidate, and what the report recommends."""
    metric, budget = report["metric"], ", ".join(report["budget"])
    outcome = f"picked `{report['picked']}`" if report["picked"] else "was refused"
    lines = [f"## {name}", "", f"`{budget}` {outcome}.", "",
             "| model | " + " | ".join((metric, *TITLES)) + " |", "|--|" + "--|" * (len(TITLES) + 1)]  # fmt: skip
    for row in report["candidates"]:
        numbers = [row.get(name) for name in (metric, *COLUMNS)]
        shown = ["" if number is None else f"{number:.4g}" for number in numbers]
        lines.append("| " + " | ".join([row["name"], *shown, *([row["failed"]] if "failed" in row else [])]) + " |")
    said = [f"- {scene}: {text}" for scene, text in report["recommendations"].items()]
    return "\n".join([*lines, "", f"On the frontier: {', '.join(report['frontier'])}.", "", *said])


if __name__ == "__main__":
    main()
