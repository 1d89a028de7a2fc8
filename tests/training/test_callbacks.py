"""What callbacks are told, in which order, and that one of them can end a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import make_trainer

from lmworks.base.errors import TrainingError
from lmworks.training.callbacks import Callback
from lmworks.training.state import load_checkpoint
from lmworks.training.train_config import TrainResult
from lmworks.training.trainer import Trainer


class Listener(Callback):
    """Notes everything; ends the run in one step, or fails there."""

    def __init__(self, *, stop_at: int = 0, fail_at: int = 0) -> None:
        self.heard: list[Any] = []
        self.stop_at, self.fail_at = stop_at, fail_at

    def on_start(self, trainer: Trainer) -> None:
        self.heard.append(("start", trainer.state.step))

    def on_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        assert {"loss", "lr", "grad_norm", "tokens", "seconds"} <= set(row)
        self.heard.append(row["step"])
        if row["step"] == self.fail_at:
            raise RuntimeError("mine")
        if row["step"] == self.stop_at:
            trainer.stop("enough")

    def on_validation(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self.heard.append(("validation", row["step"], row["val_loss"] > 0))

    def on_end(self, trainer: Trainer, result: TrainResult | None) -> None:
        self.heard.append(("end", result and result.steps))


def listen(trainer: Trainer, *callbacks: Callback) -> Trainer:
    trainer.callbacks = callbacks
    return trainer


def test_hooks_come_in_order(tmp_path: Path) -> None:
    listener = Listener()
    listen(make_trainer(tmp_path, steps=4, eval_every=2), listener, Callback.__new__(Silent)).fit()
    validations = [("validation", 2, True), ("validation", 4, True)]
    assert listener.heard == [("start", 0), 1, 2, validations[0], 3, 4, validations[1], ("end", 4)]


class Silent(Callback):
    """Overrides nothing."""


def test_a_callback_ends_the_run_and_a_resume_adds_nothing(tmp_path: Path) -> None:
    listener, plain, stopped = Listener(stop_at=5), make_trainer(tmp_path / "plain"), make_trainer(tmp_path / "stopped")
    result = listen(stopped, listener).fit()
    assert (result.steps, result.stopped, result.stopped_early) == (5, "enough", False)
    assert listener.heard[-2:] == [("validation", 5, True), ("end", 5)]
    found = load_checkpoint(tmp_path / "stopped")
    assert found is not None and (found[1].step, found[1].stopped) == (5, "enough")
    before = (tmp_path / "stopped" / "metrics.jsonl").read_bytes()
    again = Listener()
    result = listen(make_trainer(tmp_path / "stopped"), again).fit()
    assert (result.steps, result.stopped) == (5, "enough")
    assert again.heard == [("start", 5), ("end", 5)]
    assert (tmp_path / "stopped" / "metrics.jsonl").read_bytes() == before
    assert plain.fit().stopped == ""


def test_listening_changes_no_bit(tmp_path: Path) -> None:
    alone, heard = make_trainer(tmp_path / "alone", dropout=0.2), make_trainer(tmp_path / "heard", dropout=0.2)
    alone.fit()
    listen(heard, Listener()).fit()
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), heard.model.parameters(), strict=True))


def test_the_end_is_told_after_an_error_too(tmp_path: Path) -> None:
    listener = Listener(fail_at=2)
    with pytest.raises(RuntimeError, match="mine"):
        listen(make_trainer(tmp_path / "own"), listener).fit()
    assert listener.heard[-1] == ("end", None)
    listener = Listener()
    with pytest.raises(TrainingError):
        listen(make_trainer(tmp_path / "diverged", lr=1e30, max_grad_norm=0.0), listener).fit()
    assert listener.heard[-1] == ("end", None)
