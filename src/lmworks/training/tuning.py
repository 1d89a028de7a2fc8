"""Every knob of a fine-tuning run: the command line's flags, and what a resumed run must repeat. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lmworks.base.errors import InputError
from lmworks.base.knobs import check_belongs, check_ranges, check_useful, read_knobs
from lmworks.tasks.base import Long, one_of
from lmworks.training.schedule import Shape
from lmworks.training.trackers import check_names
from lmworks.training.train_config import OptimizerName

Method = Literal["full", "head", "lora", "adapter", "prefix"]
Curriculum = Literal["none", "length", "loss", "given"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
BaseDtype = Literal["fp32", "bf16", "int8"]
Balance = Literal["auto", "always", "never"]
Init = Literal["mean", "random"]
LEARNING_RATES: dict[str, float] = {"full": 5e-5, "head": 1e-3, "lora": 5e-4, "adapter": 1e-3, "prefix": 1e-2}
LONG_TASKS = ("text-classification", "token-classification", "feature-extraction")  # which --long has a say in
ADAPTERS = ("lora", "adapter", "prefix")  # methods that leave an adapter beside its base, not a whole model


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How to fine-tune a model.

    Parameters
    ----------
    method
        full trains every parameter, head only the new head, lora small matrices beside the frozen ones, and the head;
        adapter a narrow network after each half of a block, prefix keys and values before the text, both with the head.
    epochs
        Times that every example is seen.
    lr
        Highest learning rate; by default 5e-5 for full, 5e-4 for lora, 1e-3 for head and adapter, 1e-2 for prefix.
    batch_size
        Rows in one optimizer step.
    batch_tokens
        A second limit on one optimizer step: it has --batch-size rows, or as many fewer as keep it within so many
        tokens, padding included; a longer row is a step of its own.
    accumulation
        Parts into which each batch is split to save memory; the result is the same.
    rank
        Width of lora's matrices.
    alpha
        Strength of lora: its change is multiplied by alpha / rank.
    lora_dropout
        Share of the inputs of lora's matrices that are dropped while training.
    targets
        Layers that lora changes, with commas: "q_proj,v_proj", patterns, all-linear; by default queries and values.
    rslora
        Multiply lora's change by alpha / sqrt(rank) instead: for high ranks.
    dora
        Learn the length of each row of a matrix apart from its direction (lora): slower, often a little better.
    base_dtype
        How the frozen base of lora is held while it is trained: fp32, bf16 (half the memory) or int8 (a quarter).
    add_tokens
        Tokens that the model learns besides its own: "one,two", a file with one a line, auto:500 for the words of the
        training data that save most, or fit for those that only the tokenizer has.
    init
        What a new token starts as: the mean of what its text was cut into before, or random.
    bottleneck
        Width of adapter's networks.
    prefix_length
        Positions that prefix takes before the text.
    max_length
        Tokens of an input at most; by default what the model takes.
    long
        A text that is longer: refuse it, cut it, or read it in windows.
    freeze
        Parameters that stay as they are: names, beginnings of names, or patterns.
    train_only
        Parameters that are trained, and no others: as for freeze, or "parts" for your own layers.
    insert
        PLACE=FILE.py:Name: a layer of your own that follows one of the model's, such as layers.5.
    swap
        PLACE=FILE.py:Name: a layer of your own, or an activation by its name, instead of one of the model's.
    code
        FILE.py:Name of layers of its maker's own that the model already has; this file is run.
    warmup
        Share of the steps in which the learning rate rises.
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
    layer_decay
        Each layer learns at this share of the rate of the layer above it; 1: all alike.
    head_lr
        Highest learning rate of the head; by default that of the top layer.
    max_grad_norm
        Clip the global norm of the gradient at this; 0 is off.
    clip_value
        Clip every number of the gradient at this instead; 0 is off.
    gradient_checkpointing
        Save memory by computing each layer again for its gradient: about two fifths more time.
    balance_ranks
        Under torchrun, more rows to faster devices: if they are unlike (auto), always or never.
    label_smoothing
        Share of each target that goes to all labels alike.
    class_weights
        Weigh the loss so that all classes count alike.
    balanced
        Draw the rows so that all classes come equally often.
    pack
        Put several texts end to end in one row of max_length tokens (at most 512 by default), where none sees another.
    curriculum
        Begin with easy rows: short ones, those the model finds likely, or as the file has them.
    also
        FILE=WEIGHT: more data of the same task, and its share of each batch; may be given several times. FILE:SPLIT
        where the file has splits.
    also_task
        FILE=TASK=WEIGHT: another task, learned by the same body with a head of its own, and its share of the steps; may
        be given several times. OUT then holds a model folder for each task.
    also_evaluate
        A text on which to compare the model before and after (text-generation); may be given several times.
    every_token
        Score all tokens of a word, not only its first.
    whole_words
        Hide whole words (fill-mask).
    patience
        Stop after this many validations without a better score; 0 never stops early.
    temperature
        Divides the cosines of the contrastive losses: a smaller one makes near misses count more.
    symmetric
        Also the partner must find its anchor (feature-extraction with pairs).
    triplet_loss
        Learn distances of triplets instead of ranks (feature-extraction).
    contrastive
        First bring texts of one label together, then fit the head by logistic regression (text-classification).
    shots
        Learn from so many examples of each label, chosen by the seed; the others only serve to score.
    draws
        Repeat with so many choices of the shots and report the spread; the first one's model is kept.
    min_delta
        A score counts as better, for the patience, only by this much.
    track
        Where the curves go besides metrics.jsonl: tensorboard, mlflow, wandb, trackio; several with commas.
    workers
        Threads that prepare batches ahead, for pictures that are slow to read.
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
    alpha: float = 16.0
    lora_dropout: float = 0.0
    targets: str = ""
    rslora: bool = False
    dora: bool = False
    base_dtype: BaseDtype = "fp32"
    add_tokens: str = ""
    init: Init = "mean"
    bottleneck: int = 48
    prefix_length: int = 16
    max_length: int | None = None
    long: Long = "error"
    freeze: tuple[str, ...] = ()
    train_only: tuple[str, ...] = ()
    insert: tuple[str, ...] = ()
    swap: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    warmup: float = 0.1
    schedule: Shape = "cosine"
    decay: float = 0.2
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.01
    momentum: float = 0.9
    layer_decay: float = 1.0
    head_lr: float | None = None
    max_grad_norm: float = 1.0
    clip_value: float = 0.0
    gradient_checkpointing: bool = False
    balance_ranks: Balance = "auto"
    label_smoothing: float = 0.0
    class_weights: bool = False
    balanced: bool = False
    pack: bool = False
    curriculum: Curriculum = "none"
    also: tuple[str, ...] = ()
    also_task: tuple[str, ...] = ()
    also_evaluate: tuple[str, ...] = ()
    every_token: bool = False
    whole_words: bool = False
    patience: int = 0
    temperature: float = 0.05
    symmetric: bool = False
    triplet_loss: bool = False
    contrastive: bool = False
    shots: int | None = None
    draws: int = 1
    min_delta: float = 0.0
    track: str = ""
    workers: int = 0
    dtype: Dtype = "auto"
    seed: int = 0

    def check(self) -> Tuning:
        """Return the knobs; raise InputError for the first outside its range."""
        one_of(self.method, get_args(Method), "method")
        one_of(self.long, get_args(Long), "way with long texts")
        one_of(self.optimizer, get_args(OptimizerName), "optimizer")
        one_of(self.schedule, get_args(Shape), "schedule")
        one_of(self.dtype, get_args(Dtype), "number format")
        one_of(self.balance_ranks, get_args(Balance), "way to balance the ranks")
        one_of(self.base_dtype, get_args(BaseDtype), "number format of the base")
        one_of(self.init, get_args(Init), "start of new tokens")
        self.check_uses()
        check_names(self.track)
        one_of(self.curriculum, get_args(Curriculum), "curriculum")
        check_ranges(self, RANGES)
        if self.draws > 1 and self.shots is None:
            raise InputError("--draws repeats the choice of --shots", fix="--shots 8, say; or leave --draws out")
        if self.shots is not None and self.also:
            raise InputError("--shots learns from a few examples of one file", found="--also " + " ".join(self.also),
                             fix="leave out --also, or --shots")  # fmt: skip
        lists: dict[str, Any] = {name: tuple(getattr(self, name)) for name in LISTS}
        return replace(self, **lists, lr=self.lr or LEARNING_RATES[self.method])

    def check_uses(self) -> None:
        """Raise InputError for knobs that the method, or another knob, has no use for."""
        plain = Tuning()
        check_belongs(self, plain, BELONGS)
        clipped = self.clip_value and self.max_grad_norm not in (0, plain.max_grad_norm)
        check_useful(
            {
                "--init is for new tokens": (self.init != plain.init and not self.add_tokens, "no --add-tokens"),
                "--min-delta is for the patience": (bool(self.min_delta) and not self.patience, "no --patience"),
                "--clip-value takes the place of --max-grad-norm": (bool(clipped), "--clip-value and --max-grad-norm"),
                "--shots trains to the last step": (
                    self.shots is not None and bool(self.patience), "--shots and --patience"
                ),
                "--gradient-checkpointing is for layers that are trained": (
                    self.method == "head" and self.gradient_checkpointing, "--method head"
                ),
            }
        )  # fmt: skip
        if self.add_tokens and self.method not in ("full", "lora"):
            raise InputError("new tokens are not trained by this method", found=f"--method {self.method}",
                             expected="full or lora",
                             fix="--method lora trains their rows and small matrices")  # fmt: skip

    @staticmethod
    def from_dict(knobs: dict[str, Any]) -> Tuning:
        """Return the knobs of these names; an unknown one is an InputError with a suggestion."""
        return read_knobs(Tuning, knobs)


BELONGS = {  # a knob, and the choice without which it would do nothing
    **dict.fromkeys(
        ("rank", "alpha", "lora_dropout", "targets", "rslora", "dora", "base_dtype"), ("method", ("lora",))
    ),
    "bottleneck": ("method", ("adapter",)),
    "prefix_length": ("method", ("prefix",)),
    "momentum": ("optimizer", ("sgd",)),
    "decay": ("schedule", ("wsd",)),
}
LISTS = ("freeze", "train_only", "insert", "swap", "code", "also", "also_task", "also_evaluate")
RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, 10_000),
    "lr": (1e-8, 10.0),
    "batch_size": (1, 65_536),
    "batch_tokens": (1, 2**30),
    "accumulation": (1, 65_536),
    "rank": (1, 4096),
    "alpha": (1e-6, 1e6),
    "lora_dropout": (0.0, 0.99),
    "bottleneck": (1, 65_536),
    "prefix_length": (1, 65_536),
    "max_length": (4, 2**20),
    "warmup": (0.0, 1.0),
    "decay": (0.0, 1.0),
    "weight_decay": (0.0, 10.0),
    "momentum": (0.0, 0.9999),
    "layer_decay": (0.01, 1.0),
    "head_lr": (1e-8, 10.0),
    "max_grad_norm": (0.0, 1e9),
    "clip_value": (0.0, 1e9),
    "label_smoothing": (0.0, 0.99),
    "patience": (0, 10**6),
    "min_delta": (0.0, 1e9),
    "workers": (0, 64),
    "temperature": (1e-3, 100.0),
    "shots": (1, 10**6),
    "draws": (1, 1000),
    "seed": (0, 2**32 - 1),
}
