"""What a run tells while it runs: a progress bar or a line now and then, and `metrics.jsonl` for programs and plots.

Every step is one line of metrics.jsonl:   step loss lr grad_norm tokens | seconds tokens_per_second
Every validation is another:               step val_loss best, what is measured | seconds
A step that fp16 overflowed in has grad_norm null, and the loss scale as overflow.
The fields after the bar are times; all others are identical, to the bit, in a run that was killed and resumed.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

METRICS = "metrics.jsonl"
TIMES = ("seconds", "tokens_per_second")
RECORDED = ("val_loss", "best", *TIMES)  # of each validation, besides its step and what is measured
EVERY_SECONDS = 10.0  # between two lines where there is no terminal
CURVE_POINTS = 200  # of the training loss in a plot
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class History:
    """The loss curves: (step, nats per token); each training point is the mean of the steps since the one before."""

    train: Points = field(default_factory=list)
    validation: Points = field(default_factory=list)
    measured: list[dict[str, float]] = field(default_factory=list)  # each validation's numbers by name, with its step


class Log:
    """Writes metrics.jsonl from byte `start` on, and shows progress on `stream` (None: silent)."""

    def __init__(
        self, folder: Path, *, start: int, step: int, steps: int, stream: TextIO | None, unit: str = "tokens"
    ) -> None:
        self.unit = unit
        self.path, self.step, self.steps, self.stream = folder / METRICS, step, steps, stream
        self.handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        self.position = min(start, os.fstat(self.handle).st_size)
        os.truncate(self.handle, self.position)
        self.val_loss: float | None = None
        self.bar: Any = None
        self.began = self.shown = time.monotonic()

    def __enter__(self) -> Log:
        if self.stream is not None and self.stream.isatty():
            self.bar = make_bar(self.stream)
            self.task = self.bar.add_task("", total=self.steps, completed=self.step, facts="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        os.close(self.handle)

    def record(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and show it."""
        line = memoryview(json.dumps(row, allow_nan=False).encode() + b"\n")
        while line:
            written = os.pwrite(self.handle, line, self.position)
            line, self.position = line[written:], self.position + written
        if self.stream is not None:
            self.show(row)

    def flush(self) -> int:
        """Make every line so far survive a power loss; return their bytes."""
        os.fsync(self.handle)
        return self.position

    def show(self, row: dict[str, Any]) -> None:
        """Move the bar, or print a line if the last one is old."""
        self.val_loss = row.get("val_loss", self.val_loss)
        if "loss" not in row:
            return
        step, now = row["step"], time.monotonic()
        facts = f"loss {row['loss']:.4f}"
        if self.val_loss is not None:
            facts += f" · validation {self.val_loss:.4f}"
        facts += f" · lr {row['lr']:.2g} · {row['tokens_per_second']:,.0f} {self.unit}/s"
        if "overflow" in row:
            facts += f" · fp16 overflow at a loss scale of {row['overflow']:g}: step skipped"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, facts=facts)
        elif now - self.shown >= EVERY_SECONDS or step == self.steps or "overflow" in row:
            self.shown = now
            left = (now - self.began) / max(1, step - self.step) * (self.steps - step)
            print(f"step {step:,} of {self.steps:,} · {facts} · {clock(left)} left", file=self.stream, flush=True)


class NoLog(Log):
    """The log of a process beside the one that writes it."""

    def __init__(self) -> None:
        """Open nothing."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close nothing."""

    def record(self, row: dict[str, Any]) -> None:
        """Write nothing."""


def make_bar(stream: TextIO) -> Any:
    """Return a progress bar with the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
        console=Console(file=stream),
        speed_estimate_period=60,
    )


def clock(seconds: float) -> str:
    """Write a duration for people: 4000 -> '1:06:40'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def read_history(folder: Path) -> History:
    """Return the loss curves that metrics.jsonl holds."""
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    width = max(1, math.ceil(len(steps) / CURVE_POINTS))
    groups = [steps[i : i + width] for i in range(0, len(steps), width)]
    return History(
        train=[(group[-1][0], math.fsum(loss for _, loss in group) / len(group)) for group in groups],
        validation=[(row["step"], row["val_loss"]) for row in rows if "val_loss" in row],
        measured=[{name: row[name] for name in row if name not in RECORDED} for row in rows if "val_loss" in row],
    )
