"""The only training loop, for one process or several (distributed.py): model, objective and data in, a run folder out.

A step is a pure function of the state before it and its number: batch, learning rate and dropout all follow from
(seed, step). So a run that is killed at any instant and resumed ends with the same bits as one that was not.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from lmworks.base.errors import InputError, Interrupted, TrainingError, from_os_error
from lmworks.base.types import Batch
from lmworks.training.callbacks import Callback
from lmworks.training.checkpoints import Checkpoints
from lmworks.training.data import DataSource, draw
from lmworks.training.distributed import Ranks, find_ranks
from lmworks.training.interrupt import StopRequest
from lmworks.training.log import Log, NoLog
from lmworks.training.machine import (
    FIRST_LOSS_SCALE,
    autocast,
    check_dtype,
    choose_speed,
    compile_blocks,
    keep_freed_memory,
    next_loss_scale,
    recompute_blocks,
    to_device,
    uncompile_blocks,
    use_threads,
)
from lmworks.training.objectives import Objective
from lmworks.training.optim import clip_gradient, make_optimizer, set_learning_rate
from lmworks.training.parts import Pace, deal, even_shares
from lmworks.training.prefetch import Prefetch
from lmworks.training.schedule import learning_rate
from lmworks.training.state import State
from lmworks.training.train_config import TrainConfig, TrainResult
from lmworks.training.validation import held_out_loss

SAVE_SECONDS = 120.0  # a kill loses at most this much work
EVAL_SHARE = 0.15  # scored tokens of a validation per trained token: about a tenth of the time


class Trainer:
    """Trains `model` in place. Progress goes to `stream` (None: silent).

    `measure` scores the model at each validation: finite numbers by name, which are logged beside the loss.
    `callbacks` listen and may end the run; `workers` threads make batches ahead. Neither changes the result.
    What the loss is belongs to `objective`, any callable with the two methods of Objective: one that wraps another
    adds terms, a distillation or a penalty, so the loop has no hook for that. A method that needs the gradient of each
    row, as DP-SGD does, replaces `accumulate`. `ranks` None: the processes that a launcher started, else this one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        objective: Objective,
        data: DataSource,
        config: TrainConfig,
        folder: str | Path,
        stream: TextIO | None = None,
        measure: Callable[[], dict[str, float]] | None = None,
        callbacks: Sequence[Callback] = (),
        workers: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or find_ranks()
        self.ranks.place(model, objective)
        self.model, self.objective, self.data, self.config = model, objective, data, config
        self.measure, self.callbacks = measure, self.ranks.choose(callbacks)
        self.folder, self.stream = Path(folder), stream if self.ranks.rank == 0 else None
        self.device = next(model.parameters()).device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        check_dtype(config.dtype, self.device.type)
        if config.gradient_checkpointing and config.compile == "always":
            raise InputError("compiled blocks cannot be recomputed", fix="leave out one of compile and checkpointing")
        self.optimizer = make_optimizer(model, config)
        self.batches = Prefetch(data.batch, workers=workers, last=config.steps)
        self.state = State()
        self.result: TrainResult | None = None
        self.checkpoints = Checkpoints(self.folder, model, self.optimizer, self.ranks)
        self.last_good = self.checkpoints.last_good

    def fit(self) -> TrainResult:
        """Train to the end, or from the last checkpoint to the end; leave the best weights in the model.

        Raises Interrupted after Ctrl-C or SIGTERM (everything is saved), TrainingError where the loss or the gradient
        is not finite, InputError where the folder is in use, full, or holds a run with other settings.
        """
        try:
            with self.checkpoints.hold(), StopRequest() as stop:
                self.start_or_resume()
                recompute = recompute_blocks(self.model, self.config.gradient_checkpointing)
                with recompute, self.batches, self.open_log() as self.log, self.listening():
                    while not self.finished:
                        self.train_step()
                        stopping = self.agree(stop)
                        if self.is_due(self.config.eval_every):
                            self.validate()
                            stopping = self.agree(stop)
                        if self.finished or stopping or self.save_is_due():
                            self.save()
                        if stopping and not self.finished:
                            raise self.ranks.same(self.interrupted())
                    self.result = result = self.finish()
                return result
        except OSError as error:
            raise from_os_error(error, f"training stopped at step {self.state.step}{self.last_good()}") from error

    # ---------------------------------------------------------------------------------------------------------- steps

    def train_step(self) -> None:
        """Make one optimizer step on one batch, computed in parts on all ranks."""
        c, s, began = self.config, self.state, time.perf_counter()
        batch = self.batches(s.step)
        count = self.objective.count(batch)
        loss = self.compute(deal(batch, s.shares, self.ranks), count)
        lr = learning_rate(
            s.step, lr=c.lr, min_lr=c.min_lr, warmup=c.warmup, steps=c.steps, shape=c.schedule, decay=c.decay
        )
        row = {"step": s.step + 1, "loss": loss, "lr": lr, **self.update(loss, lr), "tokens": s.tokens + count}
        seconds = time.perf_counter() - began
        s.step, s.tokens, s.seconds = s.step + 1, s.tokens + count, s.seconds + seconds
        self.log.record(row := {**row, "seconds": round(s.seconds, 3), "tokens_per_second": round(count / seconds, 1)})
        for callback in self.callbacks:
            callback.on_step(self, row)

    def compute(self, parts: list[tuple[int, Batch]], count: int) -> float:
        """Leave in `grad` the gradient of a batch, of which this rank computes some parts; return the mean loss."""
        s, began, loss = self.state, self.pace.clock(), 0.0
        for place, (index, part) in enumerate(parts, 1):
            if place == len(parts) and not self.pace.left:
                self.gradients.expect()
            loss += self.accumulate(part, index, count)
        if shares := self.pace.add([part for _, part in parts], self.pace.clock() - began, s.shares):
            s.shares, s.paced = shares, self.ranks.world
        self.gradients.finish()
        return self.ranks.sum(loss)[0]

    def accumulate(self, part: Batch, index: int, count: int) -> float:
        """Add the gradient of one part of a batch of `count` terms; return its share of the mean loss."""
        seed = int(draw(self.config.seed, self.state.step, 1, stream=1 + index)[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the only randomness inside a step: dropout
            with autocast(self.device.type, self.state.dtype):
                loss = self.objective(self.model, to_device(part, self.device)) / count
            scaled = loss if self.state.loss_scale == 1 else loss * self.state.loss_scale
            scaled.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def update(self, loss: float, lr: float) -> dict[str, Any]:
        """Clip the summed gradient and apply it, but for an overflow of fp16; return what the log says of it."""
        c, s = self.config, self.state
        if s.loss_scale != 1:
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], 1 / s.loss_scale)
        norm = clip_gradient(self.parameters, max_norm=c.max_grad_norm, value=c.clip_value)
        facts: dict[str, Any] = {"grad_norm": norm}
        overflow = s.dtype == "fp16" and math.isfinite(loss) and not math.isfinite(norm) and s.loss_scale > 1
        if overflow:
            s.skipped += 1
            facts = {"grad_norm": None, "overflow": s.loss_scale}
        else:
            self.check_numbers(loss, norm)
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
        if s.dtype == "fp16":
            s.loss_scale, s.good_steps = next_loss_scale(s.loss_scale, s.good_steps, overflow=overflow)
        self.optimizer.zero_grad(set_to_none=True)
        return facts

    def check_numbers(self, loss: float, norm: float) -> None:
        """Stop before the update if the loss or the gradient is NaN or infinite."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        self.log.record({"step": self.state.step + 1, "error": what})
        error = TrainingError(
            f"training diverged at step {self.state.step + 1}: {what}{self.last_good()}",
            where=str(self.folder),
            fix="start again with a lower --lr, a longer --warmup or --dtype fp32",
        )
        raise self.ranks.same(error)

    def validate(self) -> None:
        """Score the held-out text; keep the weights if they are the best so far."""
        s, began = self.state, time.perf_counter()
        batches = self.data.validation(self.eval_tokens)
        loss = held_out_loss(self.model, self.objective, batches, dtype=s.dtype, compiled=s.compiled, ranks=self.ranks)
        if loss is None:
            return
        self.check_numbers(loss, 0.0)
        measured = {} if self.measure is None else self.ranks.once(self.measure)
        score = -loss if self.config.criterion == "loss" else measured[self.config.criterion]
        improved = s.judge(score, loss, min_delta=self.config.min_delta)
        if improved:
            self.checkpoints.save_best(s.step)
        s.seconds += time.perf_counter() - began
        row = {"step": s.step, "val_loss": loss, "best": improved, **measured, "seconds": round(s.seconds, 3)}
        self.log.record(row)
        for callback in self.callbacks:
            callback.on_validation(self, row)

    @property
    def finished(self) -> bool:
        """All steps are done, validation has not improved for too long, or a callback has ended the run."""
        return self.state.step >= self.config.steps or self.stopped_early or bool(self.state.stopped)

    @property
    def stopped_early(self) -> bool:
        """Validation has not improved `patience` times in a row."""
        return 0 < self.config.patience <= self.state.waited

    def stop(self, reason: str) -> None:
        """End the run after this step, for a callback; it is validated, saved, and not continued by a resume."""
        self.state.stopped = reason

    def is_due(self, every: int) -> bool:
        """Tell whether something that happens every so many steps, and at the end, happens now."""
        return self.state.step % every == 0 or self.state.step == self.config.steps or bool(self.state.stopped)

    def agree(self, stop: StopRequest) -> bool:
        """Tell whether some rank was asked to stop; settle if a callback ends the run, or a save is due."""
        late = time.monotonic() - self.checkpoints.saved_at >= SAVE_SECONDS
        asked, ended, self.late = self.ranks.sum(bool(stop), bool(self.state.stopped), late)
        if ended:
            self.state.stopped = max(self.ranks.gather(self.state.stopped))
        return asked > 0

    # ------------------------------------------------------------------------------------------- start, save, finish

    def start_or_resume(self) -> None:
        """Read the newest whole checkpoint, or make the first one; settle threads, memory and dtype."""
        c, ranks, data = self.config, self.ranks, self.data.fingerprint()
        keep_freed_memory()
        ranks.check_same("data", data)
        found = self.checkpoints.read(asdict(c), data)
        s = self.state = found or replace(self.state, config=asdict(c), data=data, ranks=ranks.world)
        if found is not None:
            self.say(f"resumed at step {s.step:,} of {c.steps:,}")
            if s.torch != torch.__version__:
                self.say(f"torch {torch.__version__} instead of {s.torch}: the last bits may differ")
            if s.ranks != ranks.world:
                self.say(f"{ranks.world} processes instead of {s.ranks}: the last bits may differ")
        s.threads = use_threads(s.threads if found and s.ranks == ranks.world else None, self.say)
        s.ranks = ranks.world
        if len(s.shares) < ranks.world:
            if found:
                self.say(f"a batch has too few parts for {ranks.world} processes: it gets more, and other dropout")
            s.shares = even_shares(c.accumulation, ranks.world)
        self.pace = Pace(ranks, self.device, wanted=c.balance, measured=s.paced)
        self.model.train()
        first = self.data.batch(0)
        self.eval_tokens = c.eval_tokens or max(1, int(EVAL_SHARE * c.eval_every * self.objective.count(first)))
        if found is None:
            self.choose_speed(first)
            self.checkpoints.save(s)
        if s.compiled:
            compile_blocks(self.model)
        self.gradients = ranks.sum_gradients(self.parameters)

    def choose_speed(self, batch: Batch) -> None:
        """Measure on a part of the first batch which dtype is faster and whether compiling pays; say so."""
        c, shares = self.config, self.state.shares
        measured = partial(
            choose_speed,
            self.model,
            self.objective,
            to_device(deal(batch, shares, Ranks())[0][1], self.device),
            dtype=c.dtype,
            compiling="never" if c.gradient_checkpointing else c.compile,
            parts=c.steps * len(shares) // self.ranks.world,
        )
        with torch.random.fork_rng(devices=[]):
            self.state.dtype, self.state.compiled, why = self.ranks.once(measured)
        self.state.loss_scale = FIRST_LOSS_SCALE if self.state.dtype == "fp16" else 1.0
        self.say(f"training in {why}")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Tell the callbacks of the start and, however it comes, of the end."""
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            yield
        finally:
            for callback in self.callbacks:
                callback.on_end(self, self.result)

    def open_log(self) -> Log:
        """Continue metrics.jsonl where the state says."""
        s = self.state
        unit, steps = self.objective.unit, self.config.steps
        if self.ranks.rank:
            return NoLog()
        return Log(self.folder, start=s.metrics_bytes, step=s.step, steps=steps, stream=self.stream, unit=unit)

    def save_is_due(self) -> bool:
        """Tell whether this step ends with a checkpoint."""
        return self.late > 0 or self.is_due(self.config.save_every or self.config.eval_every)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self.checkpoints.save(self.state, self.log)

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
        history = self.checkpoints.finish(s.best_step)
        self.gradients.close()
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
            stopped=s.stopped,
            history=history,
        )

    def say(self, text: str) -> None:
        """Print one sentence before the progress bar begins."""
        if self.stream is not None:
            print(text, file=self.stream, flush=True)
