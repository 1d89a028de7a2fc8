"""How a run learned, from its metrics.jsonl: how soon, and how far from what it was trained on.

    reached(level)   the first validation at which the loss was at most `level`: its step, tokens and seconds
    near             that of a loss within 5 % of the run's best: how soon it was nearly done
    gap              validation loss less training loss at the best validation, the training loss being the mean of the
                     steps since the validation before: what did not generalise

A loss is in nats a scored token; `scale` turns it into bits per byte, where the run says how many bytes it scored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import fsum
from pathlib import Path

from lmworks.base.errors import FormatError

METRICS = "metrics.jsonl"
NEAR = 1.05


@dataclass(frozen=True)
class Moment:
    """A validation: when it was, its loss, and the mean training loss since the one before."""

    step: int
    tokens: int
    seconds: float
    loss: float
    train_loss: float | None


@dataclass(frozen=True)
class Curve:
    """The validations of a run, in order."""

    moments: tuple[Moment, ...]
    steps: int
    seconds: float

    @property
    def best(self) -> Moment:
        """The validation with the lowest loss."""
        return min(self.moments, key=lambda moment: moment.loss)

    @property
    def near(self) -> Moment:
        """The first validation whose loss was within 5 % of the best."""
        found = self.reached(self.best.loss * (NEAR if self.best.loss > 0 else 1 / NEAR))
        assert found is not None
        return found

    @property
    def gap(self) -> float | None:
        """What the loss of new text has more than that of text to learn from."""
        return None if self.best.train_loss is None else self.best.loss - self.best.train_loss

    def reached(self, level: float) -> Moment | None:
        """Return the first validation at which the loss was at most `level`."""
        return next((moment for moment in self.moments if moment.loss <= level), None)


def read_curve(path: Path) -> Curve | None:
    """Return the curve of a metrics.jsonl, a line at a time; None where nothing was validated."""
    moments: list[Moment] = []
    losses: list[float] = []
    step, tokens, seconds = 0, 0, 0.0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n"):  # a process was killed while it wrote
                    break
                row = json.loads(line)
                step, seconds = row["step"], row["seconds"]
                if "loss" in row:
                    tokens = row["tokens"]
                    losses.append(row["loss"])
                elif row.get("val_loss") is not None:
                    mean = fsum(losses) / len(losses) if losses else None
                    moments.append(Moment(step, tokens, seconds, row["val_loss"], mean))
                    losses = []
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError("the log of this run is damaged", where=str(path), found=str(error)[:80]) from None
    return Curve(tuple(moments), step, seconds) if moments else None
