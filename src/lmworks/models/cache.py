"""Keys and values of past tokens in buffers that are made once, where every row has a length of its own.

Shapes: R rows of the buffers, B rows of one call, K key/value heads, T new tokens, S keys (past and new), E head_dim,
C capacity.

New keys are written at [row, :, length : length + T]. So rows of different lengths share a step, and some rows can read
a prompt while the others wait. What lies beyond a row's length is never looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from lmworks.base.errors import InputError
from lmworks.models.config import Config
from lmworks.models.view import Look


class KVCache:
    """Buffers (R, K, C, E) for the keys and the values of every layer, and how many tokens each row holds.

    `model(input_ids, cache=cache)` continues all rows; `cache.select([2, 0])` is the same cache for a call that
    continues only rows 2 and 0, in this order.
    """

    def __init__(
        self,
        c: Config,
        rows: int = 1,
        *,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (rows, c.num_key_value_heads, capacity or c.max_position_embeddings, c.head_dim)
        layers = range(c.num_hidden_layers)
        # zeros, not empty: a hidden key has weight 0, and 0 * NaN is NaN
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]  # (R, K, C, E) each
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]  # (R, K, C, E) each
        self.lengths = [0] * rows
        self.kept = [0] * rows  # of them those that every token sees, whatever its window: a prefix
        self.rows = list(range(rows))  # that the next call continues
        self.call = Call(self.rows, self.lengths, 0)  # replaced when a call begins

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        return self.keys[0].shape[2]

    @property
    def longest(self) -> int:
        """The length of the longest selected row."""
        return max(self.lengths[row] for row in self.rows)

    def select(self, rows: Sequence[int]) -> KVCache:
        """Return the same buffers and lengths for calls that continue only these rows."""
        part = copy.copy(self)
        part.rows = list(rows)
        return part

    def reset(self) -> None:
        """Start the selected rows over."""
        for row in self.rows:
            self.lengths[row] = self.kept[row] = 0

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens a row; what is held moves to larger buffers."""
        if capacity <= self.capacity:
            return
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                rows, heads, held, size = old.shape
                buffers[layer] = old.new_zeros(rows, heads, capacity, size)  # (R, K, C, E)
                buffers[layer][:, :, :held] = old

    def start(self, keys: Tensor, values: Tensor, *, new: int) -> None:
        """Let the selected rows that are empty begin with a prefix (layers, K, N, E); make room for `new` tokens."""
        N = keys.shape[2]
        self.reserve(max(N, self.longest) + new)
        fresh = [row for row in self.rows if not self.lengths[row]]
        for buffers, rows in ((self.keys, keys), (self.values, values)):
            for buffer, prefix in zip(buffers, rows, strict=True) if fresh else ():
                buffer[fresh, :, :N] = prefix.to(buffer.dtype)
        for row in fresh:
            self.lengths[row] = self.kept[row] = N

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> Call:
        """Prepare to add (B, T) tokens; return what they may look at, and their positions.

        `attention_mask` (B, T) may end in zeros: padding on the right, which is not counted.
        """
        B, T = input_ids.shape
        past = [self.lengths[row] for row in self.rows]
        if len(past) != B:
            raise InputError("the cache and the batch differ", found=f"{B} rows", expected=f"{len(past)} rows")
        if max(past) + T > self.capacity:
            raise InputError("the cache is full", found=f"{max(past) + T} tokens", expected=f"at most {self.capacity}")
        self.call = Call(self.rows, past, T, attention_mask, input_ids.device, [self.kept[row] for row in self.rows])
        return self.call

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (B, K, T, E); return them with the past: (B, K, S, E) each."""
        return self.call.store(self.keys[layer], k), self.call.store(self.values[layer], v)

    def end(self) -> None:
        """Count the tokens of the call, now that every layer has written them."""
        for row, new in zip(self.rows, self.call.new, strict=True):
            self.lengths[row] += new


class Call:
    """Where the new tokens of one call go. Neighbouring rows are views of the buffers, scattered ones are copied."""

    def __init__(
        self,
        rows: list[int],
        past: list[int],
        T: int,
        attention_mask: Tensor | None = None,
        device: torch.device | str = "cpu",
        kept: Sequence[int] = (),
    ) -> None:
        self.kept = list(kept)
        self.past, self.T, self.S = past, T, max(past) + T
        self.new = [T] * len(rows) if attention_mask is None else count_real(attention_mask)
        self.same = min(past) == max(past)  # then all rows are one slice
        together = rows == list(range(rows[0], rows[0] + len(rows)))
        self.index = slice(rows[0], rows[0] + len(rows)) if together else rows
        self.scattered = not (self.same and together)
        if self.scattered:
            self.at = torch.tensor(rows)[:, None], torch.tensor(past)[:, None] + torch.arange(T)  # (B, 1), (B, T)
        start = torch.tensor(past[:1] if self.same else past, device=device)[:, None]  # (B or 1, 1)
        self.position_ids = start + torch.arange(T, device=device) if T > 1 else start  # (B or 1, T)

    def look(self, window: int | None) -> Look:
        """Return a mask (B or 1, 1, T, S) or None, and whether the kernel is to hide the future."""
        near = window is None or window >= self.S
        if near and self.same and (self.T == 1 or self.S == self.T):
            return None, self.T > 1  # a single token sees everything; a fresh row is plainly causal
        place = torch.arange(self.S, device=self.position_ids.device)
        behind = self.position_ids[:, None, :, None] - place
        mask = behind >= 0  # (B or 1, 1, T, S)
        if window is None:
            return mask, False
        near_by = behind < window
        if any(self.kept):
            kept = torch.tensor(self.kept, device=place.device)[:, None, None, None]  # (B, 1, 1, 1)
            near_by = near_by | (place < kept)  # (B, 1, T, S)
        return mask & near_by, False

    def store(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Write (B, K, T, E) into a buffer (R, K, C, E); return the rows up to the longest: (B, K, S, E)."""
        if self.scattered:
            rows, positions = self.at
            buffer[rows, :, positions] = new.transpose(1, 2)  # (B, T, K, E)
            return buffer[self.index, :, : self.S]
        held = buffer[self.index, :, : self.S]
        held[:, :, self.S - self.T :] = new
        return held


def count_real(attention_mask: Tensor) -> list[int]:
    """Return the number of real tokens in each row (B, T); padding before a real token is an InputError."""
    real = attention_mask.bool()
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise InputError("padding comes before a token", expected="padding on the right of rows that continue a cache")
    counts: list[int] = real.sum(1).tolist()
    return counts
