"""The run folder as the training loop sees it: rank 0 reads and writes, every rank gets what was read, or the error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmworks.training.distributed import Ranks
from lmworks.training.log import History, Log, read_history
from lmworks.training.optim import load_optimizer, moments, optimizer_tensors
from lmworks.training.state import (
    BEST,
    State,
    check_finite,
    check_same_base,
    check_same_run,
    check_space,
    clean,
    hold,
    load_checkpoint,
    load_into,
    newest,
    prune,
    save_best,
    save_checkpoint,
)
from lmworks.training.stored import frozen_sum, model_tensors


class Checkpoints:
    """What a run of this model and this optimizer keeps in its folder."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        self.folder, self.model, self.optimizer, self.ranks = folder, model, optimizer, ranks
        self.saved_step, self.saved_at = -1, time.monotonic()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Make the folder and keep every other run out of it until the block ends."""
        self.ranks.once(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        with self.ranks.on_first(hold(self.folder)):
            yield

    def read(self, config: dict[str, Any], data: str) -> State | None:
        """Put the newest whole checkpoint into the model and the optimizer; return its state, or None without one.

        Every rank starts from the weights of rank 0 in any case.
        """
        state = self.ranks.once(lambda: self.read_newest(config, data))
        self.ranks.copy(model_tensors(self.model).values())
        if state is not None:
            step = state.step - state.skipped
            tensors = self.ranks.copy_named(lambda: optimizer_tensors(self.model, self.optimizer))
            if self.ranks.rank:
                load_optimizer(self.model, self.optimizer, tensors, step=step)
            self.saved_step = state.step
        return state

    def read_newest(self, config: dict[str, Any], data: str) -> State | None:
        """Do that on rank 0; raise InputError for a run with other settings or data, or without room on the disk."""
        clean(self.folder)
        check_space(self.folder, self.model, moments=len(moments(self.optimizer)))
        found = load_checkpoint(self.folder)
        if found is None:
            return None
        path, state = found
        check_same_run(state, config, data, self.folder)
        check_same_base(state, self.model, self.folder)
        load_into(path, self.model, self.optimizer, step=state.step - state.skipped)
        prune(self.folder, keep=[path])
        return state

    def save(self, state: State, log: Log | None = None) -> None:
        """Write a checkpoint of this state."""
        self.ranks.once(lambda: self.write(state, log))
        self.saved_step, self.saved_at = state.step, time.monotonic()

    def write(self, state: State, log: Log | None) -> None:
        """Do that on rank 0."""
        check_finite(self.model, self.folder)
        state.frozen = state.frozen or frozen_sum(self.model)
        state.metrics_bytes = 0 if log is None else log.flush()
        save_checkpoint(self.folder, self.model, self.optimizer, state)

    def save_best(self, step: int) -> None:
        """Write the weights as the best; the next checkpoint removes what they replace."""
        self.ranks.once(lambda: self.write_best(step))

    def write_best(self, step: int) -> None:
        """Do that on rank 0."""
        check_finite(self.model, self.folder)
        save_best(self.folder, self.model, step=step)

    def finish(self, best_step: int | None) -> History:
        """Put the best weights into the model, leave one checkpoint, and return the loss curves."""
        history = self.ranks.once(lambda: self.read_best(best_step))
        self.ranks.copy(model_tensors(self.model).values())
        return history

    def read_best(self, best_step: int | None) -> History:
        """Do that on rank 0."""
        if best_step is not None:
            load_into(self.folder / f"{BEST}.{best_step}", self.model)
        prune(self.folder, keep=newest(self.folder, 1))
        return read_history(self.folder)

    def last_good(self) -> str:
        """Return '; the checkpoint of step N is intact', or nothing before the first step was saved."""
        return f"; the checkpoint of step {self.saved_step:,} is intact" if self.saved_step > 0 else ""
