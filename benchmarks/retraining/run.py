"""The way back, told with real news: a topic comes up, accuracy falls, feedback trains a challenger, and it takes over.

    python benchmarks/retraining/run.py --work FOLDER --data ../shared/data

A classifier of AG News has hardly seen one of its topics. Then half of the traffic is about it. All that is done is
done by the command line and over HTTP, as a user would; docs/retraining-results.md is written of what came out. The
first classifier is not made again where the work folder has it already.
"""

from __future__ import annotations

import argparse
import csv
import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "finetuning"))
from prepare import ag_news, minilm
from serving import start

from lmworks.runtime.predictor import load

NEW, RARE = "Sci/Tech", 8  # the topic that comes up; how often the classifier has seen it
WORDS, LONGEST = 40, 300  # of a text, whose beginning is taken; letters of those that are left out: tables of markup
CLIENTS, PAUSE = 4, 3.0
CLOSE = 1e-4  # of two scores of one model for one text
IDLE = 2.0  # seconds after which a new connection is made
KEY = "the-key-of-the-administrator"
DOCS = Path(__file__).parents[2] / "docs" / "retraining-results.md"
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Sizes:
    """How many texts each part has."""

    train: int = 1600
    held: int = 400  # old news that the first monitor is fitted on
    judged: int = 500  # of each kind, that champion and challenger answer
    before: int = 500  # requests before the change
    step: int = 200  # requests between two checks
    replay: int = 640  # old training texts that the challenger learns beside the feedback
    after: int = 300  # requests of each kind that are answered after the switch
    least: int = 600
    epochs: int = 2
    checks: int = 3


def texts(data: Path, work: Path, sizes: Sizes) -> dict[str, Rows]:
    """Return the parts, none of which shares a text with another: old topics, and half new ones."""
    train, test = ag_news(data / "ag_news", work)
    rows: Rows = []
    for path in (train, test):
        with path.open(newline="", encoding="utf-8") as file:
            rows += [(" ".join(row["text"].split()[:WORDS]), row["label"]) for row in csv.DictReader(file)]
    rows = [row for row in dict(rows).items() if len(row[0]) < LONGEST]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    old, new = ([row for row in rows if (row[1] == NEW) is is_new] for is_new in (False, True))

    def take(source: Rows, number: int) -> Rows:
        part, source[:] = source[:number], source[number:]
        return part

    def mixed(number: int) -> Rows:
        return [row for pair in zip(take(old, number // 2), take(new, number // 2), strict=True) for row in pair]

    train = take(new, RARE) + take(old, sizes.train)
    return {
        "train": train, "replay": train[: sizes.replay], "held": take(old, sizes.held) + take(new, RARE),
        "judged": take(old, sizes.judged) + take(new, sizes.judged), "before": take(old, sizes.before),
        "after": mixed(2 * sizes.after), "load": mixed(600),
        "during": mixed(3000),
    }  # fmt: skip


def write(path: Path, rows: Rows) -> Path:
    """Write texts and labels as csv."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def lmworks(*words: object, ok: tuple[int, ...] = (0,)) -> tuple[int, str]:
    """Run the command line; return its exit code and what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "lmworks", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode in ok, (words, done.returncode, done.stderr[-2000:], done.stdout[-2000:])
    return done.returncode, done.stdout


@dataclass
class Client:
    """A connection to the server; `lost` counts what was not answered with 200."""

    base: str
    lost: int = 0
    last: float = 0.0  # when it last was answered
    said: list[tuple[float, str, str, float]] = field(default_factory=list)  # when asked, the text, label, score

    def __post_init__(self) -> None:
        self.connection = http.client.HTTPConnection(self.base.removeprefix("http://"), timeout=60)

    def post(self, path: str, body: Any, method: str = "POST") -> tuple[int, Any]:
        """Ask; return the status and what came back."""
        if time.monotonic() - self.last > IDLE:  # a server closes a connection that rests
            self.connection.close()
        self.connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        found = answer.status, json.loads(answer.read())
        self.last = time.monotonic()
        return found

    def ask(self, text: str) -> dict[str, Any]:
        """Ask one text."""
        asked = time.perf_counter()
        status, found = self.post("/classify", {"text": text})
        self.lost += status != 200
        answer: dict[str, Any] = found["answers"][0] if status == 200 else {"label": None, "score": 0.0}
        self.said.append((asked, text, answer["label"], answer["score"]))
        return answer

    def accuracy(self, rows: Rows, *, tell: bool = False) -> float:
        """Return the share of right answers; with `tell` say each time what would have been right."""
        right = 0
        for text, label in rows:
            answer = self.ask(text)
            right += answer["label"] == label
            if tell:
                status, _ = self.post("/feedback", {"id": answer["id"], "label": label})
                assert status == 201
        return right / len(rows)

    def get(self, path: str) -> Any:
        """Return what a route says."""
        return self.post(path, None, "GET")[1]


def story(work: Path, data: Path, base: Path, sizes: Sizes) -> dict[str, Any]:
    """Live through it; return the figures."""
    work.mkdir(parents=True, exist_ok=True)
    parts, began = texts(data, work, sizes), time.monotonic()
    files = {name: write(work / f"{name}.csv", rows) for name, rows in parts.items()}
    weights, news, pool, database = (work / name for name in ("news_weights", "news", "challengers", "feedback.db"))
    tuning = ("--epochs", sizes.epochs, "--batch-size", 16, "--lr", 1e-4, "--max-length", 128)
    if not weights.is_dir():
        lmworks("finetune", base, files["train"], "--task", "text-classification", *tuning, "-o", weights)
    if not news.is_dir():
        lmworks("export", weights, "--to", "onnx", "--dtype", "fp32", "-o", news)
    lmworks("monitor", "fit", news, files["train"], "--validation", files["held"])
    for path in work.glob("feedback.db*"):
        path.unlink()
    shutil.rmtree(pool, ignore_errors=True)
    pool.mkdir()
    (work / "admin.txt").write_text(KEY)
    process, address = start(str(news), "--challengers", str(pool), "--admin-key-file", str(work / "admin.txt"),
                             "--feedback", str(database), "--drift-log", str(work / "drift.jsonl"))  # fmt: skip
    found: dict[str, Any] = {"sizes": vars(sizes), "trained_seconds": time.monotonic() - began}
    try:
        found |= live(work, address, parts, files, sizes, tuning)
    finally:
        process.terminate()
        process.wait(30)
        assert process.stderr is not None
        process.stderr.close()
    found["seconds"] = time.monotonic() - began
    return found


def live(
    work: Path, address: str, parts: dict[str, Rows], files: dict[str, Path], sizes: Sizes, tuning: tuple[Any, ...]
) -> dict[str, Any]:
    """Ask, tell, check, train, switch."""
    client, database, pool = Client(address), work / "feedback.db", work / "challengers"
    admin = ("challenge", address, "--admin-key-file", work / "admin.txt")
    retrain = ("retrain", address, work / "news_weights", files["replay"], "--feedback", database, "--held-out",
               files["judged"], "--checks", sizes.checks, "--least", sizes.least, *tuning, "-o", pool / "better",
               "--json")  # fmt: skip
    found: dict[str, Any] = {"before": {"old": client.accuracy(parts["before"])}, "checks": []}
    new = [row for row in parts["judged"] if row[1] == NEW]

    def check(requests: int) -> dict[str, Any]:
        time.sleep(1)  # the last comparison is made in the background
        code, said = lmworks(*retrain, ok=(0, 1, 3))
        values = dict(json.loads(said))
        kept = {key: value for key, value in values.items() if key not in ("out", "trigger", "model")}
        found["checks"].append({"requests": requests, "exit": code, **kept})
        return values

    check(0)
    found["alarms_before"] = sum(bool(row["drift"]) for row in drift(client)["comparisons"])
    asked, rows, alarm, shares = 0, parts["during"], None, []
    while True:  # the topic comes up: half of all requests are about it from now on
        part = rows[asked : asked + sizes.step]
        shares.append(client.accuracy(part, tell=True))
        asked += len(part)
        time.sleep(0.5)
        alarms = [row for row in drift(client)["comparisons"] if row["drift"]]
        if alarms and alarm is None:
            alarm = {"requests": alarms[0]["requests"] - sizes.before, "tests": alarms[0]["drift"]}
        lmworks("feedback", "review", database, "--accept", "all")
        began = time.monotonic()
        if (values := check(asked))["fired"]:
            break
        assert asked + sizes.step <= len(rows), "it never fired"
    found |= {"alarm": alarm, "retrain_seconds": time.monotonic() - began, "feedback": asked,
              "during": {"mixed": float(np.mean(shares)), "new": right(work / "news", new)}}  # fmt: skip
    assert values["won"], values
    lmworks(*admin, "better", "--share", 1)
    for text, _ in parts["load"][:200]:
        client.ask(text)
    time.sleep(2)
    found["shadow"] = json.loads(lmworks(*admin, "--json")[1])["models"]["news"]["shadow"]
    found["load"] = switch_under_load(address, admin, parts["load"], work)
    rights: dict[str, list[float]] = {"old": [], "new": []}
    for row in parts["after"]:
        rights["new" if row[1] == NEW else "old"].append(client.accuracy([row]))
    after = {name: float(np.mean(found)) for name, found in rights.items()}
    time.sleep(1)
    return found | {"after": after, "drift_after": drift(client)["drift"], "lost": client.lost,
                    "requests": len(client.said)}  # fmt: skip


def drift(client: Client) -> dict[str, Any]:
    """Return what /drift says."""
    return dict(client.get("/drift")["models"]["news"])


def right(folder: Path, rows: Rows) -> float:
    """Return the accuracy of a folder."""
    answers = load(folder, runtime="onnx")([text for text, _ in rows])
    return float(np.mean([one[0].label == label for one, (_, label) in zip(answers, rows, strict=True)]))


def switch_under_load(address: str, admin: tuple[Any, ...], rows: Rows, work: Path) -> dict[str, Any]:
    """Switch, go back and switch again while clients ask; return what they got, and of which model each answer is."""
    scores = {}
    for name, folder in (("champion", work / "news"), ("challenger", work / "challengers/better")):
        answers = load(folder, runtime="onnx")([text for text, _ in rows])
        scores[name] = {text: (one[0].label, one[0].score) for one, (text, _) in zip(answers, rows, strict=True)}
    clients, ending, spans = [Client(address) for _ in range(CLIENTS)], threading.Event(), []

    def crowd(number: int) -> None:
        turn = number
        while not ending.is_set():
            clients[number].ask(rows[turn % len(rows)][0])
            turn += CLIENTS

    threads = [threading.Thread(target=crowd, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(PAUSE)
    for action, who in (("--switch", "challenger"), ("--back", "champion"), ("--switch", "challenger")):
        lmworks(*admin, action)
        since = time.perf_counter()
        time.sleep(PAUSE)
        spans.append((since, time.perf_counter(), who))
    ending.set()
    for thread in threads:
        thread.join(60)
    counts = {"champion": 0, "challenger": 0, "both": 0, "neither": 0, "late": 0}
    for asked, text, label, score in (one for client in clients for one in client.said):
        whose = [name for name, known in scores.items()
                 if known[text][0] == label and abs(known[text][1] - score) < CLOSE]  # fmt: skip
        counts["neither" if not whose else "both" if len(whose) == 2 else whose[0]] += 1
        for since, end, who in spans:
            counts["late"] += since <= asked < end and who not in whose
    return {"requests": sum(len(one.said) for one in clients), "lost": sum(one.lost for one in clients), **counts}


def page(found: dict[str, Any]) -> str:
    """Return the page of results."""
    sizes, fired, shadow, under = found["sizes"], found["checks"][-1], found["shadow"], found["load"]
    before, during, after, gap = found["before"], found["during"], found["after"], fired["difference"]
    checks = "\n".join(
        f"| {one['requests']} | {one['exit']} | {one['verdict']} | {one['accepted']} | {'; '.join(one['reasons'])} |"
        for one in found["checks"]
    )
    strange = {name: f"{share:.1%}" for name, share in shadow["out_of_domain"].items()}
    return f"""# Retraining: what was measured

Written by `benchmarks/retraining/run.py`: MiniLM (6 layers) on AG News, all of it by the command line and over HTTP.
The classifier was fine-tuned on {sizes["train"]:,} news of three topics and {RARE} of the fourth, {NEW}, and its
monitor fitted on {sizes["held"]} and {RARE} others. It is served to {sizes["before"]} requests about the three; then,
at a known time, half of all requests are about {NEW}. Every answer from then on gets feedback: the true topic, through
`POST /feedback`, accepted by `lmworks feedback review`. No text is in two parts.

## Accuracy

| | the three old topics | {NEW} | half of each |
|--|--|--|--|
| before the topic comes up | {before["old"]:.1%} | | |
| while it has come up | | {during["new"]:.1%} | {during["mixed"]:.1%} |
| **after the switch** | **{after["old"]:.1%}** | **{after["new"]:.1%}** | **{(after["old"] + after["new"]) / 2:.1%}** |

Of {sizes["after"]} served requests each after the switch, {sizes["before"]} before, {found["feedback"]} meanwhile; the
{during["new"]:.1%} are the champion's on the {sizes["judged"]} held-out texts of {NEW}.

## Alarm and trigger

Before the change {found["alarms_before"]} comparisons alarmed. The first alarm came **{found["alarm"]["requests"]}
requests** after it (by {", ".join(found["alarm"]["tests"])}; windows of 200, compared every 50). `lmworks retrain` was
run every {sizes["step"]} requests with `--checks {sizes["checks"]} --least {sizes["least"]}`:

| requests since | exit code | | accepted feedback | evidence |
|--|--|--|--|--|
{checks}

## Champion and challenger

It trained on {fired["trained_on"]:,} texts ({found["feedback"]} of them feedback, the others what the champion had
learnt), and both answered
{fired["held_out"]:,} held-out texts, half of them {NEW}: **{fired["champion"]:.1%}** and **{fired["challenger"]:.1%}**.
{gap["only_this_right"]} texts the challenger alone had right, {gap["only_the_first_right"]} the champion alone:
p = {gap["p"]:.1e} (McNemar, exact); the difference is {gap["value"]:.3f}, 95 % {gap["low"]:.3f} to {gap["high"]:.3f}.

## Shadow and switch

In the shadow with `--share 1` the challenger answered {shadow["texts"]} texts ({shadow["dropped"]} dropped,
{shadow["failed"]} failed) and agreed with the champion on {shadow["agreement"]:.1%}: its engine gives way to all.
Strange texts: {strange["current"]} to the champion, {strange["challenger"]} to the challenger.

{CLIENTS} clients asked without a pause while the server switched, went back, and switched again:
**{under["requests"]:,} requests, {under["lost"]} lost**. By label and score {under["champion"]:,} answers are the
champion's, {under["challenger"]:,} the challenger's, {under["both"]} of both,
{under["neither"]} of neither; {under["late"]} of those asked
after the answer to a switch came from the model before it. After the switch the traffic
{"DRIFTS" if found["drift_after"] else "does not drift"} against the challenger's own monitor.

Of all {found["requests"]:,} requests of the story {found["lost"]} were lost.
"""


def main() -> None:
    """Live through it, and write the page."""
    read = argparse.ArgumentParser(description=__doc__)
    read.add_argument("--work", type=Path, required=True)
    read.add_argument("--data", type=Path, required=True)
    read.add_argument("--base", type=Path, default=minilm(Path()), help="the encoder to fine-tune")
    read.add_argument("--small", action="store_true", help="fewer texts, for a test")
    read.add_argument("--page", type=Path, default=DOCS)
    asked = read.parse_args()
    os.environ.setdefault("LMWORKS_THREADS", "1")
    small = Sizes(train=480, held=200, judged=150, before=250, replay=300, step=100, after=100, least=200, checks=2)
    sizes = small if asked.small else Sizes()
    found = story(asked.work, asked.data, asked.base, sizes)
    (asked.work / "results.json").write_text(json.dumps(found, indent=1))
    asked.page.write_text(page(found))


if __name__ == "__main__":
    main()
