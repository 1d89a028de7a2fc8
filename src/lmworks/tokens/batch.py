"""From texts to arrays: padded batches, and the one long stream that language models train on.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from lmworks.base.errors import InputError
from lmworks.base.types import Batch, Ints
from lmworks.tokens.patterns import is_ours
from lmworks.tokens.tokenizer import Tokenizer

PIECE, GROUP = 1 << 18, 1 << 22  # characters: a long document is encoded in pieces, the pieces in groups
BEFORE_LINE_END = re.compile(r"(?<=\S)(?=\n)")


def pad(
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int,
    side: Literal["left", "right"] = "right",
    max_length: int | None = None,
) -> Batch:
    """Return input_ids and attention_mask (B, T) of rows of any length; beyond `max_length` a row loses its end."""
    cut = [list(row)[:max_length] for row in rows]
    width = max((len(row) for row in cut), default=0)
    ids = np.full((len(cut), width), pad_id, np.int64)  # (B, T)
    mask = np.zeros((len(cut), width), np.int64)  # (B, T)
    for i, row in enumerate(cut):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def make_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> Ints:
    """Return `[eos] text1 [eos] text2 [eos] …`, the ids of all texts in the smallest unsigned type, (T,).

    The first eos is context only; every later one ends a document and is learned: a model that never sees the end
    never stops. Raises InputError for a tokenizer without an end token.
    """
    eos = tokenizer.eos_id
    if eos is None:
        raise InputError("the tokenizer has no token that ends a document", expected="an eos_token")
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = np.array([eos], kind)
    parts = [end]
    for group in groups(tokenizer, texts):
        for ids, (_, last) in zip(tokenizer.encode_batch([piece for piece, _ in group]), group, strict=True):
            parts.append(np.array(ids, kind))
            parts += [end] * last
    return np.concatenate(parts)


def make_word_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Ints, Ints]:
    """Return `text1 [eos] text2 [eos] …` and the number of the word that each token belongs to, -1 for none, (T,) each.

    A word is what the tokenizer cuts first, before it cuts into pieces. Raises InputError for one without an end token.
    """
    eos = tokenizer.eos_id
    if eos is None:
        raise InputError("the tokenizer has no token that ends a document", expected="an eos_token")
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    parts, words, count = [], [], 0
    for group in groups(tokenizer, texts):
        found = tokenizer.encode_bare([piece for piece, _ in group])
        for encoding, (_, last) in zip(found, group, strict=True):
            ids, numbers = encoding.ids, np.array([-1 if w is None else w for w in encoding.word_ids], np.int32)
            numbers[numbers >= 0] += count
            count = max(count, int(numbers.max(initial=-1)) + 1)
            parts.append(np.array([*ids, *[eos] * last], kind))
            words.append(np.append(numbers, [-1] * last).astype(np.int32))
    return np.concatenate(parts), np.concatenate(words)


def groups(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[tuple[str, bool]]]:
    """Yield (piece, whether it ends its document) in groups of bounded size, so that memory stays flat."""
    cut = is_cut_at_lines(tokenizer)
    group: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        pieces = list(split(text)) if cut else [text]
        for i, piece in enumerate(pieces):
            group.append((piece, i == len(pieces) - 1))
            size += len(piece)
            if size >= GROUP:
                yield group
                group, size = [], 0
    if group:
        yield group


def is_cut_at_lines(tokenizer: Tokenizer) -> bool:
    """Say whether the tokenizer always cuts between a character and a line end, so that pieces give the same ids."""
    rule = tokenizer.pre_tokenizer
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return tokenizer.backend.normalizer is None and (gpt2.items() <= rule.items() or is_ours(rule))


def split(text: str) -> Iterator[str]:
    """Yield pieces of about PIECE characters, each beginning with the line end that closes the one before."""
    start = 0
    while len(text) - start > PIECE:
        found = BEFORE_LINE_END.search(text, start + PIECE)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]
