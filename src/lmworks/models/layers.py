"""Norms and MLPs: the parts of a block that look at one token at a time.

Shapes: B batch, T tokens, D hidden_size, I intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmworks.models.config import Config


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016, section 2): GPT-2's activation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
}


class RMSNorm(nn.Module):
    """Divide by the root mean square, then scale (Zhang and Sennrich 2019); computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension: (…, D) -> (…, D)."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.type_as(x)


def make_norm(c: Config, size: int | None = None) -> nn.Module:
    """Return the norm that the config names, of `size` numbers (None: hidden_size)."""
    if c.norm == "rms":
        return RMSNorm(size or c.hidden_size, c.norm_eps)
    return nn.LayerNorm(size or c.hidden_size, c.norm_eps, bias=c.norm == "layer")


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.act = ACTIVATIONS[c.hidden_act]
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: (B, T, D) -> (B, T, D)."""
        y: Tensor = self.down_proj(self.act(self.up_proj(x)))
        return y


class GatedMLP(MLP):
    """down(act(gate(x)) * up(x)), SwiGLU when act is SiLU (Shazeer 2020)."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: (B, T, D) -> (B, T, D)."""
        y: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return y
