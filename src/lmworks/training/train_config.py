"""How a run trains, and what came out of it. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lmworks.training.log import History
from lmworks.training.schedule import Shape


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; together with the model and the data it decides every bit of the result.

    `accumulation` is the number of parts in which a batch is computed. `patience` counts validations without
    improvement (0: never stop early). `eval_tokens` None scores as many held-out tokens as keep validation cheap.
    `criterion` says which weights are the best: those with the lowest "loss", or the highest of what is measured.
    """

    steps: int
    lr: float
    min_lr: float = 0.0
    warmup: int = 0
    schedule: Shape = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    max_grad_norm: float = 1.0
    accumulation: int = 1
    eval_every: int = 100
    eval_tokens: int | None = None
    save_every: int | None = None  # steps; None: with every validation, and every two minutes
    patience: int = 0
    criterion: str = "loss"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "always", "never"] = "auto"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What came out. Losses are in nats per scored token; `seconds` counts all sittings of a resumed run."""

    steps: int
    tokens: int
    seconds: float
    dtype: str
    best_step: int
    best_loss: float | None
    stopped_early: bool
    history: History = field(repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Scored training tokens per second, validation and saving included."""
        return self.tokens / max(self.seconds, 1e-9)
