"""Disentangled attention: what a token is and how far another one is from it are scored apart (He et al. 2021).

    score(i, j) = (q_i k_j + q_i pk_d + k_j pq_d) / sqrt(E * (1 + terms)),   d the bucket of i - j

pk and pq are a layer's keys and queries of distances, made of vectors that all layers share. Buckets are as wide as one
token near by and grow with the logarithm of the distance. In the papers the terms are called c2p and p2c.

Shapes: B batch, T tokens, N tokens of all rows, D hidden_size, H heads, E head_dim, S buckets on either side, U buckets
that the texts at hand use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmworks.models.attention import Attention, Context, Distances, Span
from lmworks.models.config import Config, Relative
from lmworks.models.layers import ACTIVATIONS, make_norm


def make_buckets(r: Relative) -> Tensor:
    """Return the bucket of each distance from -positions to positions, the farthest ones beyond: (2 positions + 1,)."""
    distance = torch.arange(-r.positions, r.positions + 1, device="cpu")
    if not r.buckets:
        return (distance + r.span).clamp(0, 2 * r.span - 1)
    near = r.buckets // 2
    far = distance.abs().clamp(min=near)
    steps = torch.log(far / near) / torch.log(torch.tensor((r.positions - 1) / near, device="cpu"))
    wide = (torch.ceil(steps * (near - 1)) + near) * distance.sign()
    return (torch.where(distance.abs() <= near, distance, wide).long() + r.span).clamp(0, 2 * r.span - 1)


class RelativeEmbeddings(nn.Module):
    """A vector for each bucket of distances, which all layers share."""

    def __init__(self, c: Config, r: Relative) -> None:
        super().__init__()
        self.positions = r.positions
        self.vectors = nn.Embedding(2 * r.span, c.hidden_size)
        self.norm: nn.Module = make_norm(c) if r.norm else nn.Identity()
        self.buckets = tuple(make_buckets(r).tolist())  # not a buffer: it would stay empty on the meta device

    def forward(self, T: int) -> Distances:
        """Return the vectors (U, D) that texts of T tokens need, and which of them stands between any two (T, T)."""
        reach = min(T - 1, self.positions)
        first, last = self.buckets[self.positions - reach], self.buckets[self.positions + reach]
        device = self.vectors.weight.device
        place = torch.arange(T, device=device)
        away = (place[:, None] - place).clamp(-reach, reach) + self.positions  # (T, T)
        index = torch.tensor(self.buckets, device=device)[away] - first
        return Distances(self.norm(self.vectors.weight[first : last + 1]), index)


class DisentangledAttention(Attention):
    """Attention whose scores know distances."""

    def __init__(self, c: Config, layer: int) -> None:
        super().__init__(c, layer)
        assert c.relative is not None
        self.terms = c.relative.terms
        self.scale = float((self.head_dim * (1 + len(self.terms))) ** -0.5)
        size = self.heads * self.head_dim
        own = () if c.relative.shared_keys else self.terms
        self.pos_k_proj = nn.Linear(c.hidden_size, size) if "c2p" in own else None
        self.pos_q_proj = nn.Linear(c.hidden_size, size) if "p2c" in own else None
        self.position_drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix the tokens: (B, T, D) -> (B, T, D)."""
        assert context.distances is not None
        parts = (torch.unflatten(part, -1, (-1, self.head_dim)) for part in self.project(x))
        q, k, v = (part.transpose(1, 2) for part in parts)  # (B, H, T, E) each
        vectors, index = context.distances
        pk, pq = self.positions(self.position_drop(vectors))
        if not context.spans:
            mixed = self.look(q, k, v, pk, pq, index, context.mask)
        else:
            rows = []
            sizes = [span.rows * span.length for span in context.spans]
            for span, *of_span in zip(context.spans, *(torch.split(p[0], sizes, 1) for p in (q, k, v)), strict=True):
                q, k, v = (span.stack(part) for part in of_span)  # (rows, H, length, E) each
                rows.append(self.look(q, k, v, pk, pq, index, span.mask).flatten(0, 1))
            mixed = torch.cat(rows)[None]  # (1, N, H * E)
        y: Tensor = self.o_proj(mixed)
        return y

    def positions(self, vectors: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the keys and the queries of distances: (U, D) -> (H, U, E) each, None for a term that is not used."""
        layers = (self.pos_k_proj or self.k_proj, self.pos_q_proj or self.q_proj)
        pk, pq = (
            torch.unflatten(layer(vectors), -1, (-1, self.head_dim)).transpose(0, 1) if term in self.terms else None
            for term, layer in zip(("c2p", "p2c"), layers, strict=True)
        )
        return pk, pq

    def look(
        self, q: Tensor, k: Tensor, v: Tensor, pk: Tensor | None, pq: Tensor | None, index: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Take the weighted mean of the values: (B, H, T, E) -> (B, T, H * E)."""
        T = q.shape[2]
        index = index[:T, :T].expand(*q.shape[:2], T, T)  # (B, H, T, T)
        bias = torch.zeros(1, dtype=q.dtype, device=q.device)
        if pk is not None:
            bias = bias + (q @ pk.mT).gather(-1, index)  # of (B, H, T, U)
        if pq is not None:
            bias = bias + (pq @ k.mT).gather(-2, index)  # of (B, H, U, T)
        bias = (bias * self.scale).expand(*q.shape[:2], T, T)
        if mask is not None:
            bias = bias.masked_fill(~mask, torch.finfo(q.dtype).min)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.scale)
        return y.transpose(1, 2).flatten(2)  # (B, T, H * E)


class Neighbours(nn.Module):
    """A convolution over the tokens beside each one: act(conv(x)), padding counting as 0."""

    def __init__(self, c: Config, r: Relative) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            c.hidden_size, c.hidden_size, r.conv_kernel, padding=r.conv_kernel // 2, groups=r.conv_groups
        )
        self.drop, self.act = nn.Dropout(c.dropout), ACTIVATIONS[r.conv_act]

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Look at the neighbours: (B, T, D) -> (B, T, D)."""
        if context.spans:
            sizes = [span.rows * span.length for span in context.spans]
            parts = zip(context.spans, torch.split(x[0], sizes), strict=True)
            y = torch.cat([self.turn(unstack(part, span)).flatten(0, 1) for span, part in parts])[None]  # (1, N, D)
        else:
            y = self.turn(x if context.mask is None else x * context.mask[:, 0, 0, :, None])
        z: Tensor = self.act(self.drop(y))
        return z

    def turn(self, x: Tensor) -> Tensor:
        """Convolve along the tokens: (B, T, D) -> (B, T, D)."""
        return self.conv(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


def unstack(x: Tensor, span: Span) -> Tensor:
    """Put the rows of a span side by side: (rows * length, D) -> (rows, length, D)."""
    return torch.unflatten(x, 0, (span.rows, span.length))
