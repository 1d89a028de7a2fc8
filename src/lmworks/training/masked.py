"""Batches for masked language models: random windows of a token stream with tokens, or words, hidden.

A window is `[CLS] tokens [SEP]`, `context` in all; texts within it are divided by their end tokens (the FULL-SENTENCES
of Liu et al. 2019). What is hidden changes every time a text comes by, and stays the same in validation.

Shapes: B batch, T context, N tokens of a stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from lmworks.base.errors import InputError
from lmworks.base.types import Batch, Ints
from lmworks.training.data import LEAST_CONTEXT, advise, draw
from lmworks.training.examples import HELD_MASKS, MASKS, Masking

Stream = tuple[Ints, Ints]  # tokens (N,), and the word that each belongs to, -1 for what is never hidden


class MaskedWindows:
    """Random windows of a training stream, and all windows of a held-out one, with hidden tokens as `labels`.

    `frame` are the ids of [CLS] and [SEP]. Raises InputError where the training stream is shorter than one window.
    """

    def __init__(
        self, train: Stream, held_out: Stream | None = None, *, frame: tuple[int, int], mask_id: int, vocab_size: int,
        context: int, batch_size: int, whole_words: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        self.room = context - len(frame)
        if len(train[0]) < self.room:
            raise InputError("the training text is shorter than one window", found=f"{len(train[0])} tokens",
                             expected=f"at least {self.room}",
                             fix=advise(len(train[0]), least=LEAST_CONTEXT - len(frame)))  # fmt: skip
        self.train, self.held_out, self.frame = train, held_out, frame
        self.context, self.batch_size, self.seed = context, batch_size, seed
        self.masking = Masking(mask_id, vocab_size, whole_words=whole_words)

    def batch(self, step: int) -> Batch:
        """Return `batch_size` windows that begin anywhere: input_ids and labels (B, T) int64, -100 where none is."""
        starts = draw(self.seed, step, self.batch_size) % np.uint64(len(self.train[0]) - self.room + 1)  # (B,)
        return self.hide(self.train, starts.astype(np.int64)[:, None] + np.arange(self.room), step, MASKS)

    def validation(self, tokens: int | None = None) -> Iterator[Batch]:
        """Yield the held-out windows, without overlap; or an even selection with about `tokens` scored tokens."""
        if self.held_out is None:
            return
        count = len(self.held_out[0])
        starts = np.arange(0, max(1, count - self.room + 1), self.room)
        skip = 1 if tokens is None else max(1, round(count * self.masking.share / max(1, tokens)))
        starts, room = starts[::skip], min(self.room, count)
        for number, first in enumerate(range(0, len(starts), self.batch_size)):
            places = starts[first : first + self.batch_size, None] + np.arange(room)
            yield self.hide(self.held_out, places, number, HELD_MASKS)

    def hide(self, stream: Stream, places: Ints, number: int, kind: int) -> Batch:
        """Return the windows at these places (B, T - 2), framed, with tokens hidden."""
        ids, words = (np.asarray(one)[places].astype(np.int64) for one in stream)
        begin, end = (np.full((len(ids), 1), token) for token in self.frame)
        none = np.full((len(ids), 1), -1)
        batch = {"input_ids": np.hstack([begin, ids, end]), "words": np.hstack([none, words, none])}
        return self.masking(batch, seed=self.seed, number=number, stream=kind)

    def fingerprint(self) -> str:
        """Return a SHA-256 of both streams and of what decides the batches."""
        digest = hashlib.sha256(f"{self.context} {self.batch_size} {self.seed} {self.frame} {self.masking!r}".encode())
        for stream in (self.train, self.held_out):
            for part in stream or ():
                digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()
