"""Distillation: a smaller model learns from a larger one what it says, beside what the data say.

    loss = alpha · T² · KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) · task + hidden_weight · hidden

T² keeps the gradient of the first term as large as at T = 1 (Hinton et al. 2015, section 2). `hidden` is 1 - cosine, or
the squared error, between a layer of the student and the teacher's layer that it came from, as DistilBERT has it for
the last layer (Sanh et al. 2019, section 2). Labels that may hold at once have a sigmoid each instead of the softmax, a
number its squared error to the teacher's. The teacher runs without dropout and is no part of the student, so no
checkpoint holds it.

Shapes: B batch, T tokens, L labels, N scored rows or tokens, D hidden_size of the student, E that of the teacher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.base.types import Batch
from lmworks.models.checkpoint import load_model, make_empty
from lmworks.models.families import TASKS, read_config, read_kind
from lmworks.models.heads import Head, Model
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.adapter_files import open_adapter
from lmworks.training.data import IGNORED
from lmworks.training.lora import merge_lora
from lmworks.training.objectives import BinaryLoss, CausalLoss, ClassLoss, SpanLoss, SquaredLoss
from lmworks.training.peft_format import CONFIG as ADAPTER_CONFIG
from lmworks.training.peft_format import read_settings
from lmworks.training.supervision import WORDS
from lmworks.training.trainable import open_model

Hidden = Literal["cosine", "mse"]
TaskLoss = CausalLoss | ClassLoss | BinaryLoss | SquaredLoss | SpanLoss
NOWHERE = -1e9  # the logit of padding: its probability is 0, and 0 times it is a number
PROBES = 200  # texts on which two tokenizers are compared


class Said(NamedTuple):
    """What a model makes of a batch."""

    logits: Tensor  # (B, L), (B, T, L), or (N, V) where only scored tokens are projected
    states: list[Tensor]  # (B, T, D) after each of its layers; the last one as the head reads it


class DistillationLoss:
    """The three terms, each summed over what `task` counts; `pairs` are (layer of the student, of the teacher).

    Of padding and of tokens that are not scored nothing is learned. The hidden term of a row that has one answer is the
    mean over its tokens, and all pairs of layers weigh alike. Where the widths differ, the student has a matrix for
    each pair in `match` (add_match), which is trained with it.
    """

    def __init__(
        self,
        teacher: Model,
        task: TaskLoss,
        *,
        pairs: Sequence[tuple[int, int]],
        temperature: float = 2.0,
        alpha: float = 0.5,
        hidden_weight: float = 1.0,
        hidden: Hidden = "cosine",
    ) -> None:
        self.teacher, self.task, self.pairs = teacher.eval().requires_grad_(False), task, list(pairs)
        self.temperature, self.alpha, self.hidden_weight, self.hidden = temperature, alpha, hidden_weight, hidden
        self.unit = task.unit

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the sum over the batch."""
        student = say(model, batch, scored_only=isinstance(self.task, CausalLoss))
        with torch.no_grad():
            teacher = say(self.teacher, batch, scored_only=isinstance(self.task, CausalLoss))
        loss = torch.zeros((), device=student.logits.device)
        if self.alpha > 0:
            loss = loss + self.alpha * self.soft(student.logits, teacher.logits, batch)
        if self.alpha < 1:
            loss = loss + (1 - self.alpha) * self.hard(student.logits, batch)
        if self.hidden_weight > 0:
            loss = loss + self.hidden_weight * self.states(model, student.states, teacher.states, batch)
        return loss

    def count(self, batch: Batch) -> int:
        """Return what the task's own loss counts."""
        return self.task.count(batch)

    def hard(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed loss of the data's own labels."""
        if isinstance(self.task, CausalLoss):
            labels = batch["labels"].flatten()
            return F.cross_entropy(logits, labels[labels != IGNORED], reduction="sum")
        return self.task.of(logits, batch)

    def soft(self, student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed distance to what the teacher says."""
        t = self.temperature
        if isinstance(self.task, SquaredLoss):
            return F.mse_loss(student, teacher, reduction="sum")
        if isinstance(self.task, BinaryLoss):
            return t**2 * F.binary_cross_entropy_with_logits(student / t, (teacher / t).sigmoid(), reduction="sum")
        if isinstance(self.task, SpanLoss):  # softmax over the tokens, of the first and of the last one of a span
            student, teacher = (
                places(logits, batch.get("attention_mask")) for logits in (student, teacher)
            )  # (B·2, T)
            return divergence(student, teacher, t) / 2
        if isinstance(self.task, ClassLoss):
            scored = batch["labels"].flatten() != IGNORED
            student, teacher = (logits.flatten(0, -2)[scored] for logits in (student, teacher))  # (N, L)
        return divergence(student, teacher, t)

    def states(
        self, model: nn.Module, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the summed distance of the states, the mean over the pairs of layers."""
        weights, match = self.weigh(batch, student[0]), getattr(model, MATCH, None)  # (B, T)
        total = torch.zeros((), device=weights.device)
        for number, (ours, theirs) in enumerate(self.pairs):
            x = (student[ours] if match is None else match[number](student[ours])).float()  # (B, T, E)
            y = teacher[theirs].float()  # (B, T, E)
            each = (x - y).square().mean(-1) if self.hidden == "mse" else 1 - F.cosine_similarity(x, y, dim=-1)
            total = total + (each * weights).sum()
        return total / len(self.pairs)

    def weigh(self, batch: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Return how much each token (B, T) counts: 1 where tokens are scored, else its share of its row's terms."""
        if isinstance(self.task, CausalLoss | ClassLoss) and batch["labels"].ndim == 2:
            return (batch["labels"] != IGNORED).float()
        mask = batch.get("attention_mask")
        real = torch.ones(like.shape[:2], device=like.device) if mask is None else mask.float()
        terms = batch["labels"].shape[1] if isinstance(self.task, BinaryLoss) else 1
        return terms * real / real.sum(1, keepdim=True)


def say(model: nn.Module, batch: Mapping[str, Tensor], *, scored_only: bool) -> Said:
    """Run a model on a batch; with `scored_only` the head sees no more than the tokens that have a label."""
    network: Any = model
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: states.append(output))
        for layer in network.transformer.layers
    ]
    try:
        mask, types = batch.get("attention_mask"), batch.get("token_type_ids")
        last = network.hidden_states(batch["input_ids"], mask, token_type_ids=types)  # (B, T, D)
    finally:
        for hook in hooks:
            hook.remove()
    states[-1] = last
    if scored_only:
        logits = network.head(last[batch["labels"] != IGNORED])  # (N, V)
    else:
        logits = network.head(last, mask)
    return Said(logits.float(), states)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² · the summed KL(teacher || student) of rows of logits (N, L)."""
    q, p = (F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))  # (N, L)
    return temperature**2 * F.kl_div(q, p, reduction="sum", log_target=True)


def places(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return logits (B, T, 2) as rows over the tokens (B · 2, T), where padding cannot be chosen."""
    if mask is not None:
        logits = logits.masked_fill(mask[:, :, None] == 0, NOWHERE)
    return logits.transpose(1, 2).flatten(0, 1)


# --------------------------------------------------------------------------------------------------- teacher, student

MATCH = "match"


@dataclass(frozen=True)
class Teacher:
    """The model that is learned from."""

    model: Model
    files: Path  # the folder that has its tokenizer
    base: Path  # the folder that has its other files
    copies: bool  # whether its layers can be a student's
    sha256: str  # of its weights


def open_teacher(folder: Path, task: str, *, code: Sequence[str] = ()) -> Teacher:
    """Read a model folder, or a PEFT adapter and its base, that answers this task; LoRA is merged into its base.

    Raises InputError where it has no head for the task.
    """
    config, copies, base, files = read_config(folder), True, folder, folder
    if (folder / ADAPTER_CONFIG).is_file():
        opened = open_adapter(folder)
        model, base, files = opened.model, opened.base, opened.tokenizer or folder
        copies = read_settings(folder).method == "lora"
        if copies:
            merge_lora(model)
        model.config = replace(model.config, problem_type=config.problem_type)
        kind = model.kind
    else:
        kind = read_kind(config)
    if kind != TASKS[task]:
        raise InputError(
            f"the teacher has no head for {task}", where=str(folder), found=kind, expected=TASKS[task],
            fix=f"lmworks finetune it with --task {task} first, or name the task that it has",
        )  # fmt: skip
    if not (folder / ADAPTER_CONFIG).is_file():
        model = load_model(folder, kind, code=code)
        copies = not model.parts
    model = model.eval().requires_grad_(False)
    return Teacher(model, files, base, copies, hash_weights(model))


def hash_weights(model: nn.Module) -> str:
    """Return a SHA-256 of all weights, by their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def spread_layers(count: int, of: int) -> list[int]:
    """Return `count` layers out of `of`, evenly spaced, the first and the last among them.

    12 -> 6 are the layers 0 2 4 7 9 11 that DistilBERT was begun with; 6 -> 3 are 0 2 5.
    """
    return [0] if count == 1 else [round(i * (of - 1) / (count - 1)) for i in range(count)]


def choose_layers(teacher: Model, layers: int, keep: Sequence[int] = ()) -> list[int]:
    """Return the teacher's layers that a student begins with; raise InputError for those that it lacks."""
    of = teacher.config.num_hidden_layers
    if not keep:
        if not 1 <= layers <= of:
            raise InputError("the teacher has fewer layers", found=f"--layers {layers}", expected=f"1 to {of}")
        return spread_layers(layers, of)
    if any(not 0 <= layer < of for layer in keep) or list(keep) != sorted(set(keep)):
        raise InputError(
            "the teacher has no such layers", found=f"--keep-layers {','.join(map(str, keep))}",
            expected=f"different numbers from 0 to {of - 1}, the lowest first",
        )  # fmt: skip
    return list(keep)


def cut_layers(teacher: Model, kept: Sequence[int]) -> Model:
    """Return a model of its own with the embeddings, some of the layers, and the head of another."""
    c = teacher.config
    if c.layer_groups is not None:
        raise InputError("this model's layers share their weights: none of them can be left out", found=c.model_type,
                         fix="name a smaller student, such as one of another depth")  # fmt: skip
    if not c.first_norm and kept[0] != 0:
        raise InputError("this model's first layer differs from the others, so a student must begin with it too",
                         found=f"layer {kept[0]}", expected="layer 0 first")  # fmt: skip
    local = tuple(ours for ours, theirs in enumerate(kept) if theirs in c.local_layers)
    student = make_empty(replace(c, num_hidden_layers=len(kept), local_layers=local), teacher.kind)
    if student.spec != teacher.spec:  # a head that is optional and that this teacher lacks
        student.spec, student.head = teacher.spec, Head(c, teacher.spec)
    state = teacher.state_dict()
    prefix = "transformer.layers."
    for name, _ in list(student.named_parameters(remove_duplicate=False)):
        source = name
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            source = f"{prefix}{kept[int(number)]}.{rest}"
        module, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(module), leaf, nn.Parameter(state[source].detach().clone()))
    student.tie()
    return student.eval()


def open_student(folder: Path, teacher: Teacher, task: str, problem: str | None, *, seed: int) -> tuple[Model, bool]:
    """Read another checkpoint that is to learn from this teacher; say whether its head is new.

    Raises InputError where its labels, or its vocabulary, are not the teacher's.
    """
    labels = teacher.model.config.labels if task.endswith("classification") else ()
    model, new_head = open_model(folder, task, labels, problem, seed=seed)
    if labels and model.config.labels != labels:
        raise InputError("student and teacher have different labels", where=str(folder),
                         found=", ".join(model.config.labels), expected=", ".join(labels),
                         fix="choose a student without a head, or with these labels in this order")  # fmt: skip
    ours, theirs = model.config.vocab_size, teacher.model.config.vocab_size
    if task in WORDS and ours != theirs:
        raise InputError("student and teacher choose among different numbers of tokens", where=str(folder),
                         found=f"{ours} tokens", expected=f"{theirs} tokens, as the teacher")  # fmt: skip
    return model, new_head


def check_tokenizers(student: Path, teacher: Path, texts: Sequence[str]) -> None:
    """Raise InputError where two folders cut text into other tokens: states and words could not be compared."""
    ours, theirs = Tokenizer.from_pretrained(student), Tokenizer.from_pretrained(teacher)
    differs = ours.backend.get_vocab() != theirs.backend.get_vocab()
    text = next((text for text in texts[:PROBES] if differs or ours.encode(text) != theirs.encode(text)), "")
    if differs or text:
        raise InputError(
            "student and teacher have different tokenizers", where=str(student),
            found=f"{ours.vocab_size} tokens" + (f"; {text[:40]!r} is cut otherwise" if text else ""),
            expected=f"the tokenizer of {teacher} ({theirs.vocab_size} tokens)",
            fix="choose a student of the teacher's family, or --layers, which takes the teacher's own",
        )  # fmt: skip


def add_match(student: Model, width: int, count: int, *, seed: int) -> None:
    """Give the student a matrix to the teacher's width for each pair of layers; `drop_match` takes them away."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        maps = [nn.Linear(student.config.hidden_size, width, bias=False) for _ in range(count)]
    student.add_module(MATCH, nn.ModuleList(maps))


def drop_match(student: Model) -> None:
    """Take away what was only there to compare with the teacher."""
    if hasattr(student, MATCH):
        delattr(student, MATCH)
