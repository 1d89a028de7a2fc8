"""Batches of labelled features: each one is a pure function of (seed, step), so the step is the whole data cursor.

Features are encoded once, by the task that will answer later. An epoch visits every row once in an order that follows
from (seed, epoch); within a stretch of POOLED batches rows of like length share a batch, so that there is little
padding, and the batches come in random order again. Rows may come by difficulty, mixed with those of other domains, or
packed: several end to end.

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
from lmworks.training.curriculum import order_by
from lmworks.training.data import IGNORED, draw
from lmworks.training.mixture import DomainRows, mix, rank_within
from lmworks.training.packing import DOCUMENTS, first_fit, join_words

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
    rows of validation. `packing` is the length of rows into which several are packed; there are then `batch_size` of
    these in a batch. `domains` are mixed into each batch. Raises InputError where there are no rows.
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
        packing: int | None = None,
        domains: Sequence[DomainRows] = (),
    ) -> None:
        if not rows:
            raise InputError("there is nothing to train on", fix="check the file, and the columns that were read")
        self.main, self.held_out, self.seed, self.pad_id = rows, held_out, seed, pad_id
        self.rows = [*rows, *(row for domain in domains for row in domain.rows)]
        self.masking, self.task, self.packing, self.domains = masking, task, packing, domains
        self.epochs, self.batch_size, self.batch_tokens, self.sampling = epochs, batch_size, batch_tokens, sampling
        self.settings = f"{epochs} {batch_size} {batch_tokens} {seed} {pad_id}"
        self.lengths = np.array([len(row.feature) for row in self.rows])
        self.plan = self.make_plan()
        self.held_plan = self.plan_held(held_out)

    @property
    def steps(self) -> int:
        """How many batches all epochs have."""
        return len(self.plan)

    def make_plan(self, difficulty: NDArray[Any] | None = None) -> list[NDArray[np.int64]]:
        """Return the rows of each batch of all epochs; with `difficulty` (n,) the first epoch begins with easy ones."""
        sizes, weights = [len(domain.rows) for domain in self.domains], [domain.weight for domain in self.domains]
        plan = []
        for epoch in range(self.epochs):
            easy_first = difficulty is not None and epoch == 0
            if difficulty is not None and easy_first:
                order = order_by(difficulty, seed=self.seed)
            else:
                order = order_rows(len(self.main), seed=self.seed, epoch=epoch, sampling=self.sampling)
            order, domains = mix(order, sizes, weights, seed=self.seed, epoch=epoch)
            if self.packing is not None:
                batches = pack_batches(order, self.lengths, self.packing, self.batch_size)
            else:
                pooled = 1 if easy_first else POOLED
                batches = cut_batches(order, domains, self.lengths, self.batch_size, self.batch_tokens, pooled=pooled)
            if not easy_first:
                shuffled = np.argsort(draw(self.seed, epoch, len(batches), stream=BATCHES), kind="stable")
                batches = [batches[i] for i in shuffled]
            plan += batches
        return plan

    def plan_for(self, steps: int) -> None:
        """Plan so many batches, of as many epochs as it takes."""
        while self.steps < steps:
            self.epochs = max(self.epochs + 1, self.epochs * steps // self.steps)
            self.plan = self.make_plan()
        self.plan = self.plan[:steps]

    def sort_by(self, difficulty: NDArray[Any]) -> None:
        """Begin with easy rows: difficulty (n,) of the main rows."""
        self.plan = self.make_plan(difficulty)

    def plan_held(self, rows: Sequence[Row]) -> list[NDArray[np.int64]]:
        """Return the batches of held-out rows, the longest first."""
        lengths = np.array([len(row.feature) for row in rows], np.int64)
        order = np.argsort(-lengths, kind="stable")
        if self.packing is not None:
            return pack_batches(order, lengths, self.packing, self.batch_size)
        return list(cut(order, lengths, self.batch_size, self.batch_tokens))

    def places(self, rows: NDArray[np.int64]) -> int:
        """Return how many tokens are computed for these rows, padding included: packed rows need none."""
        lengths = self.lengths[rows]
        return int(lengths.sum() if self.packing else len(lengths) * lengths.max())

    def batch(self, step: int) -> Batch:
        """Return the inputs and targets of this step's rows."""
        return self.collate([self.rows[i] for i in self.plan[step % len(self.plan)]], step, MASKS)

    def validation(self, tokens: int | None = None) -> Iterator[Batch]:
        """Yield all held-out rows, the longest first; or an even selection with about `tokens` tokens."""
        total = sum(len(row.feature) for row in self.held_out)
        skip = 1 if tokens is None else max(1, total // max(1, tokens))
        for number in range(0, len(self.held_plan), skip):
            yield self.collate([self.held_out[i] for i in self.held_plan[number]], number, HELD_MASKS)

    def held_out_of(self, domain: DomainRows) -> Iterator[Batch]:
        """Yield all held-out rows of another domain, the longest first."""
        for number, places in enumerate(self.plan_held(domain.held_out)):
            yield self.collate([domain.held_out[i] for i in places], number, HELD_MASKS)

    def fingerprint(self) -> str:
        """Return a SHA-256 of every row and of the settings that decide the batches."""
        digest = hashlib.sha256(f"{self.settings} {self.masking!r} {self.packing}".encode())
        for batch in self.plan:
            digest.update(batch.astype(np.int64).tobytes())
        held_out = [row for domain in self.domains for row in domain.held_out]
        for row in (*self.rows, *self.held_out, *held_out):
            inputs = row.example if row.example is not None else row.feature.inputs
            digest.update(repr((inputs, {name: plain(value) for name, value in row.targets.items()})).encode())
        return digest.hexdigest()

    def collate(self, rows: Sequence[Row], number: int, stream: int) -> Batch:
        """Return rows as a batch: packed where they are to be, tokens hidden by the random stream of this number."""
        if rows[0].example is not None and self.task is not None:
            rows = [Row(self.task.encode([row.example])[0], row.targets) for row in rows]
        if self.packing is None:
            batch = collate_rows(rows, pad_id=self.pad_id)
        else:  # the rows of a batch fall into the same places as they did when all were packed
            lengths = np.array([len(row.feature) for row in rows])
            packed = [join_rows([rows[i] for i in places]) for places in first_fit(lengths, self.packing)]
            batch = collate_rows(packed, pad_id=self.pad_id)
            batch.pop("attention_mask", None)
        return batch if self.masking is None else self.masking(batch, seed=self.seed, number=number, stream=stream)


def join_rows(rows: Sequence[Row]) -> Row:
    """Put rows whose targets are one number a token end to end, with the number of its document for each token."""
    inputs = {name: [i for row in rows for i in row.feature.inputs[name]] for name in rows[0].feature.inputs}
    targets = {name: [i for row in rows for i in row.targets[name]] for name in rows[0].targets}
    if "words" in targets:
        targets["words"] = join_words([row.targets["words"] for row in rows])
    targets[DOCUMENTS] = [number + 1 for number, row in enumerate(rows) for _ in range(len(row.feature))]
    return Row(Feature(inputs, rows[0].feature.example), targets)


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


def order_rows(count: int, *, seed: int, epoch: int, sampling: NDArray[Any] | None = None) -> NDArray[np.int64]:
    """Return the rows of an epoch in random order: every row once, or drawn with these weights."""
    numbers = draw(seed, epoch, count, stream=ORDER)  # (n,)
    if sampling is None:
        return np.argsort(numbers, kind="stable")
    edges = np.cumsum(np.asarray(sampling, np.float64))
    drawn: NDArray[np.int64] = np.searchsorted(edges, unit(numbers) * edges[-1], side="right").clip(max=count - 1)
    return drawn


def cut_batches(
    order: NDArray[np.int64],
    domains: NDArray[np.int64],
    lengths: NDArray[Any],
    batch_size: int,
    batch_tokens: int | None,
    *,
    pooled: int,
) -> list[NDArray[np.int64]]:
    """Cut an order (N,) into batches of rows of like length; each keeps its share of every domain (N,)."""
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), pooled * batch_size):
        part, mixed = (whole[start : start + pooled * batch_size] for whole in (order, domains))
        longest_first = np.argsort(rank_within(lengths[part], mixed), kind="stable")
        batches += cut(part[longest_first], lengths, batch_size, batch_tokens)
    return batches


def pack_batches(
    order: NDArray[np.int64], lengths: NDArray[Any], capacity: int, batch_size: int
) -> list[NDArray[np.int64]]:
    """Pack an order into rows of `capacity` tokens; return what lies in each batch, one packed row after the other."""
    stretches = np.cumsum(lengths[order]) // (POOLED * batch_size * capacity)
    batches: list[NDArray[np.int64]] = []
    for part in np.split(order, np.flatnonzero(np.diff(stretches)) + 1):
        bins = first_fit(lengths[part], capacity)
        for start in range(0, len(bins), batch_size):
            batches.append(part[np.concatenate(bins[start : start + batch_size])])
    return batches


def cut(
    rows: NDArray[np.int64], lengths: NDArray[Any], batch_size: int, batch_tokens: int | None
) -> Iterator[NDArray[np.int64]]:
    """Cut rows into batches; a row longer than `batch_tokens` is a batch of its own."""
    while len(rows):
        size = batch_size
        if batch_tokens is not None:
            widest = np.maximum.accumulate(lengths[rows[:size]])
            fits = widest * np.arange(1, len(widest) + 1) <= batch_tokens
            size = max(1, int(fits.argmin()) if not fits.all() else size)
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
