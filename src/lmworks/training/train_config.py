"""How a run trains, and what came out of it. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lmworks.training.log import History
from lmworks.training.schedule import Shape

OptimizerName = Literal["adamw", "adam", "sgd"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; together with the model and the data it decides every bit of the result.

    `accumulation` is the number of parts in which a batch is computed. `patience` counts validations without
    improvement by at least `min_delta` (0: never stop early). `eval_tokens` None scores as many held-out tokens as keep
    validation cheap. `criterion` says which weights are the best: those with the lowest "loss", or the highest of what
    is measured. `max_grad_norm` and `clip_value` are off at 0; the value replaces the norm. `decay` is the share of the
    steps in which the schedule "wsd" falls. `layer_decay` below 1 gives deeper layers higher rates, `head_lr` the head
    a rate of its own (training/optim.py).
    """

    steps: int
    lr: float
    min_lr: float = 0.0
    warmup: int = 0
    schedule: Shape = "cosine"
    decay: float = 0.2
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.1
    momentum: float = 0.9  # of sgd
    beta1: float = 0.9
    beta2: float = 0.99
    layer_decay: float = 1.0
    head_lr: float | None = None
    max_grad_norm: float = 1.0
    clip_value: float = 0.0
    gradient_checkpointing: bool = False
    accumulation: int = 1
    eval_every: int = 100
    eval_tokens: int | None = None
    save_every: int | None = None  # steps; None: with every validation, and every two minutes
    patience: int = 0
    min_delta: float = 0.0
    criterion: str = "loss"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "always", "never"] = "auto"
    balance: Literal["auto", "always", "never"] = "auto"  # rows by the speed of each rank; auto: if devices differ
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What came out. Losses are in nats per scored token; `seconds` counts all sittings of a resumed run.

    `stopped` is the reason that a callback gave to end early, or "".
    """

    steps: int
    tokens: int
    seconds: float
    dtype: str
    best_step: int
    best_loss: float | None
    stopped_early: bool
    stopped: str = ""
    history: History = field(repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Scored training tokens per second, validation and saving included."""
        return self.tokens / max(self.seconds, 1e-9)


def count_moments(optimizer: str, momentum: float) -> int:
    """Return how many numbers an optimizer remembers of each parameter."""
    return 2 if optimizer != "sgd" else 1 if momentum else 0
