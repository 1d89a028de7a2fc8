"""The one Transformer: embeddings, a stack of blocks, a final norm.

Shapes: B batch, T new tokens, S keys (past and new), D hidden_size, E head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.models.attention import Context
from lmworks.models.blocks import BLOCKS
from lmworks.models.cache import KVCache
from lmworks.models.config import Config
from lmworks.models.layers import make_norm
from lmworks.models.rope import rope_at, rope_frequencies


class TokenEmbeddings(nn.Module):
    """A vector a token, plus one a position where positions are learned."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.positions = nn.Embedding(c.max_position_embeddings, c.hidden_size) if c.positions == "learned" else None
        self.drop = nn.Dropout(c.dropout)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Look up ids (B, T) and positions (B or 1, T) -> (B, T, D)."""
        x = self.tokens(input_ids)  # (B, T, D)
        if self.positions is not None:
            x = x + self.positions(position_ids)  # (B, T, D)
        y: Tensor = self.drop(x)
        return y


class Transformer(nn.Module):
    """Token ids (B, T) -> hidden states (B, T, D).

    `attention_mask` (B, T) is 1 on tokens and 0 on padding. Without a cache the padding may be on either side: it is
    never looked at, and positions count the tokens alone, as transformers' `generate` counts them. What comes out at
    padding means nothing. Leave the mask out where you can, since it costs the fast attention kernel: whole rows need
    none, and rows padded on the right need none either, because a causal token never sees what follows.

    With a cache each row goes on at its own length; the mask then covers the new tokens, padded on the right only.
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.embeddings = TokenEmbeddings(c)
        self.layers = nn.ModuleList(BLOCKS[c.block](c, layer) for layer in range(c.num_hidden_layers))
        self.final_norm = make_norm(c)
        # numbers rather than a buffer, which would lose its precision when the model is cast to bfloat16
        self.frequencies = tuple(rope_frequencies(c).tolist()) if c.positions == "rope" else ()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Run the stack: (B, T) -> (B, T, D). `position_ids` (B or 1, T) replace those that are counted."""
        check_length(self.config, input_ids.shape[1] + (0 if cache is None else cache.longest))
        if cache is None:
            mask, causal, counted = see(input_ids, attention_mask, causal=self.config.causal)
        else:
            mask, causal, counted = cache.begin(input_ids, attention_mask)
        position_ids = counted if position_ids is None else position_ids
        rope = None
        if self.frequencies:
            rope = rope_at(torch.tensor(self.frequencies, device=input_ids.device), position_ids)
        context = Context(mask, causal, rope, cache)
        x = self.embeddings(input_ids, position_ids)  # (B, T, D)
        for layer in self.layers:
            x = layer(x, context)  # (B, T, D)
        if cache is not None:
            cache.end()
        y: Tensor = self.final_norm(x)
        return y


def check_length(c: Config, tokens: int) -> None:
    """Raise InputError for more tokens than there are learned positions."""
    if c.positions == "learned" and tokens > c.max_position_embeddings:
        raise InputError(
            "the text does not fit the model",
            found=f"{tokens} tokens",
            expected=f"at most {c.max_position_embeddings}",
            fix="shorten it",
        )


def see(input_ids: Tensor, attention_mask: Tensor | None, *, causal: bool) -> tuple[Tensor | None, bool, Tensor]:
    """Return a mask (B, 1, T, T) or None, whether the kernel is to hide the future, and positions (B or 1, T).

    A token of padding sees itself: a row of scores that hides everything would be NaN, and NaN spreads.
    """
    T = input_ids.shape[1]
    if attention_mask is None:
        return None, causal, torch.arange(T, device=input_ids.device)[None]
    real = attention_mask.bool()  # (B, T)
    itself = torch.eye(T, dtype=torch.bool, device=real.device)  # (T, T)
    past = torch.ones_like(itself).tril() if causal else torch.ones_like(itself)  # (T, T)
    mask = (past & real[:, None, :] | itself)[:, None]  # (B, 1, T, T)
    return mask, False, (real.cumsum(1) - 1).clamp(min=0)
