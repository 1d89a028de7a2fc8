"""Rotary position embeddings (Su et al. 2021), in the half-split layout of the Hub's Llama checkpoints.

Shapes: B batch, T tokens, H heads, E head_dim, R rotary_dim (E, where the whole head is rotated), P positions.

Pair (x_i, x_{i + R/2}) of a head turns by position * theta^(-2i/R), so that the product of a query and a key depends on
their distance alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmworks.models.config import Config, LongRope, RopeScaling

Rope = tuple[Tensor, Tensor]  # cosines, and sines whose first half is negated: (B or 1, 1, T, R) each


def rope_frequencies(c: Config, theta: float | None = None, *, long: bool = False) -> Tensor:
    """Return theta^(-2i/R) for i = 0 … R/2-1, stretched where the config says so: (R/2,) float32 on the CPU.

    `long`: those for texts beyond the original context, where the config has other ones for them.
    """
    rotated, scaling = c.rotary.dim or c.head_dim, c.rotary.scaling
    exponents = torch.arange(0, rotated, 2, device="cpu").float() / rotated  # (R/2,)
    waves = (theta or c.rotary.theta) ** exponents  # (R/2,)
    if isinstance(scaling, LongRope):
        waves = waves * torch.tensor(scaling.long if long else scaling.short, device="cpu")
    frequencies = 1.0 / waves  # (R/2,)
    return stretch(frequencies, scaling) if isinstance(scaling, RopeScaling) else frequencies


def stretch(frequencies: Tensor, s: RopeScaling) -> Tensor:
    """Slow the waves that turn rarely within the original context, keep the others, blend in between (Llama 3.1)."""
    turns = s.original_max_position_embeddings / (2 * math.pi / frequencies)  # (R/2,)
    keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)  # (R/2,)
    return keep * frequencies + (1 - keep) * frequencies / s.factor


def rope_table(c: Config, positions: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of every position up to `positions`: two (P, R/2) tensors, for an exporter."""
    angles = torch.arange(positions).float()[:, None] * rope_frequencies(c)  # (P, R/2)
    return angles.cos(), angles.sin()


def rope_at(frequencies: Tensor, position_ids: Tensor, factor: float = 1.0) -> Rope:
    """Return cosines and signed sines at positions (B or 1, T), times `factor`: two tensors (B or 1, 1, T, R).

    `frequencies` are those of all tokens (R/2,), or of each (B or 1, 1, T or 1, R/2).
    """
    angles = position_ids[:, None, :, None].float() * frequencies  # (B or 1, 1, T, R/2)
    cos, sin = angles.cos(), angles.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + R/2}) by its angle; what lies beyond R stays: (B, H, T, E) -> (B, H, T, E)."""
    R = cos.shape[-1]
    if x.shape[-1] > R:
        return torch.cat((rotate(x[..., :R], cos, sin), x[..., R:]), -1)
    a, b = x.chunk(2, -1)  # (B, H, T, R/2) each
    return (x * cos + torch.cat((b, a), -1) * sin).type_as(x)
