"""The only training loop. It is given a model, an objective and a data source, and leaves a run folder.

A step is a pure function of the state before it and its number: batch, learning rate and dropout all follow from
(seed, step). So a run that is killed at any instant and resumed ends with the same bits as one that was not.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor, nn

from lmworks.base.errors import Interrupted, TrainingError, from_os_error
from lmworks.base.types import Batch
from lmworks.training.data import DataSource, draw, split
from lmworks.training.interrupt import StopRequest
from lmworks.training.log import Log, read_history
from lmworks.training.machine import (
    as_written,
    autocast,
    choose_speed,
    compile_blocks,
    keep_freed_memory,
    uncompile_blocks,
    use_threads,
)
from lmworks.training.objectives import Objective
from lmworks.training.optim import make_adamw, set_learning_rate
from lmworks.training.schedule import learning_rate
from lmworks.training.state import (
    BEST,
    State,
    check_finite,
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
from lmworks.training.train_config import TrainConfig, TrainResult

SAVE_SECONDS = 120.0  # a kill loses at most this much work
EVAL_SHARE = 0.15  # scored tokens of a validation per trained token: about a tenth of the time


class Trainer:
    """Trains `model` in place. Progress goes to `stream` (None: silent).

    `measure` scores the model at each validation: finite numbers by name, which are logged beside the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        objective: Objective,
        data: DataSource,
        config: TrainConfig,
        folder: str | Path,
        stream: TextIO | None = sys.stderr,
        measure: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.model, self.objective, self.data, self.config = model, objective, data, config
        self.measure = measure
        self.folder, self.stream = Path(folder), stream
        self.device = next(model.parameters()).device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_adamw(
            model, lr=config.lr, weight_decay=config.weight_decay, beta1=config.beta1, beta2=config.beta2
        )
        self.state = State()
        self.saved_step, self.saved_at = -1, time.monotonic()

    def fit(self) -> TrainResult:
        """Train to the end, or from the last checkpoint to the end; leave the best weights in the model.

        Raises Interrupted after Ctrl-C or SIGTERM (everything is saved), TrainingError where the loss or the gradient
        is not finite, InputError where the folder is in use, full, or holds a run with other settings.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with hold(self.folder), StopRequest() as stop:
                self.start_or_resume()
                with self.open_log() as self.log:
                    while not self.finished:
                        self.train_step()
                        if self.is_due(self.config.eval_every):
                            self.validate()
                        if self.finished or stop or self.save_is_due():
                            self.save()
                        if stop and not self.finished:
                            raise self.interrupted()
                return self.finish()
        except OSError as error:
            raise from_os_error(error, f"training stopped at step {self.state.step}{self.last_good()}") from error

    # ---------------------------------------------------------------------------------------------------------- steps

    def train_step(self) -> None:
        """Make one optimizer step on one batch, computed in `accumulation` parts."""
        c, s, began = self.config, self.state, time.perf_counter()
        batch = self.data.batch(s.step)
        count = self.objective.count(batch)
        loss = sum(self.accumulate(part, i, count) for i, part in enumerate(split(batch, c.accumulation)))
        norm = float(nn.utils.clip_grad_norm_(self.parameters, c.max_grad_norm))
        self.check_numbers(loss, norm)
        lr = learning_rate(s.step, lr=c.lr, min_lr=c.min_lr, warmup=c.warmup, steps=c.steps, shape=c.schedule)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        s.step, s.tokens, s.seconds = s.step + 1, s.tokens + count, s.seconds + seconds
        row = {"step": s.step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": s.tokens}
        self.log.record({**row, "seconds": round(s.seconds, 3), "tokens_per_second": round(count / seconds, 1)})

    def accumulate(self, part: Batch, index: int, count: int) -> float:
        """Add the gradient of one part of a batch of `count` terms; return its share of the mean loss."""
        seed = int(draw(self.config.seed, self.state.step, 1, stream=1 + index)[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the only randomness inside a step: dropout
            with autocast(self.device.type, self.state.dtype):
                loss = self.objective(self.model, self.to_device(part)) / count
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def check_numbers(self, loss: float, norm: float) -> None:
        """Stop before the update if the loss or the gradient is NaN or infinite."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        self.log.record({"step": self.state.step + 1, "error": what})
        raise TrainingError(
            f"training diverged at step {self.state.step + 1}: {what}{self.last_good()}",
            where=str(self.folder),
            fix="start again with a lower --lr, a longer --warmup or --dtype fp32",
        )

    def validate(self) -> None:
        """Score the held-out text; keep the weights if they are the best so far."""
        s, began = self.state, time.perf_counter()
        total, count = 0.0, 0
        self.model.eval()
        with as_written(s.compiled), torch.no_grad(), autocast(self.device.type, s.dtype):
            for batch in self.data.validation(self.eval_tokens):
                total += float(self.objective(self.model, self.to_device(batch)))
                count += self.objective.count(batch)
        self.model.train()
        if count == 0:
            return
        loss = total / count
        self.check_numbers(loss, 0.0)
        measured = {} if self.measure is None else self.measure()
        score = -loss if self.config.criterion == "loss" else measured[self.config.criterion]
        before = None if s.best_loss is None else (s.best_score, -s.best_loss)
        improved = before is None or (score, -loss) > before  # of equal scores the lower loss
        if improved:
            s.best_step, s.best_loss, s.best_score, s.waited = s.step, loss, score, 0
            check_finite(self.model, self.folder)
            save_best(self.folder, self.model, step=s.step)
        else:
            s.waited += 1
        s.seconds += time.perf_counter() - began
        row = {"step": s.step, "val_loss": loss, "best": improved, **measured}
        self.log.record({**row, "seconds": round(s.seconds, 3)})

    @property
    def finished(self) -> bool:
        """All steps are done, or validation has not improved for too long."""
        return self.state.step >= self.config.steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Validation has not improved `patience` times in a row."""
        return 0 < self.config.patience <= self.state.waited

    def is_due(self, every: int) -> bool:
        """Tell whether something that happens every so many steps, and at the end, happens now."""
        return self.state.step % every == 0 or self.state.step == self.config.steps

    # ------------------------------------------------------------------------------------------- start, save, finish

    def start_or_resume(self) -> None:
        """Read the newest whole checkpoint, or make the first one; settle threads, memory and dtype."""
        c = self.config
        clean(self.folder)
        check_space(self.folder, self.model)
        keep_freed_memory()
        found = load_checkpoint(self.folder)
        if found is not None:
            path, self.state = found
            check_same_run(self.state, asdict(c), self.data.fingerprint(), self.folder)
            load_into(path, self.model, self.optimizer, step=self.state.step)
            prune(self.folder, keep=[path])
            self.saved_step = self.state.step
            self.say(f"resumed at step {self.state.step:,} of {c.steps:,}")
            if self.state.torch != torch.__version__:
                self.say(f"torch {torch.__version__} instead of {self.state.torch}: the last bits may differ")
        self.state.threads = use_threads(self.state.threads if found else None, self.say)
        self.model.train()
        first = self.data.batch(0)
        self.eval_tokens = c.eval_tokens or max(1, int(EVAL_SHARE * c.eval_every * self.objective.count(first)))
        if found is None:
            self.state.config, self.state.data = asdict(c), self.data.fingerprint()
            self.choose_speed(first)
            save_checkpoint(self.folder, self.model, self.optimizer, self.state)
            self.saved_step = 0
        if self.state.compiled:
            compile_blocks(self.model)
        self.saved_at = time.monotonic()

    def choose_speed(self, batch: Batch) -> None:
        """Measure on a part of the first batch which dtype is faster and whether compiling pays; say so."""
        c, part = self.config, self.to_device(next(split(batch, self.config.accumulation)))
        with torch.random.fork_rng(devices=[]):
            self.state.dtype, self.state.compiled, why = choose_speed(
                self.model,
                self.objective,
                part,
                dtype=c.dtype,
                compiling=c.compile,
                parts=c.steps * c.accumulation,
            )
        self.say(f"training in {why}")

    def open_log(self) -> Log:
        """Continue metrics.jsonl where the state says."""
        s = self.state
        unit, steps = self.objective.unit, self.config.steps
        return Log(self.folder, start=s.metrics_bytes, step=s.step, steps=steps, stream=self.stream, unit=unit)

    def save_is_due(self) -> bool:
        """Tell whether this step ends with a checkpoint."""
        late = time.monotonic() - self.saved_at >= SAVE_SECONDS
        return late or self.is_due(self.config.save_every or self.config.eval_every)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        check_finite(self.model, self.folder)
        self.state.metrics_bytes = self.log.flush()
        save_checkpoint(self.folder, self.model, self.optimizer, self.state)
        self.saved_step, self.saved_at = self.state.step, time.monotonic()

    def interrupted(self) -> Interrupted:
        """Return the error that ends an interrupted run: everything is saved."""
        return Interrupted(
            f"stopped at step {self.state.step:,} of {self.config.steps:,}; everything is saved",
            where=str(self.folder),
            fix="run the same command with --resume to continue exactly here",
        )

    def finish(self) -> TrainResult:
        """Load the best weights and leave one checkpoint."""
        s = self.state
        if s.best_step is not None:
            load_into(self.folder / f"{BEST}.{s.best_step}", self.model)
        prune(self.folder, keep=newest(self.folder, 1))
        uncompile_blocks(self.model)
        self.model.eval()
        return TrainResult(
            steps=s.step,
            tokens=s.tokens,
            seconds=s.seconds,
            dtype=s.dtype,
            best_step=s.best_step or s.step,
            best_loss=s.best_loss,
            stopped_early=self.stopped_early,
            history=read_history(self.folder),
        )

    def last_good(self) -> str:
        """Return '; the checkpoint of step N is intact', or nothing before the first one."""
        return f"; the checkpoint of step {self.saved_step:,} is intact" if self.saved_step >= 0 else ""

    def say(self, text: str) -> None:
        """Print one sentence before the progress bar begins."""
        if self.stream is not None:
            print(text, file=self.stream, flush=True)

    def to_device(self, batch: Batch) -> dict[str, Tensor]:
        """Return the batch as tensors where the model is."""
        return {name: torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for name, array in batch.items()}
