"""Every knob of a training run, in one place: the command line's flags, the run's `config.yaml`, the size dial.

A knob left at None takes the value of its `--size`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.knobs import check_belongs, check_ranges, check_useful

Size = Literal["tiny", "small", "base"]
Arch = Literal["transformer", "feedforward", "rnn", "lstm", "gru"]
Objective = Literal["causal-lm", "masked-lm"]
Family = Literal["llama", "gpt2", "modernbert", "bert"]
ENCODERS = ("modernbert", "bert")
TokenizerKind = Literal["word", "char", "bpe", "wordpiece", "unigram"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
Balance = Literal["auto", "always", "never"]
OptimizerName = Literal["adamw", "adam", "sgd"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train a language model on texts.

    Parameters
    ----------
    size
        The dial: tiny trains in minutes on two cores, small in about half an hour, base in hours.
    objective
        causal-lm predicts the next token; masked-lm (Devlin et al. 2019) hidden ones, from both sides.
    arch
        transformer, or what came before it: feedforward (a window of tokens), rnn, lstm, gru (a state).
    family
        The Transformer: llama (rotary positions, gated MLP) or gpt2 (learned positions); for masked-lm modernbert
        (rotary, learns sooner) or bert.
    tokenizer
        word, char (grapheme clusters), bpe (byte-level, loses nothing), wordpiece or unigram.
    vocab_size
        Tokens in the vocabulary; by default it follows the size of the corpus.
    hidden_size
        Width of the network.
    embedding_size
        Width of the tokens' vectors without attention; by default hidden_size.
    window
        Tokens that feedforward sees at once; by default 8.
    whole_words
        masked-lm hides whole words, not single tokens.
    layers
        Blocks of a Transformer, or layers of what came before it.
    heads
        Attention heads; by default of 64 numbers each, or as near to it as hidden_size allows.
    context
        Tokens the model sees at once.
    batch_size
        Windows of `context` tokens in one optimizer step.
    accumulation
        Parts into which each batch is split to save memory; the result is the same.
    steps
        Optimizer steps.
    lr
        Highest learning rate.
    min_lr
        Learning rate at the end of the schedule.
    warmup
        Steps of linear warm-up.
    schedule
        How the rate goes on after the warm-up: cosine, linear, constant, or wsd (stable, then linear).
    decay
        Share of the steps in which the schedule wsd falls.
    optimizer
        adamw, adam (its weight decay is part of the gradient) or sgd.
    weight_decay
        Decay of the matrices; vectors are not decayed.
    momentum
        Of sgd.
    beta2
        Of adamw and adam: how long squared gradients are remembered.
    dropout
        Probability of dropping an activation while training.
    max_grad_norm
        Clip the global norm of the gradient at this; 0 is off.
    clip_value
        Clip every number of the gradient at this instead; 0 is off.
    gradient_checkpointing
        Save memory by computing each layer again for its gradient: about two fifths more time.
    balance_ranks
        Under torchrun, more rows to faster devices: if they are unlike (auto), always or never.
    eval_every
        Steps between validations.
    patience
        Stop after this many validations without improvement; 0 never stops early.
    validation
        Share of the text kept for validation.
    dtype
        auto measures bf16 against fp32 on this processor and takes the faster.
    seed
        Decides the split, the initial weights, the batches and dropout.
    """

    size: Size = "tiny"
    objective: Objective = "causal-lm"
    arch: Arch = "transformer"
    family: Family | None = None
    tokenizer: TokenizerKind = "bpe"
    vocab_size: int | None = None
    hidden_size: int | None = None
    embedding_size: int | None = None
    window: int | None = None
    whole_words: bool = False
    layers: int | None = None
    heads: int | None = None
    context: int | None = None
    batch_size: int | None = None
    accumulation: int = 1
    steps: int | None = None
    lr: float | None = None
    min_lr: float | None = None
    warmup: int | None = None
    schedule: Schedule = "cosine"
    decay: float = 0.2
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.1
    momentum: float = 0.9
    beta2: float = 0.99
    dropout: float | None = None
    max_grad_norm: float = 1.0
    clip_value: float = 0.0
    gradient_checkpointing: bool = False
    balance_ranks: Balance = "auto"
    eval_every: int | None = None
    patience: int = 0
    validation: float = 0.1
    dtype: Dtype = "auto"
    seed: int = 0

    def resolve(self, corpus_bytes: int) -> Settings:
        """Fill every knob that is None from the size dial and the corpus; check the ranges."""
        self.check_uses()
        chosen: dict[str, Any] = dict(SIZES[self.size])
        cap = chosen.pop("largest_vocab")
        if self.arch != "transformer":
            chosen = {name: value for name, value in chosen.items() if name != "heads"} | EARLIER[self.arch]
            chosen["embedding_size"] = self.hidden_size or chosen["hidden_size"]
        if self.arch == "transformer":
            chosen["family"] = "modernbert" if self.is_masked else "llama"
        chosen["vocab_size"] = max(512, min(cap, corpus_bytes // 500 // 64 * 64))
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.arch == "transformer" and self.hidden_size:
            chosen["heads"] = count_heads(self.hidden_size)
        full = {**chosen, **given}
        if self.arch != "transformer" and self.dtype == "auto":
            full["dtype"] = "fp32"  # a state is summed over hundreds of steps
        full.setdefault("min_lr", full["lr"] / 10)
        full.setdefault("warmup", min(100, max(1, full["steps"] // 10)))
        full.setdefault("eval_every", max(1, full["steps"] // 10))
        settings = Settings(**full)
        settings.check()
        return settings

    @property
    def is_masked(self) -> bool:
        """Whether hidden tokens are learned, not the next one."""
        return self.objective == "masked-lm"

    def check(self, *, page: bool = False) -> None:
        """Raise InputError for the first knob outside its range; `page`: for what a web page cannot run."""
        check_ranges(self, RANGES)
        if self.lr is not None and self.min_lr is not None and self.min_lr > self.lr:
            raise InputError("--min-lr is above --lr", found=f"{self.min_lr:g} and {self.lr:g}",
                             expected="the rate falls to --min-lr")  # fmt: skip
        if self.warmup is not None and self.steps is not None and self.warmup > self.steps:
            raise InputError("--warmup is longer than the training", found=f"{self.warmup} of {self.steps} steps",
                             expected="fewer steps than --steps, or --lr is never reached")  # fmt: skip
        for name, kind in CHOICES.items():
            if getattr(self, name) not in (*get_args(kind), getattr(Settings(), name)):
                found, known = str(getattr(self, name)), get_args(kind)
                near = did_you_mean(found, known).strip()
                raise InputError(f"there is no such {name}", found=found, expected=", ".join(known), fix=near)
        if page and self.arch != "transformer":
            raise InputError("the web page runs Transformers only", found=f"--arch {self.arch}",
                             fix=f"lmworks train --arch {self.arch}, then lmworks export --to onnx")  # fmt: skip
        if page and self.is_masked:
            raise InputError("the page of build writes texts", found="--objective masked-lm",
                             fix="lmworks train --objective masked-lm, then lmworks export --to web")  # fmt: skip
        if self.hidden_size and self.heads and (self.hidden_size % self.heads or self.hidden_size // self.heads % 2):
            raise InputError(
                "--hidden-size must be an even multiple of --heads",
                found=f"{self.hidden_size} and {self.heads} heads",
                fix=f"--hidden-size {max(1, round(self.hidden_size / self.heads / 2)) * 2 * self.heads}",
            )
        if self.batch_size and self.batch_size % self.accumulation:
            raise InputError(
                "--accumulation must divide --batch-size", found=f"{self.accumulation} and {self.batch_size}"
            )

    def check_uses(self) -> None:
        """Raise InputError for a knob that another one leaves without effect."""
        plain = Settings()
        check_belongs(self, plain, BELONGS)
        if self.is_masked and self.arch != "transformer":
            raise InputError("masked-lm looks at both sides of a token", found=f"--arch {self.arch}",
                             fix="--arch transformer")  # fmt: skip
        if self.family is not None and self.is_masked != (self.family in ENCODERS):
            raise InputError(f"{self.family} is not made for {self.objective}", found=f"--family {self.family}",
                             fix="bert, modernbert with --objective masked-lm; llama, gpt2 without")  # fmt: skip
        clipped = self.clip_value and self.max_grad_norm not in (0, plain.max_grad_norm)
        check_useful(
            {
                "--beta2 is for adamw and adam": (
                    self.optimizer == "sgd" and self.beta2 != plain.beta2, "--optimizer sgd"
                ),
                "--min-lr is for a rate that falls": (
                    self.schedule == "constant" and self.min_lr is not None, "--schedule constant"
                ),
                "--clip-value takes the place of --max-grad-norm": (bool(clipped), "--clip-value and --max-grad-norm"),
            }
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return every knob by name."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Settings:
        """Read what `to_dict` gave; an unknown name is an error with a suggestion."""
        names = {f.name for f in fields(Settings)}
        for name in values:
            if name not in names:
                raise InputError(f"unknown setting {name}", fix=did_you_mean(name, names).strip() or "remove it")
        return replace(Settings(), **values)


def count_heads(hidden_size: int) -> int:
    """Return how many heads of an even width divide hidden_size into parts of nearly 64; 1 where none do."""
    fitting = [heads for heads in range(1, 257) if hidden_size % (2 * heads) == 0]
    return min(fitting, key=lambda heads: abs(hidden_size / heads - 64), default=1)


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 192, "layers": 4, "heads": 3, "context": 128, "batch_size": 16, "steps": 600, "lr": 3e-3,
        "dropout": 0.0, "largest_vocab": 1024,
    },
    "small": {
        "hidden_size": 320, "layers": 6, "heads": 5, "context": 256, "batch_size": 16, "steps": 3000, "lr": 1.5e-3,
        "dropout": 0.1, "largest_vocab": 4096,
    },
    "base": {
        "hidden_size": 512, "layers": 8, "heads": 8, "context": 512, "batch_size": 16, "steps": 12000, "lr": 1e-3,
        "dropout": 0.1, "largest_vocab": 8192,
    },
}  # fmt: skip

EARLIER: dict[str, dict[str, Any]] = {  # than the Transformer
    "feedforward": {"layers": 1, "window": 8},
    "rnn": {"layers": 2},
    "lstm": {"layers": 2},
    "gru": {"layers": 2},
}
BELONGS = {  # a knob does nothing without the choice
    "momentum": ("optimizer", ("sgd",)),
    "decay": ("schedule", ("wsd",)),
    "heads": ("arch", ("transformer",)),
    "family": ("arch", ("transformer",)),
    "window": ("arch", ("feedforward",)),
    "whole_words": ("objective", ("masked-lm",)),
    "embedding_size": ("arch", tuple(EARLIER)),
}
CHOICES = {
    "objective": Objective,
    "arch": Arch,
    "family": Family,
    "tokenizer": TokenizerKind,
    "size": Size,
    "schedule": Schedule, "optimizer": OptimizerName, "dtype": Dtype, "balance_ranks": Balance,
}  # fmt: skip
RANGES: dict[str, tuple[float, float]] = {
    "vocab_size": (260, 200_000),
    "hidden_size": (8, 16_384),
    "embedding_size": (1, 16_384),
    "window": (1, 1024),
    "layers": (1, 200),
    "heads": (1, 256),
    "context": (8, 131_072),
    "batch_size": (1, 65_536),
    "accumulation": (1, 65_536),
    "steps": (1, 10**9),
    "lr": (1e-8, 10.0),
    "min_lr": (0.0, 10.0),
    "warmup": (0, 10**9),
    "decay": (0.0, 1.0),
    "weight_decay": (0.0, 10.0),
    "momentum": (0.0, 0.9999),
    "beta2": (0.0, 1.0),
    "dropout": (0.0, 0.95),
    "max_grad_norm": (0.0, 1e9),
    "clip_value": (0.0, 1e9),
    "eval_every": (1, 10**9),
    "patience": (0, 10**6),
    "validation": (0.001, 0.5),
    "seed": (0, 2**32 - 1),
}
