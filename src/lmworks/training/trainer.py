"""The only training loop.

Every step is a pure function of the weights, the optimizer's memory and the step number: the batch and the dropout draw
from generators seeded by (seed, step). So a run that was killed continues to the same bits (on as many threads).
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lmworks.base.errors import InputError, Interrupted, TrainingError
from lmworks.base.files import read_json
from lmworks.base.threads import cpu_count
from lmworks.models.heads import CausalLM
from lmworks.training import state as checkpoint
from lmworks.training.data import Data
from lmworks.training.interrupt import Interrupt
from lmworks.training.log import MetricsFile, Progress
from lmworks.training.objectives import IGNORED, Objective, causal_lm
from lmworks.training.optim import learning_rate, make_optimizer

PAYS = 1.1  # bf16 is chosen when it is at least so much faster


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train."""

    steps: int
    lr: float
    min_lr: float = 0.0
    warmup: int = 0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    max_grad_norm: float = 1.0
    accumulation: int = 1
    eval_every: int = 100
    patience: int = 0
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0


@dataclass
class History:
    """The losses of a run: (step, nats per token); training is the mean since the point before."""

    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run has reached; the model holds the weights of `best_step`."""

    steps: int
    best_step: int
    best_loss: float
    seconds: float
    tokens_per_second: float
    dtype: str
    history: History


@dataclass
class Cursor:
    """Where a run stands: everything but tensors."""

    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    waited: int = 0  # validations since the best one
    seconds: float = 0.0
    dtype: str = ""
    metrics_size: int = 0
    loss_sum: float = 0.0  # of the training losses since the last validation
    loss_count: int = 0
    history: History = field(default_factory=History)
    threads: int = 0


class Trainer:
    """Train a model on data in a folder: `Trainer(model, data, config=…, folder=…).fit()`."""

    def __init__(
        self, model: CausalLM, data: Data, *, config: TrainConfig, folder: Path, objective: Objective = causal_lm
    ) -> None:
        self.model, self.data, self.config, self.folder, self.objective = model, data, config, folder, objective
        self.optimizer = make_optimizer(
            model, lr=config.lr, weight_decay=config.weight_decay, beta1=config.beta1, beta2=config.beta2
        )
        self.at = Cursor(threads=cpu_count())
        self.kept: dict[str, Path | None] = {"last": None, "best": None}

    def fit(self) -> TrainResult:
        """Train to the end, or from where an earlier run stopped; leave the best weights in the model.

        Raises Interrupted after saving when Ctrl-C or SIGTERM arrives, and TrainingError before an optimizer step that
        a NaN would spoil.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError("another process trains in this folder", where=str(self.folder)) from None
            torch.set_num_threads(cpu_count())
            self.resume()
            with Interrupt() as interrupt:
                self.loop(interrupt)
        finally:
            os.close(lock)
        if self.kept["best"] is not None:
            checkpoint.load_model_tensors(self.model, checkpoint.read_tensors(self.kept["best"], "model"))
        self.model.eval()
        return self.result()

    def loop(self, interrupt: Interrupt) -> None:
        """Step, log, validate, save."""
        config, at = self.config, self.at
        metrics = MetricsFile(self.folder, size=at.metrics_size)
        progress = Progress(config.steps, at.step)
        held_out = self.data.held_out()
        try:
            while at.step < config.steps and not self.is_stalled():
                started = time.perf_counter()
                lr = self.set_learning_rate()
                inputs, targets = self.data.batch(at.step)
                loss, norm = self.optimize(inputs, targets)
                elapsed = time.perf_counter() - started
                at.step, at.seconds = at.step + 1, at.seconds + elapsed
                at.loss_sum, at.loss_count = at.loss_sum + loss, at.loss_count + 1
                speed = inputs.numel() / elapsed
                values = {"step": at.step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_second": round(speed)}
                due = at.step % config.eval_every == 0 or at.step == config.steps
                if due:
                    at.history.train.append((at.step, at.loss_sum / at.loss_count))
                    at.loss_sum, at.loss_count = 0.0, 0
                    values["validation_loss"] = self.validate(held_out)
                metrics.write(values)
                validation = at.history.validation[-1][1] if at.history.validation else None
                progress.update(at.step, loss=loss, lr=lr, speed=speed, validation=validation)
                if due or interrupt.asked:
                    at.metrics_size = metrics.flush()
                    self.save()
                if interrupt.asked and at.step < config.steps:
                    raise Interrupted(f"stopped after step {at.step:,} of {config.steps:,}; everything is saved")
        finally:
            metrics.close()

    def optimize(self, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
        """Take one optimizer step on a batch; return the mean loss and the gradient's norm before clipping.

        The loss of each part is divided by the targets of the whole batch, so accumulation does not change the result.
        """
        config, at = self.config, self.at
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.accumulate(inputs, targets)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            last = self.kept["last"]
            raise TrainingError(
                f"the loss or its gradient is not finite at step {at.step + 1:,}; no weight was changed by it",
                found=f"loss {loss.item()}, gradient norm {norm.item()}",
                where=str(last) if last else "no checkpoint yet",
                fix=f"start again with a lower learning rate, for example --lr {config.lr / 3:.1e}",
            )
        self.optimizer.step()
        return loss.item(), norm.item()

    def accumulate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Add up the gradients of the parts of a batch; return the batch's mean loss."""
        counted = max(1, int((targets != IGNORED).sum()))
        total = torch.zeros(())
        parts = self.config.accumulation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed * 1_000_003 + self.at.step)
            for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
                with self.autocast():
                    loss, _ = self.objective(self.model, x, y)
                (loss / counted).backward()  # type: ignore[no-untyped-call]
                total += loss.detach() / counted
        return total

    def validate(self, held_out: list[tuple[Tensor, Tensor]]) -> float:
        """Return the mean loss on the held-out batches, in nats; note whether it is the best so far."""
        self.model.eval()
        total, counted = 0.0, 0
        with torch.inference_mode():
            for inputs, targets in held_out:
                with self.autocast():
                    part, n = self.objective(self.model, inputs, targets)
                total, counted = total + part.item(), counted + n
        loss, at = total / counted, self.at
        at.history.validation.append((at.step, loss))
        if loss < at.best_loss:
            at.best_loss, at.best_step, at.waited = loss, at.step, 0
        else:
            at.waited += 1
        return loss

    def is_stalled(self) -> bool:
        """Say whether the validation loss has not improved for `patience` validations."""
        return 0 < self.config.patience <= self.at.waited

    def autocast(self) -> Any:
        """Return the context in which the network runs."""
        return torch.autocast("cpu", torch.bfloat16) if self.at.dtype == "bf16" else nullcontext()

    def set_learning_rate(self) -> float:
        """Set and return the rate of the coming step."""
        c = self.config
        lr = learning_rate(self.at.step, steps=c.steps, lr=c.lr, min_lr=c.min_lr, warmup=c.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def save(self) -> None:
        """Write the best weights if they are new, then the state; only then let older checkpoints go."""
        at, model = self.at, checkpoint.model_tensors(self.model)
        best = self.kept["best"]
        if at.best_step == at.step and at.history.validation and at.history.validation[-1][0] == at.step:
            facts = {"step": at.step, "validation_loss": at.best_loss}
            best = checkpoint.write(self.folder, "best", at.step, tensors={"model": model}, state=facts)
        tensors = {"model": model, "optimizer": checkpoint.optimizer_tensors(self.model, self.optimizer)}
        last = checkpoint.write(self.folder, "last", at.step, tensors=tensors, state=self.describe())
        self.kept = {"last": last, "best": best}
        checkpoint.clean(self.folder, last, best)

    def describe(self) -> dict[str, Any]:
        """Return the cursor as JSON; an infinite best loss as null."""
        values = asdict(self.at)
        values["best_loss"] = self.at.best_loss if self.at.best_step else None
        return {**values, "config": asdict(self.config), "torch": torch.__version__}

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, if there is one; else choose the dtype."""
        last = checkpoint.find(self.folder, "last")
        if last is None:
            checkpoint.clean(self.folder)
            self.at.dtype = self.choose_dtype()
            return
        values = read_json(last / "state.json")
        history = History(*([tuple(p) for p in values["history"][k]] for k in ("train", "validation")))
        names = ("step", "best_step", "waited", "seconds", "dtype", "metrics_size", "loss_sum", "loss_count", "threads")
        best_loss = float("inf") if values["best_loss"] is None else values["best_loss"]
        self.at = Cursor(**{name: values[name] for name in names}, best_loss=best_loss, history=history)
        if self.at.threads != cpu_count():
            raise InputError(
                "a resumed run must use as many threads as before to reach the same bits",
                found=str(cpu_count()),
                expected=str(self.at.threads),
                fix=f"set LMWORKS_THREADS={self.at.threads}",
            )
        checkpoint.load_model_tensors(self.model, checkpoint.read_tensors(last, "model"))
        memory = checkpoint.read_tensors(last, "optimizer")
        checkpoint.load_optimizer_tensors(self.model, self.optimizer, memory)
        best = self.folder / f"best-{self.at.best_step:06d}" if self.at.best_step else None
        self.kept = {"last": last, "best": best}
        checkpoint.clean(self.folder, last, best)

    def choose_dtype(self) -> str:
        """Return the configured dtype; for "auto", time two batches in fp32 and in bf16 and take the faster."""
        if self.config.dtype != "auto":
            return self.config.dtype
        seconds = {}
        inputs, targets = self.data.batch(0)
        for dtype in ("fp32", "bf16"):
            self.at.dtype = dtype
            times = []
            for _ in range(3):
                started = time.perf_counter()
                self.accumulate(inputs, targets)
                times.append(time.perf_counter() - started)
            seconds[dtype] = min(times)
        self.optimizer.zero_grad(set_to_none=True)
        return "bf16" if seconds["fp32"] >= PAYS * seconds["bf16"] else "fp32"

    def result(self) -> TrainResult:
        """Return what was reached."""
        at = self.at
        tokens = at.step * self.data.batch(0)[0].numel()
        speed = tokens / at.seconds if at.seconds else 0.0
        return TrainResult(at.step, at.best_step, at.best_loss, at.seconds, speed, at.dtype, at.history)
