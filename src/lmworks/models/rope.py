"""Rotary position embeddings (Su et al. 2021), in the half-split layout of the Hub's Llama checkpoints.

Shapes: B batch, T tokens, H heads, E head_dim, P positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmworks.models.config import Config, RopeScaling


def inverse_frequencies(c: Config) -> Tensor:
    """Return theta^(-2i/E) for i = 0 … E/2-1, stretched where the config says so: (E/2,)."""
    exponents = torch.arange(0, c.head_dim, 2, dtype=torch.int64).float() / c.head_dim
    frequencies = 1.0 / c.rope_theta**exponents
    return stretch(frequencies, c.rope_scaling) if c.rope_scaling else frequencies


def stretch(frequencies: Tensor, s: RopeScaling) -> Tensor:
    """Slow the frequencies whose wavelength exceeds the original context, blending in between (Llama 3)."""
    wavelengths = 2 * math.pi / frequencies
    smooth = (s.original_max_position_embeddings / wavelengths - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)
    return smooth * frequencies + (1 - smooth) * frequencies / s.factor


def rope_table(c: Config, positions: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of every position up to `positions`: two (P, E/2) tensors."""
    angles = torch.arange(positions).float()[:, None] * inverse_frequencies(c)  # (P, E/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + E/2]) by its angle: x (B, H, T, E), cos and sin (B|1, 1, T, E/2)."""
    a, b = x.chunk(2, -1)  # (B, H, T, E/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)
