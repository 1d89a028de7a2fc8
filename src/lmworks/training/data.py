"""Batches from a token stream: each one is a pure function of (seed, step), so the step is the whole data cursor.

A window is `context + 1` tokens: all but the last are read, all but the first are predicted.
Shapes: B batch, T context, N tokens of a stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.base.types import Batch, Ints
from lmworks.evaluation.perplexity import windows

IGNORED = -100  # the label of a token that is not scored
LEAST_CONTEXT = 8  # tokens of the shortest window that the settings allow


class DataSource(Protocol):
    """Where a trainer's batches come from."""

    def batch(self, step: int) -> Batch:
        """Return the batch of this step; the same step always gives the same batch."""

    def validation(self, tokens: int | None = None) -> Iterator[Batch]:
        """Yield the held-out batches, or an even selection of about `tokens` scored tokens of them."""

    def fingerprint(self) -> str:
        """Return a hash of everything that decides the batches: a resumed run must find the same."""


class TokenWindows:
    """Random windows of a training stream, and strided windows over every token of a held-out one.

    `labels[b, t]` is the token that follows `input_ids[b, t]`, or -100 where it is not scored.
    Raises InputError where the training stream is shorter than one window.
    """

    def __init__(
        self, train: Ints, held_out: Ints | None = None, *, context: int, batch_size: int, seed: int = 0
    ) -> None:
        if len(train) < context + 1:
            raise InputError(
                "the training text is shorter than one window",
                found=f"{len(train)} tokens",
                expected=f"at least {context + 1}: the context of {context} and the token after it",
                fix=advise(len(train), least=LEAST_CONTEXT + 1),
            )
        if held_out is not None and len(held_out) < 2:
            raise InputError(
                "the validation text is too short to score",
                found=f"{len(held_out)} tokens",
                expected="at least 2",
                fix="give more text, or hold out a larger part of it with --validation",
            )
        self.train, self.held_out = train, held_out
        self.context, self.batch_size, self.seed = context, batch_size, seed

    def batch(self, step: int) -> Batch:
        """Return `batch_size` windows that begin anywhere: input_ids and labels (B, T) int64."""
        starts = draw(self.seed, step, self.batch_size) % np.uint64(len(self.train) - self.context)  # (B,)
        rows = self.train[starts[:, None] + np.arange(self.context + 1, dtype=np.uint64)]  # (B, T + 1)
        rows = rows.astype(np.int64)
        return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}

    def validation(self, tokens: int | None = None) -> Iterator[Batch]:
        """Yield the windows in which perplexity is defined, every half context, so that each token is scored once."""
        if self.held_out is None:
            return
        count = len(self.held_out) - 1
        skip = 1 if tokens is None else max(1, count // tokens)
        for starts, length, scored in windows(count, self.context, max(1, self.context // 2), self.batch_size * skip):
            rows = self.held_out[starts[::skip, None] + np.arange(length + 1)].astype(np.int64)  # (B, T + 1)
            labels = np.where(np.arange(length) >= length - scored, rows[:, 1:], IGNORED)  # (B, T)
            yield {"input_ids": rows[:, :-1], "labels": labels}

    def fingerprint(self) -> str:
        """Return a SHA-256 of both streams and the shape of a batch."""
        digest = hashlib.sha256(f"{self.context} {self.batch_size} {self.seed}".encode())
        for stream in (self.train, self.held_out):
            if stream is not None:
                digest.update(np.ascontiguousarray(stream).data)
        return digest.hexdigest()


def advise(count: int, *, least: int) -> str:
    """Return what to do where so many tokens are fewer than a window: a shorter one, if `least` tokens fill it."""
    return f"give more text, or --context {max(LEAST_CONTEXT, count // 4)}" if count >= least else "give more text"


def draw(seed: int, step: int, count: int, *, stream: int = 0) -> NDArray[np.uint64]:
    """Return `count` random 64-bit numbers that depend on nothing but the arguments (Philox, Salmon et al. 2011)."""
    key = np.array([seed, step], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], dtype=np.uint64)).random_raw(count)


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """Yield a batch in up to `parts` parts along its rows, of nearly equal size."""
    rows = len(next(iter(batch.values())))
    for index in np.array_split(np.arange(rows), min(parts, rows)):
        yield {name: array[index] for name, array in batch.items()}
