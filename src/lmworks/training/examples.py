"""Batches of labelled features: each one is a pure function of (seed, step), so the step is the whole data cursor.

Features are encoded once, by the task that will answer later. An epoch visits every row once in an order that follows
from (seed, epoch); within a stretch of POOLED batches rows of like length share a batch, so that there is little
padding, and the batches come in random order again.

Shapes: B rows of a batch, T tokens of its longest row, n rows in all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.base.types import Batch
from lmworks.tasks.base import Feature, Task, collate
from lmworks.training.data import IGNORED, draw

POOLED = 32  # batches within which rows are sorted by length
ORDER, BATCHES, MASKS, HELD_MASKS = (2**32 + i for i in range(4))  # random streams, apart from those of dropout
MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens become the mask, or another token; the rest stay (BERT)


@dataclass
class Row:
    """One input and what the model should say: a number, a vector, or (as a list) one number a token."""

    feature: Feature
    targets: dict[str, Any]
    example: Any = None  # what is encoded anew for each batch, where features are too large to keep: pictures


class Examples:
    """Batches of rows for a number of epochs, at most `batch_size` rows and `batch_tokens` tokens, padding included.

    `sampling` (n,) are weights with which rows are drawn, with replacement, instead of once each. `held_out` are the
    rows of validation. Raises InputError where there are no rows.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        held_out: Sequence[Row] = (),
        *,
        epochs: int,
        batch_size: int,
        batch_tokens: int | None = None,
        pad_id: int = 0,
        seed: int = 0,
        sampling: NDArray[Any] | None = None,
        masking: Masking | None = None,
        task: Task | None = None,
    ) -> None:
        if not rows:
            raise InputError("there is nothing to train on", fix="check the file, and the columns that were read")
        self.rows, self.held_out, self.seed, self.pad_id = rows, held_out, seed, pad_id
        self.masking, self.task = masking, task
        self.settings = f"{epochs} {batch_size} {batch_tokens} {seed} {pad_id}"
        lengths = np.array([len(row.feature) for row in rows])
        self.plan = [
            batch
            for epoch in range(epochs)
            for batch in plan_epoch(
                lengths, seed=seed, epoch=epoch, batch_size=batch_size, batch_tokens=batch_tokens, sampling=sampling
            )
        ]
        held = np.array([len(row.feature) for row in held_out], np.int64)
        self.held_plan = list(cut(np.argsort(-held, kind="stable"), held, batch_size, batch_tokens))

    @property
    def steps(self) -> int:
        """How many batches all epochs have."""
        return len(self.plan)

    def batch(self, step: int) -> Batch:
        """Return the inputs and targets of this step's rows."""
        return self._collate([self.rows[i] for i in self.plan[step % len(self.plan)]], step, MASKS)

    def validation(self, tokens: int | None = None) -> Iterator[Batch]:
        """Yield all held-out rows, the longest first; or an even selection with about `tokens` tokens."""
        total = sum(len(row.feature) for row in self.held_out)
        skip = 1 if tokens is None else max(1, total // max(1, tokens))
        for number in range(0, len(self.held_plan), skip):
            yield self._collate([self.held_out[i] for i in self.held_plan[number]], number, HELD_MASKS)

    def fingerprint(self) -> str:
        """Return a SHA-256 of every row and of the settings that decide the batches."""
        digest = hashlib.sha256(f"{self.settings} {self.masking!r}".encode())
        for batch in self.plan:
            digest.update(batch.astype(np.int64).tobytes())
        for row in (*self.rows, *self.held_out):
            inputs = row.example if row.example is not None else row.feature.inputs
            digest.update(repr((inputs, {name: plain(value) for name, value in row.targets.items()})).encode())
        return digest.hexdigest()

    def _collate(self, rows: list[Row], number: int, stream: int) -> Batch:
        if rows[0].example is not None and self.task is not None:
            rows = [Row(self.task.encode([row.example])[0], row.targets) for row in rows]
        batch = collate_rows(rows, pad_id=self.pad_id)
        return batch if self.masking is None else self.masking(batch, seed=self.seed, number=number, stream=stream)


def collate_rows(rows: Sequence[Row], *, pad_id: int = 0) -> Batch:
    """Pad rows to the longest, on the right; a target of one number a token with -100.

    A mask that hides nothing is left out: attention is faster without.
    """
    batch = collate([row.feature for row in rows], pad_id=pad_id)
    if "attention_mask" in batch and batch["attention_mask"].all():
        del batch["attention_mask"]
    for name, first in rows[0].targets.items():
        values = [row.targets[name] for row in rows]
        if isinstance(first, list):
            padded = np.full(batch["input_ids"].shape, IGNORED, np.int64)  # (B, T)
            for place, value in enumerate(values):
                padded[place, : len(value)] = value
            batch[name] = padded
        else:
            batch[name] = np.asarray(values, np.int64 if isinstance(first, int) else np.float32)
    return batch


def plan_epoch(
    lengths: NDArray[Any],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    batch_tokens: int | None = None,
    sampling: NDArray[Any] | None = None,
) -> list[NDArray[np.int64]]:
    """Return the rows of each batch of an epoch; nothing but the arguments decides them."""
    numbers = draw(seed, epoch, len(lengths), stream=ORDER)  # (n,)
    if sampling is None:
        order = np.argsort(numbers, kind="stable")
    else:
        edges = np.cumsum(np.asarray(sampling, np.float64))
        order = np.searchsorted(edges, unit(numbers) * edges[-1], side="right").clip(max=len(lengths) - 1)
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), POOLED * batch_size):
        part = order[start : start + POOLED * batch_size]
        batches += cut(part[np.argsort(-lengths[part], kind="stable")], lengths, batch_size, batch_tokens)
    shuffled = np.argsort(draw(seed, epoch, len(batches), stream=BATCHES), kind="stable")
    return [batches[i] for i in shuffled]


def cut(
    rows: NDArray[np.int64], lengths: NDArray[Any], batch_size: int, batch_tokens: int | None
) -> Iterator[NDArray[np.int64]]:
    """Cut rows, the longest first, into batches; a row longer than `batch_tokens` is a batch of its own."""
    while len(rows):
        size = batch_size
        if batch_tokens is not None:
            size = min(size, max(1, batch_tokens // int(lengths[rows[0]])))
        yield rows[:size]
        rows = rows[size:]


def balance(classes: Sequence[int]) -> NDArray[np.float64]:
    """Return a weight for each row, so that all classes weigh alike; their mean is 1: n / (classes · rows of its)."""
    counts = np.bincount(classes)
    weights: NDArray[np.float64] = len(classes) / ((counts > 0).sum() * counts[np.asarray(classes)])
    return weights


@dataclass(frozen=True)
class Masking:
    """Hide tokens to be guessed (Devlin et al. 2019): `share` of them, or of the words where `whole_words` is set.

    Of the chosen tokens 80 % become the mask, 10 % a random token, 10 % stay. Needs `words` (B, T) in the batch: the
    word that each token belongs to, negative where there is nothing to guess.
    """

    mask_id: int
    vocab_size: int
    share: float = 0.15
    whole_words: bool = False

    def __call__(self, batch: Mapping[str, NDArray[Any]], *, seed: int, number: int, stream: int) -> Batch:
        """Return the batch with input_ids that hide tokens, and labels that are -100 but for those."""
        words, ids = batch["words"], batch["input_ids"]
        random = unit(draw(seed, number, 3 * ids.size, stream=stream)).reshape(3, *ids.shape)
        chance = random[0]
        if self.whole_words:  # every token of a word takes the number of the word's first
            first = np.maximum.accumulate(np.where(is_new(words), np.arange(ids.shape[1]), 0), axis=1)
            chance = np.take_along_axis(chance, first, 1)
        chosen = (chance < self.share) & (words >= 0)
        if not chosen.any():  # a loss over nothing has no value
            chosen.flat[np.argmin(np.where(words >= 0, chance, np.inf))] = True
        other = (random[2] * self.vocab_size).astype(ids.dtype)
        hidden = np.where(random[1] < MASKED, self.mask_id, np.where(random[1] < MASKED + REPLACED, other, ids))
        rest = {name: array for name, array in batch.items() if name != "words"}
        return {**rest, "input_ids": np.where(chosen, hidden, ids), "labels": np.where(chosen, ids, IGNORED)}


def unit(numbers: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Turn random 64-bit numbers into numbers from 0 up to, and without, 1."""
    return (numbers >> np.uint64(11)) / 2.0**53


def is_new(words: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell of each token (B, T) whether a word begins with it."""
    new: NDArray[np.bool_] = np.diff(words, axis=1, prepend=-IGNORED) != 0
    return new


def plain(value: Any) -> Any:
    """Return a target as something whose text says all of it."""
    return value.tolist() if isinstance(value, np.ndarray) else value
