"""Blocks: attention and an MLP, each added to what it reads. Kinds of block differ only in where the norms sit.

    pre        x + attention(norm(x)), then x + mlp(norm(x))        GPT-2, Llama, ModernBERT, ViT
    post       norm(x + attention(x)), then norm(x + mlp(x))        BERT, RoBERTa, DistilBERT
    parallel   x + attention(norm(x)) + mlp(norm(x)), one norm      Phi

Shapes: B batch, T tokens, D hidden_size.
"""

from __future__ import annotations

from torch import Tensor, nn

from lmworks.models.attention import Attention, Context
from lmworks.models.config import Config, Relative
from lmworks.models.disentangled import DisentangledAttention, Neighbours
from lmworks.models.layers import MLP, GatedMLP, make_norm


class Block(nn.Module):
    """The parts that every kind of block has."""

    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.local = layer in c.local_layers  # sees a window only
        self.attention_norm = make_norm(c) if c.first_norm or layer else nn.Identity()
        self.attention = DisentangledAttention(c, layer) if c.relative else Attention(c, layer)
        self.mlp = GatedMLP(c) if c.gated else MLP(c)
        self.drop = nn.Dropout(c.dropout)


class PreNormBlock(Block):
    """Norm before each part, and none on the stream itself (Xiong et al. 2020)."""

    def __init__(self, c: Config, layer: int) -> None:
        super().__init__(c, layer)
        self.mlp_norm = make_norm(c)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Add to the stream twice: (B, T, D) -> (B, T, D)."""
        x = x + self.drop(self.attention(self.attention_norm(x), context))  # (B, T, D)
        y: Tensor = x + self.drop(self.mlp(self.mlp_norm(x)))  # (B, T, D)
        return y


class PostNormBlock(Block):
    """Norm after each sum (Vaswani et al. 2017)."""

    def __init__(self, c: Config, layer: int) -> None:
        super().__init__(c, layer)
        self.mlp_norm = make_norm(c)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Add and normalise twice: (B, T, D) -> (B, T, D)."""
        x = self.attention_norm(x + self.drop(self.attention(x, context)))  # (B, T, D)
        y: Tensor = self.mlp_norm(x + self.drop(self.mlp(x)))  # (B, T, D)
        return y


class NeighbourBlock(PostNormBlock):
    """A layer that adds a convolution over what it reads (He et al. 2021): the first one of DeBERTa-v2 xlarge."""

    def __init__(self, c: Config, layer: int, r: Relative) -> None:
        super().__init__(c, layer)
        self.neighbours, self.neighbours_norm = Neighbours(c, r), make_norm(c)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Add and normalise three times: (B, T, D) -> (B, T, D)."""
        y: Tensor = self.neighbours_norm(super().forward(x, context) + self.neighbours(x, context))
        return y


class ParallelBlock(Block):
    """Attention and MLP read the same normalised stream (Wang and Komatsuzaki 2021)."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Add to the stream once: (B, T, D) -> (B, T, D)."""
        y = self.attention_norm(x)  # (B, T, D)
        z: Tensor = x + self.drop(self.attention(y, context)) + self.drop(self.mlp(y))  # (B, T, D)
        return z


def make_block(c: Config, layer: int) -> Block:
    """Return a layer as the config says."""
    if c.relative is not None and c.relative.conv_kernel and layer == 0:
        return NeighbourBlock(c, layer, c.relative)
    return BLOCKS[c.block](c, layer)


BLOCKS: dict[str, type[Block]] = {
    "pre": PreNormBlock,
    "post": PostNormBlock,
    "parallel": ParallelBlock,
}
