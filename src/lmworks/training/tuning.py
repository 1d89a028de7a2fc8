"""Every knob of a fine-tuning run: the command line's flags, and what a resumed run must repeat. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from lmworks.base.errors import InputError, did_you_mean
from lmworks.tasks.base import Long, one_of

Method = Literal["full", "head", "lora"]
Dtype = Literal["auto", "fp32", "bf16"]
LEARNING_RATES: dict[str, float] = {"full": 5e-5, "head": 1e-3, "lora": 5e-4}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How to fine-tune a model.

    Parameters
    ----------
    method
        full trains every parameter, head only the new head, lora small matrices beside the frozen ones, and the head.
    epochs
        Times that every example is seen.
    lr
        Highest learning rate; by default 5e-5 for full, 1e-3 for head, 5e-4 for lora.
    batch_size
        Rows in one optimizer step.
    batch_tokens
        Tokens in one optimizer step at most, padding included.
    accumulation
        Parts into which each batch is split to save memory; the result is the same.
    rank
        Width of lora's matrices.
    max_length
        Tokens of an input at most; by default what the model takes.
    long
        A text that is longer: refuse it, cut it, or read it in windows.
    freeze
        Parameters that stay as they are: names, beginnings of names, or patterns.
    warmup
        Share of the steps in which the learning rate rises.
    weight_decay
        AdamW's decay of the matrices; vectors are not decayed.
    label_smoothing
        Share of each target that goes to all labels alike.
    class_weights
        Weigh the loss so that all classes count alike.
    balanced
        Draw the rows so that all classes come equally often.
    every_token
        Score all tokens of a word, not only its first.
    whole_words
        Hide whole words (fill-mask).
    patience
        Stop after this many validations without a better score; 0 never stops early.
    dtype
        auto measures bf16 against fp32 on this processor and takes the faster.
    seed
        Decides what is held out, the new head, the batches and dropout.
    """

    method: Method = "full"
    epochs: int = 3
    lr: float | None = None
    batch_size: int = 16
    batch_tokens: int | None = None
    accumulation: int = 1
    rank: int = 8
    max_length: int | None = None
    long: Long = "error"
    freeze: tuple[str, ...] = ()
    warmup: float = 0.1
    weight_decay: float = 0.01
    label_smoothing: float = 0.0
    class_weights: bool = False
    balanced: bool = False
    every_token: bool = False
    whole_words: bool = False
    patience: int = 0
    dtype: Dtype = "auto"
    seed: int = 0

    def check(self) -> Tuning:
        """Return the knobs; raise InputError for the first outside its range."""
        one_of(self.method, get_args(Method), "method")
        one_of(self.long, get_args(Long), "way with long texts")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} is out of range", found=str(value), expected=f"{low} to {high}")
        return replace(self, freeze=tuple(self.freeze), lr=self.lr or LEARNING_RATES[self.method])

    @staticmethod
    def from_dict(knobs: dict[str, Any]) -> Tuning:
        """Return the knobs of these names; an unknown one is an InputError with a suggestion."""
        known = [f.name for f in fields(Tuning)]
        for name in knobs:
            if name not in known:
                near = did_you_mean(name, known).strip()
                raise InputError(f"there is no knob {name!r}", expected=", ".join(known), fix=near)
        return Tuning(**knobs)


RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, 10_000),
    "lr": (1e-8, 10.0),
    "batch_size": (1, 65_536),
    "batch_tokens": (1, 2**30),
    "accumulation": (1, 65_536),
    "rank": (1, 4096),
    "max_length": (4, 2**20),
    "warmup": (0.0, 1.0),
    "weight_decay": (0.0, 10.0),
    "label_smoothing": (0.0, 0.99),
    "patience": (0, 10**6),
    "seed": (0, 2**32 - 1),
}
