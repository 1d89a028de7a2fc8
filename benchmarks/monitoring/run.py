"""What a monitor is worth on real data, strange inputs and drift: writes docs/monitoring-results.md.

    python benchmarks/monitoring/run.py --work FOLDER --data ../shared/data

Models and monitors are made by the command line in the work folder (`clinc`, `news`); what is there is not made again,
and results.json holds what was measured, part by part. Traffic is real texts; each text is answered once, and streams
are drawn from those answers, as an answer does not depend on when it is asked.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from serving import start

from lmworks.evaluation.monitor import attach, read_monitor
from lmworks.evaluation.ood import auroc
from lmworks.runtime.predictor import Predictor, load
from lmworks.serve.monitor import Watch
from lmworks.verbs.monitoring_check import ask

SEEDS, STATIONARY, BEFORE, AFTER = 20, 1000, 300, 500
HELD, TRAFFIC, KNOWN = 1000, 1600, 1000
MIX = {"Sports": 0.55, "World": 0.15, "Business": 0.15, "Sci/Tech": 0.15}
QUERIES, ROUNDS = 40, 40
FACTS = ("score", "temperature", "calibration", "auroc", "recall", "false_alarms", "accuracy", "data", "thresholds")
DOCS = Path(__file__).parents[2] / "docs" / "monitoring-results.md"


def lmworks(*words: object, ok: Sequence[int] = (0,)) -> str:
    """Run the command line; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "lmworks", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode in ok, done.stderr[-2000:]
    return done.stdout


def watched(folder: Path, *, threads: int | None = None) -> Predictor:
    """Open an exported folder with its monitor."""
    predictor = load(folder, runtime="onnx", threads=threads)
    attach(predictor, read_monitor(folder))
    return predictor


# -- CLINC150 ----------------------------------------------------------------------------------------------------------


def make_clinc(work: Path, data: Path, base: str) -> Path:
    """Fine-tune, fit the monitor on the training and validation splits, export: the monitor comes along."""
    file = data / "clinc150/data_full.json"
    if not (work / "clinc").is_dir():
        lmworks("finetune", base, file, "--task", "text-classification", "--split", "train,val", "--epochs", 5, "--lr",
                2e-4, "--batch-size", 32, "-o", work / "clinc")  # fmt: skip
    if not (work / "clinc/monitor.json").is_file():
        lmworks("monitor", "fit", work / "clinc", file, "--split", "train,val", "--out-of-scope", f"{file}:oos_val")
    if not (work / "clinc-onnx").is_dir():
        lmworks("export", work / "clinc", "--to", "onnx", "--dtype", "fp32", "-o", work / "clinc-onnx")
    return work / "clinc-onnx"


def clinc(work: Path, data: Path, base: str) -> dict[str, Any]:
    """Count in-scope accuracy and out-of-scope recall on the test split, and what the check costs."""
    folder = make_clinc(work, data, base)
    splits = json.loads((data / "clinc150/data_full.json").read_text())
    predictor = watched(folder)
    usual = predictor([text for text, _ in splits["test"]], check=True)
    strange = predictor([text for text, _ in splits["oos_test"]], check=True)
    right = np.array([one.labels[0].label == label for one, (_, label) in zip(usual, splits["test"], strict=True)])
    kept = np.array([not one.ood for one in usual])
    facts = json.loads((folder / "monitor.json").read_text())
    return {
        "facts": {name: facts[name] for name in FACTS},
        "accuracy": float(right.mean()), "in_scope": float((right & kept).mean()), "flagged": float(1 - kept.mean()),
        "recall": float(np.mean([one.ood for one in strange])), "tests": [len(usual), len(strange)],
        "auroc": auroc(np.array([one.ood_score for one in strange]), np.array([one.ood_score for one in usual])),
    }  # fmt: skip


def cost(work: Path, data: Path, base: str) -> dict[str, float]:
    """Time single queries with and without the check, both with an option, as the server asks, in turns."""
    folder = make_clinc(work, data, base)
    plain, checked = load(folder, runtime="onnx", threads=1), watched(folder, threads=1)
    queries = [text for text, _ in json.loads((data / "clinc150/data_full.json").read_text())["test"][:QUERIES]]
    times = np.empty((ROUNDS + 1, QUERIES, 2))
    for turn in range(ROUNDS + 1):
        for i, text in enumerate(queries):
            for which in (0, 1) if turn % 2 else (1, 0):
                begun = time.perf_counter()
                checked([text], long="error", check=True) if which else plain([text], long="error")
                times[turn, i, which] = time.perf_counter() - begun
    best = times[1:].min(0)  # (queries, 2): what else the machine does can only add
    return {
        "ratio": float(median(best[:, 1] / best[:, 0])),
        "microseconds": 1e6 * float(median(best[:, 1] - best[:, 0])),
    }


# -- AG News -----------------------------------------------------------------------------------------------------------


def make_news(work: Path, data: Path, base: str) -> Path:
    """Fine-tune on the clean labels of 10,000 news, export, fit on test news that traffic never shows."""
    from prepare import ag_news

    train, test = ag_news(data / "ag_news", work)
    if not (work / "news").is_dir():
        lmworks("finetune", base, train, "--task", "text-classification", "--epochs", 2, "--lr", 1e-4, "--max-length",
                128, "--long", "truncate", "-o", work / "news")  # fmt: skip
    if not (work / "news-onnx").is_dir():
        lmworks("export", work / "news", "--to", "onnx", "--dtype", "fp32", "-o", work / "news-onnx")
    if not (work / "news-onnx/monitor.json").is_file():
        parts = {"known.csv": read_table(train)[:KNOWN], "held.csv": shuffled(read_table(test))[:HELD]}
        for name, rows in parts.items():
            with (work / name).open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("text", "label"), *rows])
        lmworks("monitor", "fit", work / "news-onnx", work / "known.csv", "--validation", work / "held.csv")
    return work / "news-onnx"


def read_table(path: Path) -> list[tuple[str, str]]:
    """Return (text, label) of each row."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def shuffled(rows: list[Any]) -> list[Any]:
    """Return the rows in an order that is always the same."""
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def passages(data: Path, language: str) -> list[str]:
    """Return the paragraphs of XQuAD in parts about as long as a news item."""
    articles = json.loads((data / f"xquad/xquad.{language}.json").read_text())["data"]
    texts = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]
    return [
        text[i : i + 240] for text in texts for i in range(0, min(len(text), 480), 240) if len(text[i : i + 240]) > 120
    ]


def news(work: Path, data: Path, base: str) -> dict[str, Any]:
    """Alarms on traffic that stays, and requests until one on traffic that changes, over the seeds."""
    folder = make_news(work, data, base)
    rows = shuffled(read_table(work / "ag_test.csv"))[HELD : HELD + TRAFFIC]
    predictor, monitor = watched(folder), read_monitor(folder)
    assert monitor is not None
    usual = predictor([text for text, _ in rows], check=True, long="window")
    topic = [label for _, label in rows]
    shifts: dict[str, Callable[[Any], list[Any]]] = {
        "class mix: Sports 25 % → 55 %": lambda rng: mixed(rng, usual, topic),
    }
    for name, language in (("topic: news → encyclopedia, English", "en"), ("language: encyclopedia in German", "de")):
        others = predictor(passages(data, language), check=True, long="window")
        shifts[name] = lambda rng, others=others: [others[i] for i in rng.choice(len(others), AFTER)]
    quiet, smallest, windows = 0, 1.0, 0
    for seed in range(SEEDS):
        watch = Watch("news", monitor, 200)
        order = np.random.default_rng(seed).permutation(len(usual))[:STATIONARY]
        for found in run_stream(watch, [usual[i] for i in order]):
            windows += 1
            quiet += bool(found["drift"])
            smallest = min(smallest, *(one["p"] for one in found["tests"].values()))
    detected = {}
    for name, make in shifts.items():
        waits, tests = [], set[str]()
        for seed in range(SEEDS):
            rng = np.random.default_rng(1000 + seed)
            before = [usual[i] for i in rng.permutation(len(usual))[:BEFORE]]
            alarm = next((f for f in run_stream(Watch("news", monitor, 200), before + make(rng)) if f["drift"]), None)
            assert alarm is None or alarm["requests"] > BEFORE, "an alarm before the change"
            waits.append(None if alarm is None else alarm["requests"] - BEFORE)
            tests |= set() if alarm is None else set(alarm["drift"])
        detected[name] = {"requests": waits, "tests": sorted(tests)}
    facts = json.loads((folder / "monitor.json").read_text())
    return {"facts": {name: facts[name] for name in ("accuracy", "calibration", "score", "threshold")},
            "stationary": {"windows": windows, "alarms": quiet, "smallest": smallest}, "detected": detected,
            "served": by_the_command_line(work, folder, [text for text, _ in rows], passages(data, "de"))}  # fmt: skip


def mixed(rng: Any, usual: list[Any], topic: list[str]) -> list[Any]:
    """Draw news of another mix of topics."""
    places = {name: [i for i, one in enumerate(topic) if one == name] for name in MIX}
    names = rng.choice(list(MIX), AFTER, p=list(MIX.values()))
    return [usual[rng.choice(places[name])] for name in names]


def run_stream(watch: Watch, stream: Sequence[Any]) -> Any:
    """Yield each comparison of a stream."""
    for one in stream:
        for requests, rows in watch.add([one]):
            yield watch.compare(requests, rows)


def by_the_command_line(work: Path, folder: Path, texts: list[str], german: list[str]) -> dict[str, Any]:
    """Serve, ask 600 news, check; ask 300 German texts, check again."""
    (work / "drift.jsonl").unlink(missing_ok=True)
    process, base = start(str(folder), "--drift-log", str(work / "drift.jsonl"))
    try:
        exits = []
        for part in (texts[:600], german[:300]):
            for i in range(0, len(part), 50):
                ask(f"{base}/classify", {"text": part[i : i + 50], "long": "window"})
            time.sleep(2)
            words = [sys.executable, "-m", "lmworks", "monitor", "check", base, "--html", str(work / "check.html")]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            exits.append((done.returncode, done.stdout))
        words = [sys.executable, "-m", "lmworks", "monitor", "check", str(work / "drift.jsonl")]
        log = subprocess.run(words, capture_output=True, text=True, check=False)
        rows = [json.loads(line) for line in (work / "drift.jsonl").read_text().splitlines()]
        first = next((row["requests"] for row in rows if row["drift"]), None)
        return {"exits": [code for code, _ in exits], "log_exit": log.returncode, "first": first, "shown": exits[-1][1]}
    finally:
        process.terminate()
        process.wait(20)


# -- the page ----------------------------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    """Return the page of results."""
    c, n = found["clinc"], found["news"]
    facts, data, served = c["facts"], c["facts"]["data"], found["news"]["served"]
    before, after = facts["calibration"]["before"], facts["calibration"]["after"]
    scores = "\n".join(
        f"| {name} | {value:.4f} | {facts['recall'][name]:.1%} |" for name, value in facts["auroc"].items()
    )
    changes = []
    for name, one in n["detected"].items():
        waits = [wait for wait in one["requests"] if wait is not None]
        times = f"{median(waits):g} | {max(waits)}" if waits else "– | –"
        changes.append(f"| {name} | {len(waits)} of {SEEDS} | {times} | {', '.join(one['tests'])} |")
    shown = "\n".join(line.rstrip() for line in served["shown"].splitlines())
    return f"""# Monitoring: what was measured

Written by `benchmarks/monitoring/run.py`; models, monitors and the last check were made by the command line.

## Strange inputs: CLINC150

MiniLM (6 layers), fine-tuned on the training split, {data["known"]:,} queries of 150 intents. The monitor was fitted on
that split and the {data["held_out"]:,} validation queries (which also chose the best epoch), at
{facts["false_alarms"]:.0%} false alarms; the {data["out_of_scope"]} out-of-scope validation queries chose the score,
{facts["score"]}. What follows is the test split: {c["tests"][0]:,} queries in scope, {c["tests"][1]:,} out of scope.

| | in-scope accuracy | out-of-scope recall |
|--|--|--|
| without a threshold | {c["accuracy"]:.1%} | 0 |
| at the threshold | **{c["in_scope"]:.1%}** | **{c["recall"]:.1%}** |
| published: BERT, threshold (Larson et al. 2019) | 96.2% | 52.3% |
| published: BERT, out-of-scope as a class | 96.9% | 40.3% |

In-scope accuracy counts a query as right if its intent is right *and* it is not flagged: the {c["flagged"]:.1%} that
are flagged count as wrong, whatever their intent. Recall is the share of out-of-scope queries that are flagged.

AUROC of {facts["score"]} on the test split: {c["auroc"]:.4f}. On the validation split, of each score:

| score | AUROC | recall at its threshold |
|--|--|--|
{scores}

Calibration (15 bins of equal width, validation split, each half with the temperature of the other): ECE
{before["ece"]:.4f} before and {after["ece"]:.4f} after, NLL {before["nll"]:.4f} and {after["nll"]:.4f}; the temperature
is {facts["temperature"]:.3f}.

One query with the check takes {found["cost"]["ratio"]:.3f} times as long as without it (the median over {QUERIES}
queries of the ratio of the least times of {ROUNDS} turns, in one process with one thread, ONNX Runtime).

## Drift: AG News

MiniLM, fine-tuned on 10,000 news. The reference is {HELD:,} test news (accuracy {n["facts"]["accuracy"]:.1%}), traffic
is drawn from {TRAFFIC:,} others. Windows of 200 requests are compared every 50 by five tests; the bound on any false
alarm in 1,000 comparisons is 5 %, so an alarm needs p ≤ 1e-05.

Traffic that stays the same: **{n["stationary"]["alarms"]} alarms** in {n["stationary"]["windows"]} comparisons over
{SEEDS} seeds of {STATIONARY:,} requests; the smallest p of any test was {n["stationary"]["smallest"]:.1e}.

Traffic that changes after request {BEFORE}, {SEEDS} seeds each:

| change | found | requests until the alarm, median | most | by |
|--|--|--|--|--|
{chr(10).join(changes)}

The same through `lmworks serve`: after 600 news `lmworks monitor check URL` ends with {served["exits"][0]}; after
German texts, from request 600 on, with {served["exits"][1]}, and `lmworks monitor check` of its log with
{served["log_exit"]}. The first alarm came at request {served["first"]}. What the check showed:

```
{shown}
```
"""


def main() -> None:
    """Measure what is missing, and write the page."""
    read = argparse.ArgumentParser(description=__doc__)
    read.add_argument("--work", type=Path, required=True)
    read.add_argument("--data", type=Path, required=True)
    read.add_argument("--base", default="sentence-transformers/all-MiniLM-L6-v2", help="the encoder to fine-tune")
    read.add_argument("--part", choices=list(PARTS), action="append", help="measure only this")
    read.add_argument("--page", type=Path, default=DOCS)
    asked = read.parse_args()
    os.environ.setdefault("LMWORKS_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).parents[1] / "finetuning"))
    file = asked.work / "results.json"

    def read_found() -> dict[str, Any]:
        return json.loads(file.read_text()) if file.is_file() else {}

    for name, part in PARTS.items():
        if name in (asked.part or PARTS) and name not in read_found():
            one = part(asked.work, asked.data, asked.base)
            file.write_text(json.dumps({**read_found(), name: one}, indent=1))
    if set(read_found()) == set(PARTS):
        asked.page.write_text(page(read_found()))


PARTS = {"clinc": clinc, "cost": cost, "news": news}


if __name__ == "__main__":
    main()
