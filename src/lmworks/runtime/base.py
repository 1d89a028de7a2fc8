"""The protocol that every execution of a model fulfils.

Shapes: B batch, T tokens, n rows of a call, V vocabulary.

A runtime keeps the keys and values of several sequences at once, each in a numbered *slot* (0 … slots-1) with a length
of its own. `prefill` starts a slot over with a prompt; `step` adds one token to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.base.types import Batch

Logits = NDArray[np.float32]


class Runtime(Protocol):
    """What the generation loop, the evaluation and the server need from a model."""

    name: str  # "torch" | "onnx"
    dtype: str  # "fp32" | "int8" …
    vocab_size: int
    max_length: int  # positions the model was made for
    rewinds: bool  # a slot can go back to an earlier token; a state, in place of a cache, cannot
    turn: int | None  # a text that begins with at most so many tokens must end there

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Run whole sequences without a cache: input_ids (B, T), attention_mask (B, T) -> logits (B, T, V)."""
        ...

    def prefill(self, slots: Sequence[int], input_ids: Sequence[Sequence[int]]) -> Logits:
        """Start these slots over, one prompt each of any length; return the last token's logits (n, V)."""
        ...

    def step(self, slots: Sequence[int], input_ids: Sequence[int]) -> Logits:
        """Add one token to each of these slots, whatever their lengths; return its logits (n, V)."""
        ...


def check_slots(slots: Sequence[int], rows: int, total: int) -> None:
    """Raise InputError unless `slots` are `rows` different numbers below `total`."""
    if len(slots) != rows or len(set(slots)) != len(slots) or not all(0 <= slot < total for slot in slots):
        raise InputError(
            "these slots cannot be used",
            found=f"slots {list(slots)} for {rows} rows",
            expected=f"one different slot a row, each from 0 to {total - 1}",
        )


def check_ids(input_ids: NDArray[Any], vocab_size: int) -> None:
    """Raise InputError for a token id outside the vocabulary (a kernel would read beside the embedding table)."""
    if input_ids.size and (input_ids.min() < 0 or input_ids.max() >= vocab_size):
        raise InputError(
            "a token id is outside the vocabulary",
            where="the tokenizer (tokenizer.json, or vocab.txt)",
            found=f"ids from {input_ids.min()} to {input_ids.max()}",
            expected=f"0 to {vocab_size - 1}",
            fix="use the tokenizer that is in the model's folder",
        )


def check_length(tokens: int, max_length: int) -> None:
    """Raise InputError when a sequence would have no token at all, or more than the model has positions for."""
    if not 1 <= tokens <= max_length:
        raise InputError(
            "the text does not fit the model" if tokens else "there is no token to run",
            found=f"{tokens} tokens",
            expected=f"1 to {max_length} tokens",
            fix="shorten the prompt" if tokens else "give at least one token",
        )
