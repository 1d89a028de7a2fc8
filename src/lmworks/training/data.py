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

IGNORED = -100  # the label of a token that is not scored


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
                fix=f"give more text, or --context {max(1, len(train) // 4)}",
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
        windows = self.train[starts[:, None] + np.arange(self.context + 1, dtype=np.uint64)]  # (B, T + 1)
        windows = windows.astype(np.int64)
        return {"input_ids": windows[:, :-1], "labels": windows[:, 1:]}

    def validation(self, tokens: int | None = None) -> Iterator[Batch]:
        """Yield strided windows of the held-out stream: input_ids and labels (B, T) int64."""
        if self.held_out is None:
            return
        windows = strided_windows(len(self.held_out), self.context)
        if tokens is not None:
            wanted = max(1, tokens * 2 // self.context)  # a window scores half of its context
            windows = windows[:: max(1, round(len(windows) / wanted))]
        length = windows[0][1] - windows[0][0]
        for i in range(0, len(windows), self.batch_size):
            group = windows[i : i + self.batch_size]
            rows = np.stack([self.held_out[start : end + 1] for start, end, _ in group]).astype(np.int64)  # (B, T + 1)
            fresh = np.array([new for _, _, new in group])[:, None]  # (B, 1)
            labels = np.where(np.arange(length) >= length - fresh, rows[:, 1:], IGNORED)  # (B, T)
            yield {"input_ids": rows[:, :-1], "labels": labels}

    def fingerprint(self) -> str:
        """Return a SHA-256 of both streams and the shape of a batch."""
        digest = hashlib.sha256(f"{self.context} {self.batch_size} {self.seed}".encode())
        for stream in (self.train, self.held_out):
            if stream is not None:
                digest.update(np.ascontiguousarray(stream).data)
        return digest.hexdigest()


def draw(seed: int, step: int, count: int, *, stream: int = 0) -> NDArray[np.uint64]:
    """Return `count` random 64-bit numbers that depend on nothing but the arguments (Philox, Salmon et al. 2011)."""
    key = np.array([seed, step], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], dtype=np.uint64)).random_raw(count)


def strided_windows(tokens: int, context: int) -> list[tuple[int, int, int]]:
    """Return (start, end, new) for windows that score every token of a stream once, except its first.

    A window reads tokens start … end-1 and predicts start+1 … end; only its last `new` predictions count. Each starts
    half a context after the one before, so that a scored token sees at least half a context (but for the first window),
    and the last is moved back so that all have the same length: 9 tokens, context 4 -> (0, 4, 4) (2, 6, 2) (4, 8, 2).
    """
    last = tokens - 1
    length = min(context, last)
    stride = max(1, context // 2)
    windows = [(0, length, length)]
    while windows[-1][1] < last:
        end = min(windows[-1][1] + stride, last)
        windows.append((end - length, end, end - windows[-1][1]))
    return windows
