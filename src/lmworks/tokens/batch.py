"""From texts to arrays: padded batches, and the one long stream that language models train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from lmworks.base.errors import InputError
from lmworks.base.types import Batch, Ints
from lmworks.tokens.tokenizer import Tokenizer


def pad(
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int,
    side: Literal["left", "right"] = "right",
    max_length: int | None = None,
) -> Batch:
    """Return input_ids and attention_mask (B, T) of rows of any length; rows beyond `max_length` lose their end."""
    cut = [list(row)[:max_length] for row in rows]
    width = max((len(row) for row in cut), default=0)
    ids = np.full((len(cut), width), pad_id, np.int64)
    mask = np.zeros((len(cut), width), np.int64)
    for i, row in enumerate(cut):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def make_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> Ints:
    """Return `[eos] text1 [eos] text2 [eos] …`, the ids of all texts in the smallest unsigned type.

    The first eos is context only; every later one ends a document and is learned: a model that never sees the end never
    stops.
    """
    eos = tokenizer.eos_id
    if eos is None:
        raise InputError("the tokenizer has no token that ends a document", expected="an eos_token")
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    parts = [np.array([eos], kind)]
    for ids in tokenizer.encode_batch(texts):
        parts.append(np.array([*ids, eos], kind))
    return np.concatenate(parts)
