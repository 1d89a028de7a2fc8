"""Scaled dot-product attention with grouped key/value heads.

    softmax(q k^T / sqrt(E)) v      (Vaswani et al. 2017, section 3.2; grouped heads: Ainslie et al. 2023)

Shapes: B batch, T new tokens, S keys (past and new), N tokens of all rows, D hidden_size, H heads, K key/value heads,
E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmworks.models import short_attention
from lmworks.models.config import Config
from lmworks.models.layers import RMSNorm
from lmworks.models.rope import Rope, rotate


class Past(Protocol):
    """Keys and values before the new ones: a cache, or a prefix."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's new keys and values (B, K, T, E) after those of the past: (B, K, S, E) each."""
        ...


class Span(NamedTuple):
    """Rows of one length that lie end to end in a single row of tokens, and what a token of theirs may look at."""

    rows: int
    length: int
    mask: Tensor | None
    causal: bool
    past: Past | None = None  # a prefix

    def stack(self, part: Tensor) -> Tensor:
        """Put these rows side by side: (H, rows * length, E) -> (rows, H, length, E)."""
        return torch.unflatten(part, 1, (self.rows, -1)).transpose(0, 1)


class Distances(NamedTuple):
    """How far tokens are apart, in buckets that have a vector each."""

    vectors: Tensor  # (U, D)
    between: Tensor  # (T, T): which of them lies between a query and a key


class Context(NamedTuple):
    """What the layers of one forward share; local layers and the others have one each."""

    mask: Tensor | None = None  # (B or 1, 1, T, S), True where a token may look; None hides nothing
    causal: bool = False  # the kernel hides the future by itself; then there is no mask, and S = T
    rope: Rope | None = None
    cache: Past | None = None
    spans: Sequence[Span] = ()  # where rows lie end to end instead of side by side; then B = 1
    distances: Distances | None = None


class Attention(nn.Module):
    """Queries look at keys and take a weighted mean of values; q, k, v and o stay separate modules."""

    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, c.dropout
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        output_bias = c.attention_bias if c.output_bias is None else c.output_bias
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, c.hidden_size, bias=output_bias)
        self.q_norm: nn.Module = RMSNorm(self.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix the tokens: (B, T, D) -> (B, T, D)."""
        q, k, v = (torch.unflatten(part, -1, (-1, self.head_dim)) for part in self.project(x))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, E), (B, K, T, E), (B, K, T, E)
        mixed: Tensor = self.o_proj(self.mix(q, k, v, context))  # (B, T, D)
        return mixed

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Return the queries (B, T, H * E), keys and values (B, T, K * E) of all heads side by side."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Rotate, remember, attend: q (B, H, T, E), new k and v (B, K, T, E) -> (B, T, H * E)."""
        if context.rope is not None:
            q, k = rotate(q, *context.rope), rotate(k, *context.rope)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)  # (B, K, S, E)
        if not context.spans:
            return self.attend(q, k, v, context)
        sizes = [span.rows * span.length for span in context.spans]
        parts = [torch.split(x.squeeze(0), sizes, 1) for x in (q, k, v)]  # a slice's gradient would be as large as x
        rows = []
        for span, *of_span in zip(context.spans, *parts, strict=True):
            q, k, v = (span.stack(part) for part in of_span)  # (rows, H, length, E), (rows, K, length, E) twice
            if span.past is not None:
                k, v = span.past.append(self.layer, k, v)
            rows.append(self.attend(q, k, v, span).flatten(0, 1))
        return torch.cat(rows)[None]  # (1, N, H * E)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, look: Context | Span) -> Tensor:
        """Take the weighted mean of the values: (B, H, T, E) -> (B, T, H * E)."""
        dropout, grouped = self.dropout if self.training else 0.0, self.heads != self.kv_heads
        if short_attention.suits(q, k, dropout=dropout):
            y = short_attention.attend(q, k, v, mask=look.mask, causal=look.causal)  # (B, H, T, E)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=look.mask, dropout_p=dropout, is_causal=look.causal, enable_gqa=grouped
            )  # (B, H, T, E)
        return y.transpose(1, 2).flatten(2)
