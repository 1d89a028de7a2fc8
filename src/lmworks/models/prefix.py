"""Keys and values that stand before the first token of every layer (Li and Liang 2021, section 4).

    attention(q, [prefix keys; k], [prefix values; v])

They are what attention reads, so nothing rotates them; the tokens' positions go on after them, as transformers counts
after a cache. Every token sees them, also in layers that see a window only.

Shapes: B batch, T tokens, S keys, N length of the prefix, L layers, K key/value heads, E head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmworks.models.view import Look, View


class PrefixSlot(nn.Module):
    """The place of a prefix in a Transformer: empty here, filled by what is trained."""

    def rows(self) -> tuple[Tensor, Tensor] | None:
        """Return keys and values (L, K, N, E), or None."""
        return None

    @property
    def length(self) -> int:
        """How many positions the prefix takes: N, or 0."""
        rows = self.rows()
        return 0 if rows is None else rows[0].shape[2]


class After:
    """Whole sequences after a prefix: what they may look at, and the prefix put before their keys and values."""

    def __init__(self, view: View, T: int, rows: tuple[Tensor, Tensor]) -> None:
        self.view, self.T, (self.keys, self.values) = view, T, rows
        self.N = self.keys.shape[2]
        self.position_ids = view.position_ids + self.N  # (B or 1, T)

    def look(self, window: int | None) -> Look:
        """Return a mask (B or 1, 1, T or 1, N + T), or None where everything is seen."""
        mask, causal = self.view.look(window)
        if mask is None and not causal:
            return None, False
        if mask is None:
            mask = torch.ones(1, 1, self.T, self.T, dtype=torch.bool, device=self.position_ids.device).tril()
        return torch.cat((mask.new_ones(*mask.shape[:3], self.N), mask), -1), False

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values (B, K, T, E) after the prefix: (B, K, N + T, E) each."""
        before = (rows[layer].to(k.dtype).expand(len(k), -1, -1, -1) for rows in (self.keys, self.values))
        keys, values = (torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True))
        return keys, values
