"""Rotary position embeddings (Su et al. 2021), in the half-split layout of the Hub's Llama checkpoints.

Shapes: B batch, T tokens, H heads, E head_dim, P positions.

Pair (x_i, x_{i + E/2}) of a head turns by position * theta^(-2i/E), so that the product of a query and a key depends on
their distance alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmworks.models.config import Config, RopeScaling

Rope = tuple[Tensor, Tensor]  # cosines, and sines whose first half is negated: (B or 1, 1, T, E) each


def rope_frequencies(c: Config) -> Tensor:
    """Return theta^(-2i/E) for i = 0 … E/2-1, stretched where the config says so: (E/2,) float32 on the CPU."""
    exponents = torch.arange(0, c.head_dim, 2, device="cpu").float() / c.head_dim  # (E/2,)
    frequencies = 1.0 / c.rope_theta**exponents  # (E/2,)
    return stretch(frequencies, c.rope_scaling) if c.rope_scaling else frequencies


def stretch(frequencies: Tensor, s: RopeScaling) -> Tensor:
    """Slow the waves that turn rarely within the original context, keep the others, blend in between (Llama 3.1)."""
    turns = s.original_max_position_embeddings / (2 * math.pi / frequencies)  # (E/2,)
    keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)  # (E/2,)
    return keep * frequencies + (1 - keep) * frequencies / s.factor


def rope_table(c: Config, positions: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of every position up to `positions`: two (P, E/2) tensors, for an exporter."""
    angles = torch.arange(positions).float()[:, None] * rope_frequencies(c)  # (P, E/2)
    return angles.cos(), angles.sin()


def rope_at(frequencies: Tensor, position_ids: Tensor) -> Rope:
    """Return cosines and signed sines at positions (B or 1, T): two tensors (B or 1, 1, T, E)."""
    angles = position_ids[:, None, :, None].float() * frequencies  # (B or 1, 1, T, E/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + E/2}) by its angle: (B, H, T, E) -> (B, H, T, E)."""
    a, b = x.chunk(2, -1)  # (B, H, T, E/2) each
    return (x * cos + torch.cat((b, a), -1) * sin).type_as(x)
