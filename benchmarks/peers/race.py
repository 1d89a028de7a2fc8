"""Contestants in processes of their own, each in its own environment, which answer requests for a time in turn.

Messages are lines of JSON. A worker reads its setting, answers with what it computed (so that it can be checked before
its times count), and then makes one timed turn for every line it reads. Only the standard library and NumPy are needed.

Decoding is timed as tokens per second without the first token: the time of all tokens less the time of one.
"""

from __future__ import annotations

import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

WARM_UP = 2
REST = 0.05  # seconds between turns: threads that wait by spinning must not take the next contestant's time


class Decoder(Protocol):
    """A language model that writes greedily."""

    def generate(self, ids: Sequence[int], tokens: int) -> Sequence[int]:
        """Return the next `tokens` tokens."""
        ...

    def logits(self, ids: Sequence[int]) -> Any:
        """Return the logits (V,) after the last of `ids`."""
        ...


class Encoder(Protocol):
    """A classifier of token ids."""

    def encode(self, rows: Sequence[Sequence[int]]) -> Any:
        """Return the logits (B, O) of rows of any length, in their order."""
        ...


def serve(open_model: Callable[[dict[str, Any]], Any]) -> None:
    """Be a worker: open what the first line asks for, answer once, and take a timed turn for every further line."""
    channel = os.fdopen(os.dup(1), "w")  # libraries print; their words go to standard error
    os.dup2(2, 1)

    def say(message: object) -> None:
        print(json.dumps(message), file=channel, flush=True)

    setting = json.loads(sys.stdin.readline())
    turn, answer = (start_decoding if setting["task"] == "decode" else start_encoding)(open_model(setting), setting)
    for _ in range(WARM_UP):
        turn()
    say(answer)
    for _ in sys.stdin:
        say(turn())


def start_decoding(model: Decoder, setting: Mapping[str, Any]) -> tuple[Callable[[], float], dict[str, Any]]:
    """Return a turn, in tokens per second, and the tokens and logits to be checked."""
    prompt, tokens = setting["prompt"], setting["tokens"]

    def turn() -> float:
        times = []
        for count in (1, tokens):
            start = time.perf_counter()
            written = model.generate(prompt, count)
            times.append(time.perf_counter() - start)
            if len(written) != count:
                raise RuntimeError(f"{len(written)} tokens were written instead of {count}")
        return (tokens - 1) / (times[1] - times[0]) if times[1] > times[0] else turn()  # disturbed: once more

    answer = {
        "logits": to_text(model.logits(prompt)),
        "tokens": [int(token) for token in model.generate(prompt, tokens)],
    }
    return turn, answer


def start_encoding(model: Encoder, setting: Mapping[str, Any]) -> tuple[Callable[[], float], dict[str, Any]]:
    """Return a turn, in rows per second, and the logits to be checked."""
    rows = setting["rows"]

    def turn() -> float:
        start = time.perf_counter()
        model.encode(rows)
        return len(rows) / (time.perf_counter() - start)

    return turn, {"logits": to_text(model.encode(rows))}


def to_text(array: Any) -> str:
    """Return an array's float32 bytes in base64."""
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode()


def from_text(text: str) -> np.ndarray:
    """Return the floats of `to_text`, flat."""
    return np.frombuffer(base64.b64decode(text), "<f4")


@dataclass
class Contestant:
    """One setting of ours or of a peer. `how` is what its worker must know beside the task."""

    name: str
    command: list[str]
    how: dict[str, Any] = field(default_factory=dict)
    ours: bool = False


@dataclass
class Outcome:
    """What came of a contestant: figures of each round (larger is better), how near its answers are, or why not."""

    contestant: Contestant
    figures: list[float] = field(default_factory=list)
    distance: float | None = None  # of the logits: |a - reference| / |reference|
    equal: int | None = None  # tokens that are the reference's, before the first that is not
    problem: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.figures)


class Worker:
    """A contestant's process."""

    def __init__(self, contestant: Contestant, setting: Mapping[str, Any], log: Path) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"OMP_NUM_THREADS": str(setting["threads"]), "MKL_NUM_THREADS": str(setting["threads"])}
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                contestant.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env=environment,
            )  # fmt: skip
        try:
            self.answer = self.ask({**setting, **contestant.how})
        except BaseException:
            self.process.kill()
            self.process.communicate()
            raise

    def ask(self, message: object) -> Any:
        """Send a line and return the answer; RuntimeError with the last of its words when it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(message), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            words = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            raise RuntimeError(words[-1].strip()[:300] if words else f"exit code {self.process.returncode}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def race(
    contestants: Sequence[Contestant], setting: Mapping[str, Any], reference: Mapping[str, Any], *, rounds: int,
    limit: float, logs: Path,
) -> list[Outcome]:  # fmt: skip
    """Start all, check their answers, let those whose logits are within `limit` of the reference step in turn."""
    outcomes = [Outcome(contestant) for contestant in contestants]
    workers: list[tuple[Outcome, Worker]] = []
    try:
        for i, outcome in enumerate(outcomes):
            try:
                worker = Worker(outcome.contestant, setting, logs / f"{i}.txt")
            except (RuntimeError, OSError) as error:
                outcome.problem = str(error)
                continue
            workers.append((outcome, worker))
            judge(outcome, worker.answer, reference, limit)
        for number in range(rounds):
            turns = workers if number % 2 == 0 else workers[::-1]  # nobody always follows the same one
            for outcome, worker in turns:
                if outcome.problem is None:
                    time.sleep(REST)
                    try:
                        outcome.figures.append(worker.ask("turn"))
                    except RuntimeError as error:
                        outcome.problem = str(error)
    finally:
        for _, worker in workers:
            worker.close()
    return outcomes


def judge(outcome: Outcome, answer: Mapping[str, Any], reference: Mapping[str, Any], limit: float) -> None:
    """Measure how near an answer is to the reference's; one that is too far does not count."""
    found, wanted = from_text(answer["logits"]), from_text(reference["logits"])
    if found.shape != wanted.shape:
        outcome.problem = f"{found.size} logits instead of {wanted.size}"
        return
    outcome.distance = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    if "tokens" in reference:
        pairs = zip(answer["tokens"], reference["tokens"], strict=True)
        outcome.equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(reference["tokens"]))
    if not outcome.distance <= limit:
        outcome.problem = f"not counted: its logits are {outcome.distance:.1e} from the reference, {limit:g} is allowed"
