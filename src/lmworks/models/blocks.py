"""Blocks: attention, then an MLP, each added to what it reads. Kinds of block differ only in where the norms sit."""

from __future__ import annotations

from torch import Tensor, nn

from lmworks.models.attention import Attention, Context
from lmworks.models.config import Config
from lmworks.models.layers import MLP, GatedMLP, make_norm


class PreNormBlock(nn.Module):
    """Norm before each part (Xiong et al. 2020): GPT-2, Llama."""

    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(c)
        self.attention = Attention(c, layer)
        self.mlp_norm = make_norm(c)
        self.mlp = GatedMLP(c) if c.gated else MLP(c)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.drop(self.attention(self.attention_norm(x), context))
        y: Tensor = x + self.drop(self.mlp(self.mlp_norm(x)))
        return y
