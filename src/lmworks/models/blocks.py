"""Blocks: attention, then an MLP, each added to what it reads. Kinds of block differ only in where the norms sit.

    pre     x + attention(norm(x)), then x + mlp(norm(x))       GPT-2, Llama

Shapes: B batch, T tokens, D hidden_size.
"""

from __future__ import annotations

from torch import Tensor, nn

from lmworks.models.attention import Attention, Context
from lmworks.models.config import Config
from lmworks.models.layers import MLP, GatedMLP, make_norm


class Block(nn.Module):
    """The parts that every kind of block has."""

    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(c)
        self.attention = Attention(c, layer)
        self.mlp_norm = make_norm(c)
        self.mlp = GatedMLP(c) if c.gated else MLP(c)
        self.drop = nn.Dropout(c.dropout)


class PreNormBlock(Block):
    """Norm before each part, and none on the stream itself (Xiong et al. 2020)."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Add to the stream twice: (B, T, D) -> (B, T, D)."""
        x = x + self.drop(self.attention(self.attention_norm(x), context))  # (B, T, D)
        y: Tensor = x + self.drop(self.mlp(self.mlp_norm(x)))  # (B, T, D)
        return y


BLOCKS: dict[str, type[Block]] = {
    "pre": PreNormBlock,
}
