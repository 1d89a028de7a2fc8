"""The feed-forward language model of Bengio et al. (2003, section 2): a window of tokens, and a hidden layer.

    h = tanh(W [e(t−n+1); …; e(t)] + b)        e: the tokens' vectors; before the text they are 0

It sees `window` tokens and nothing before them; the vectors of the last n − 1 are its state. The direct connections
from the vectors to the output, which the paper calls optional, are left out; more layers are tanh layers on the first.

Shapes: B batch, T tokens, D hidden_size, E embedding_size, n window, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmworks.models.config import Config
from lmworks.models.recurrent import Sequential, StateCache


class DenseLayer(nn.Module):
    """tanh of a product; the first reads a window of vectors."""

    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        width = c.hidden_size if layer else (c.window or 1) * (c.embedding_size or c.hidden_size)
        self.linear = nn.Linear(width, c.hidden_size)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: (B, T, n E or D) -> (B, T, D)."""
        y: Tensor = self.drop(torch.tanh(self.linear(x)))
        return y


class FeedForward(Sequential):
    """Token ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.layers = nn.ModuleList(DenseLayer(c, layer) for layer in range(c.num_hidden_layers))

    @property
    def before(self) -> int:
        """How many tokens before the newest it sees."""
        return (self.config.window or 1) - 1

    def make_cache(
        self, rows: int, *, capacity: int | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> StateCache:  # fmt: skip
        """Return the vectors of nothing, for so many texts."""
        return StateCache([(self.before, self.embeddings.tokens.embedding_dim)], rows, dtype=dtype, device=device)

    def run(self, x: Tensor, cache: StateCache | None) -> Tensor:
        """Slide the window over the vectors, then run the layers: (B, T, E) -> (B, T, D)."""
        B, T, _ = x.shape
        held = x.new_zeros(B, self.before, x.shape[2]) if cache is None else cache.states[0][cache.rows]
        x = torch.cat((held, x), 1)  # (B, n - 1 + T, E)
        if cache is not None and self.before:
            ends = torch.full((B,), T, device=x.device) if cache.new is None else cache.new.to(x.device)
            places = ends[:, None] + torch.arange(self.before, device=x.device)  # (B, n - 1) the last of each row
            cache.states[0][cache.rows] = x[torch.arange(B, device=x.device)[:, None], places]
        x = torch.cat([x[:, i : i + T] for i in range(self.before + 1)], -1)  # (B, T, n E), the oldest first
        for layer in self.layers:
            x = layer(x)
        return x
