"""Layers that a user might write: what the tests put into loaded models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmworks.models.attention import Attention, Context


class DenseReLU(nn.Module):
    """One more dense layer with a ReLU, beside the stream that it reads."""

    def __init__(self, base: nn.Module, config: Any, *, size: int | None = None) -> None:
        super().__init__()
        size = size or config.hidden_size
        self.up, self.down = nn.Linear(config.hidden_size, size), nn.Linear(size, config.hidden_size)
        nn.init.normal_(self.down.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Add down(relu(up(x))): (B, T, D) -> (B, T, D)."""
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


class Tempered(Attention):
    """The attention that it replaces, with a trained temperature for each head."""

    def __init__(self, base: Attention, config: Any) -> None:
        super().__init__(config, base.layer)
        self.load_state_dict(base.state_dict())
        self.sharpness = nn.Parameter(torch.ones(self.heads))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, look: Any) -> Tensor:
        """Scale the queries of each head."""
        return super().attend(q * self.sharpness[:, None, None].to(q.dtype), k, v, look)


def context() -> Context:
    """Return something that makes no module."""
    return Context()
