"""Keys and values of past tokens in buffers of fixed size, where every row has a length of its own.

Shapes: R rows of the cache, B rows of one call, K key/value heads, T new tokens, S keys seen, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmworks.models.config import Config


class KVCache:
    """Buffers (R, K, length, E) for every layer; `lengths[r]` tokens of row r are filled."""

    def __init__(
        self, c: Config, rows: int, length: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        shape = (rows, c.num_key_value_heads, length, c.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(c.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(c.num_hidden_layers)]
        self.lengths = [0] * rows
        self.size = length

    def step(self, tokens: int, rows: Sequence[int] | None = None) -> CacheStep:
        """Prepare to add `tokens` tokens to each of `rows` (all rows when None)."""
        return CacheStep(self, list(range(len(self.lengths)) if rows is None else rows), tokens)


class CacheStep:
    """One forward's dealings with the cache: where the new tokens go and which keys each of them may see."""

    def __init__(self, cache: KVCache, rows: list[int], tokens: int) -> None:
        self.cache, self.rows, self.tokens = cache, rows, tokens
        self.past = [cache.lengths[row] for row in rows]
        self.span = max(self.past) + tokens
        self.uniform = min(self.past) == max(self.past)
        first, consecutive = rows[0], rows == list(range(rows[0], rows[0] + len(rows)))
        self.index: slice | Tensor = slice(first, first + len(rows)) if consecutive else torch.tensor(rows)
        starts = torch.tensor(self.past)
        self.positions = starts[:, None] + torch.arange(tokens)  # (B, T)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (B, K, T, E); return all up to the longest row: (B, K, S, E)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.uniform and isinstance(self.index, slice):
            keys[self.index, :, self.past[0] : self.span] = k
            values[self.index, :, self.past[0] : self.span] = v
        else:
            rows = torch.tensor(self.rows)[:, None]  # (B, 1)
            keys[rows, :, self.positions] = k.transpose(1, 2)
            values[rows, :, self.positions] = v.transpose(1, 2)
        return keys[self.index, :, : self.span], values[self.index, :, : self.span]

    def mask(self) -> Tensor | None:
        """Return (B|1, 1, T, S), True where a token may look; None when nothing is hidden or plain causality does."""
        if self.uniform and (self.tokens == 1 or self.past[0] == 0):
            return None
        visible = torch.arange(self.span) <= self.positions[:, :, None]  # (B, T, S)
        return visible[:, None]

    def commit(self, added: Sequence[int] | None = None) -> None:
        """Count the new tokens: all of them, or `added[b]` for row b where the rest was padding on the right."""
        for i, row in enumerate(self.rows):
            self.cache.lengths[row] += self.tokens if added is None else added[i]
