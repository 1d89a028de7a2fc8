"""Fine-tune MiniLM on real data by the command line, beside peers and baselines; each figure is kept as it comes.

    LMWORKS_DATA=… python benchmarks/finetuning/run.py [--only sst2 …] [--seeds 3] [--work FOLDER]

results.jsonl in the work folder holds one line a run; what is there is not run again. docs/finetuning-results.md is
written from it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prepare

HERE = Path(__file__).parent
Row = dict[str, Any]


@dataclass
class Studies:
    """Runs what is not known yet, and remembers it."""

    data: Path
    work: Path
    seeds: int

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.path = self.work / "results.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows: dict[str, Row] = {row["name"]: row for row in map(json.loads, lines)}
        self.model = prepare.minilm(self.work)

    def once(self, name: str, run: Callable[[], Row]) -> Row:
        """Return the figures of a run, from the file if they are there."""
        if name not in self.rows:
            self.rows[name] = {"name": name, **run()}
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[name]) + "\n")
            print(json.dumps(self.rows[name]), flush=True)
        return self.rows[name]

    def tune(
        self, name: str, train: Path, test: list[str], *options: str, seed: int = 0, base: Path | None = None
    ) -> Row:
        """Fine-tune and score by the command line."""

        def run() -> Row:
            out = self.work / name
            shutil.rmtree(out, ignore_errors=True)
            report = lmworks("finetune", str(base or self.model), str(train), *options, "--seed", str(seed),
                             "--overwrite", "-o", str(out))  # fmt: skip
            scores = lmworks("evaluate", str(out), *test)
            keep = ("metrics", "baselines", "train_seconds", "steps", "best_step", "dtype", "trainable", "parameters")
            return {"test": scores["metrics"], **{key: report[key] for key in keep}}

        return self.once(f"{name}-{seed}", run)

    def peer(self, name: str, *options: str, seed: int = 0) -> Row:
        """Fine-tune with the HF Trainer."""

        def run() -> Row:
            done = subprocess.run(
                [sys.executable, str(HERE / "peer.py"), *options, "--seed", str(seed), "--model", str(self.model)],
                check=True, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            row: Row = json.loads(done.stdout.splitlines()[-1])
            return {"test": {"accuracy": row["accuracy"]}, "train_seconds": row["seconds"]}

        return self.once(f"{name}-{seed}", run)


def lmworks(*arguments: str) -> Row:
    """Run a verb; return what --json prints."""
    done = subprocess.run(
        [sys.executable, "-m", "lmworks", *arguments, "--json"], check=True, stdout=subprocess.PIPE, text=True
    )
    report: Row = json.loads(done.stdout)
    return report


def sst2(s: Studies) -> None:
    """Full and LoRA fine-tuning with the same settings as the peer, seed by seed in turn."""
    folder, test = s.data / "sst2", [str(s.data / "sst2" / "test.tsv"), "--no-header"]
    s.once("sst2-bag-of-words", lambda: bag_of_words(folder))
    same = ["--epochs", "2", "--batch-size", "16"]
    ours = [*same, "--no-header", "--task", "text-classification", "--validation", str(folder / "dev.tsv")]
    theirs = [*same, "--train", str(folder / "train.tsv"), "--test", str(folder / "test.tsv")]
    for seed in range(s.seeds):
        for method, lr in (("full", "5e-5"), ("lora", "5e-4")):
            options = ["--method", method, "--lr", lr]
            s.tune(f"sst2-{method}", folder / "train.tsv", test, *ours, *options, seed=seed)
            s.peer(f"sst2-{method}-trainer", *theirs, *options, "--bf16", seed=seed)
        if seed == 0:  # as it comes: fp32
            s.peer("sst2-full-trainer-fp32", *theirs, "--method", "full", "--lr", "5e-5", seed=seed)
            s.tune("sst2-head", folder / "train.tsv", test, *ours, "--method", "head", seed=seed)


def bag_of_words(folder: Path) -> Row:
    """Logistic regression on tf-idf of words and pairs of words."""
    from peer import read
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, test = read(folder / "train.tsv"), read(folder / "test.tsv")
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10, max_iter=1000))
    model.fit(*zip(*train, strict=True))
    return {"test": {"accuracy": float(model.score(*zip(*test, strict=True)))}}


def clinc(s: Studies) -> None:
    """150 intents, in scope."""
    path = s.data / "clinc150" / "data_full.json"
    for seed in range(s.seeds):
        s.tune("clinc150", path, [str(path), "--split", "test"], "--task", "text-classification",
               "--split", "train,val", "--epochs", "5", "--lr", "2e-4", "--batch-size", "32", seed=seed)  # fmt: skip


def wnut(s: Studies) -> None:
    """Emerging entities, six kinds."""
    folder = s.data / "wnut17"
    for seed in range(s.seeds):
        s.tune("wnut17", folder / "train.conll", [str(folder / "test.conll")], "--task", "token-classification",
               "--validation", str(folder / "dev.conll"), "--epochs", "6", "--lr", "2e-4", seed=seed)  # fmt: skip


def ag_news(s: Studies) -> None:
    """Ten thousand news with four topics, against a published bag of words that saw 120,000."""
    train, test = prepare.ag_news(s.data / "ag_news", s.work)
    for seed in range(s.seeds):
        s.tune("ag-news", train, [str(test)], "--task", "text-classification", "--epochs", "2",
               "--lr", "1e-4", "--long", "truncate", "--max-length", "128", seed=seed)  # fmt: skip


def qa(s: Studies) -> None:
    """Questions on single sentences; tested on whole paragraphs of SQuAD."""
    train, test = prepare.qamr(s.data / "qamr", s.work), s.data / "xquad" / "xquad.en.json"
    for seed in range(s.seeds):
        s.tune("qamr-xquad", train, [str(test)], "--task", "question-answering", "--epochs", "2", "--lr", "1e-4",
               "--batch-size", "32", seed=seed)  # fmt: skip
    s.once("xquad-random-spans", lambda: random_spans(test))


def few_shot(s: Studies) -> None:
    """Eight and sixteen sentences of each label, five draws; scored on test, by which nothing is chosen."""
    folder = s.data / "sst2"
    for shots in (8, 16):
        for name, options in (("full", ()), ("contrastive", ("--contrastive",))):

            def run(shots: int = shots, options: tuple[str, ...] = options) -> Row:
                report = lmworks(
                    "finetune", str(s.model), str(folder / "train.tsv"), "--no-header", "--task", "text-classification",
                    "--validation", str(folder / "test.tsv"), "--shots", str(shots), "--draws", "5", "--epochs", "20",
                    "--lr", "5e-5", *options, "--overwrite", "-o", str(s.work / "few-shot"),
                )  # fmt: skip
                return {"tests": report["draws"], "train_seconds": report["train_seconds"]}

            s.once(f"sst2-{shots}-shots-{name}", run)


def distillation(s: Studies) -> None:
    """Three layers of a teacher of six, which is the last one that `sst2` left."""
    folder, teacher = s.data / "sst2", s.work / "sst2-full"
    test = [str(folder / "test.tsv"), "--no-header"]
    s.once("sst2-teacher", lambda: {"test": lmworks("evaluate", str(teacher), *test)["metrics"]})
    for seed in range(s.seeds):

        def run(seed: int = seed) -> Row:
            out = s.work / "sst2-student"
            report = lmworks("distill", str(teacher), str(folder / "train.tsv"), "--no-header", "--layers", "3",
                             "--validation", str(folder / "dev.tsv"), "--epochs", "3", "--lr", "1e-4",
                             "--seed", str(seed), "--overwrite", "-o", str(out))  # fmt: skip
            scores = lmworks("evaluate", str(out), *test)["metrics"]
            shares = {name: report[name] for name in ("kept", "size_share", "time_share")}
            return {"test": {**scores, **shares}, "train_seconds": report["train_seconds"]}

        s.once(f"sst2-student-{seed}", run)


def search(s: Studies) -> None:
    """Rate, batch and epochs of LoRA by successive halving on 2,000 sentences; the winner is scored on test."""
    folder, out = s.data / "sst2", s.work / "sst2-search"
    part = s.work / "sst2_part.tsv"
    part.write_text("".join((folder / "train.tsv").read_text("utf-8").splitlines(keepends=True)[::4]), "utf-8")

    def run() -> Row:
        report = lmworks(
            "tune", str(s.model), str(part), "--no-header", "--task", "text-classification", "--method", "lora",
            "--validation", str(folder / "dev.tsv"), "--search", "halving", "--trials", "16",
            "--space", "lr=1e-4..5e-3:log", "--space", "batch_size=8,16,32", "--space", "epochs=2..4",
            "--storage", str(s.work / "search.db"), "--overwrite", "-o", str(out),
        )  # fmt: skip
        kept = (
            "criterion",
            "best",
            "noise",
            "completed",
            "stopped_early",
            "failed",
            "steps",
            "planned_steps",
            "importance",
        )
        return {"tests": [], **{name: report[name] for name in kept}}

    best = s.once("sst2-search", run)["best"]
    chosen = [("--lr", "lr"), ("--batch-size", "batch_size"), ("--epochs", "epochs")]
    options = [part for option, name in chosen for part in (option, str(best[name]))]
    test = [str(folder / "test.tsv"), "--no-header"]
    for seed in range(s.seeds):
        s.tune("sst2-lora-searched", folder / "train.tsv", test, "--no-header", "--task", "text-classification",
               "--validation", str(folder / "dev.tsv"), "--method", "lora", *options, seed=seed)  # fmt: skip


def random_spans(path: Path) -> Row:
    """Spans as long as the right answer, from anywhere."""
    from lmworks.text.labelled import read_labelled
    from lmworks.training.baseline import majority

    data = read_labelled(path, "question-answering")
    return {"test": majority(data, data)}


STUDIES = {
    "sst2": sst2,
    "few-shot": few_shot,
    "distillation": distillation,
    "search": search,
    "clinc150": clinc,
    "wnut17": wnut,
    "ag-news": ag_news,
    "qamr": qa,
}
ABOUT = """

SST-2: two epochs, batch 16, lr 5e-5 (LoRA rank 8: 5e-4), on both sides with the same schedule and decay; `trainer` is
the HF Trainer, for LoRA with peft, in bf16 as we train, and `trainer-fp32` the same as it comes. A seed of one side
follows the same seed of the other on one machine with two cores. The bag of words is logistic regression on tf-idf of
words and pairs. The seconds are those of a machine that other jobs shared: compare no two of them closely.

Few shots: MiniLM sees eight or sixteen sentences of each label for twenty epochs; the deviation is that of five
draws. These settings were fixed before the first run, and nothing is chosen by the test sentences. `contrastive`
first brings sentences of one label together.

Distillation: students of three layers, cut from the six of one fine-tuned teacher; `kept` and the shares are against
that teacher, `kept` on dev, time measured in turn.
"""


def main() -> int:
    """Run the studies, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=STUDIES, action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("build") / "finetuning")
    a = parser.parse_args()
    if "LMWORKS_DATA" not in os.environ:
        print("set LMWORKS_DATA to the folder of the data sets", file=sys.stderr)
        return 2
    studies = Studies(Path(os.environ["LMWORKS_DATA"]), a.work, a.seeds)
    for name in a.only or STUDIES:
        began = time.monotonic()
        STUDIES[name](studies)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    results = HERE.parents[1] / "docs" / "finetuning-results.md"
    results.write_text(table(list(studies.rows.values())), encoding="utf-8")
    return 0


def table(rows: list[Row]) -> str:
    """Return one line a study: mean and spread of each test metric over the seeds, and the seconds."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["name"].rstrip("0123456789").rstrip("-"), []).append(row)
    lines = ["| study | runs | on the test data: mean (standard deviation) | training, s |", "|--|--|--|--|"]
    for name, group in groups.items():
        tests = [test for row in group for test in row.get("tests", [row.get("test")])]
        if not tests:
            continue
        scores = ", ".join(spread(metric, [test[metric] for test in tests]) for metric in tests[0])
        seconds = [row["train_seconds"] for row in group if "train_seconds" in row]
        lines.append(f"| {name} | {len(tests)} | {scores} | {f'{statistics.mean(seconds):.0f} ' if seconds else ''}|")
    return (
        "# Fine-tuning on real data\n\nWritten by `benchmarks/finetuning/run.py`.\n\n" + "\n".join(lines) + "\n" + ABOUT
    )


def spread(name: str, values: list[float]) -> str:
    """Return "accuracy 0.873 (0.004)"."""
    deviation = f" ({statistics.stdev(values):.4f})" if len(values) > 1 else ""
    return f"{name} {statistics.mean(values):.4f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
