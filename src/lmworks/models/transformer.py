"""The one Transformer: embeddings, a stack of blocks, a final norm.

Shapes: B batch, T tokens, S keys, D hidden_size, E head_dim, P max_position_embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmworks.models.attention import Context
from lmworks.models.blocks import PreNormBlock
from lmworks.models.cache import CacheStep
from lmworks.models.config import Config
from lmworks.models.layers import make_norm
from lmworks.models.rope import rope_table


class TokenEmbeddings(nn.Module):
    """A vector a token, plus one a position where positions are learned."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.positions = nn.Embedding(c.max_position_embeddings, c.hidden_size) if c.positions == "learned" else None
        self.drop = nn.Dropout(c.dropout)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T) ids and (B|1, T) positions -> (B, T, D)."""
        x = self.tokens(input_ids)  # (B, T, D)
        if self.positions is not None:
            x = x + self.positions(position_ids)
        y: Tensor = self.drop(x)
        return y


class Transformer(nn.Module):
    """Token ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.embeddings = TokenEmbeddings(c)
        self.layers = nn.ModuleList(PreNormBlock(c, i) for i in range(c.num_hidden_layers))
        self.final_norm = make_norm(c)
        self.rope: tuple[Tensor, Tensor] | None = None  # (P, E/2) cosines and sines, made at first use

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: CacheStep | None = None,
    ) -> Tensor:
        """Run the stack; `attention_mask` (B, T) is 0 on padding, on either side (not together with a cache)."""
        if cache is not None:
            position_ids, mask = cache.positions.to(input_ids.device), cache.mask()
            causal = mask is None and input_ids.shape[1] > 1
        else:
            if position_ids is None:
                position_ids = make_positions(input_ids, attention_mask)
            mask = make_mask(attention_mask)
            causal = mask is None and input_ids.shape[1] > 1
        x = self.embeddings(input_ids, position_ids)  # (B, T, D)
        context = Context(mask, causal, self.rotary(position_ids), cache)
        for layer in self.layers:
            x = layer(x, context)  # (B, T, D)
        y: Tensor = self.final_norm(x)
        return y

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return cosines and sines (B|1, 1, T, E/2) of these positions, where the network rotates."""
        if self.config.positions != "rope":
            return None
        if self.rope is None or self.rope[0].device != position_ids.device:
            cos, sin = rope_table(self.config, self.config.max_position_embeddings)
            self.rope = cos.to(position_ids.device), sin.to(position_ids.device)
        cos, sin = self.rope
        return cos[position_ids][:, None], sin[position_ids][:, None]


def make_positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Count the real tokens of each row from 0: (B|1, T). Padding on the left takes position 0."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def make_mask(attention_mask: Tensor | None) -> Tensor | None:
    """Return (B, 1, T, T), True where a token may look; None when nothing is hidden but the future.

    A token always sees itself: a row of padding that saw nothing would give NaN, and NaN spreads.
    """
    if attention_mask is None:
        return None
    T = attention_mask.shape[1]
    past = torch.ones(T, T, dtype=torch.bool, device=attention_mask.device).tril()
    itself = torch.eye(T, dtype=torch.bool, device=attention_mask.device)
    return (past & attention_mask.bool()[:, None, :] | itself)[:, None]
