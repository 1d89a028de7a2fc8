"""What a network looks like: one frozen record that every family fills in. Torch-free.

Names follow config.json on the Hub where one exists. A knob enters with the first family that needs it; it picks a
class or a number when the network is made and never branches inside a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lmworks.base.errors import InputError

HIDDEN_ACTS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of the slow rotary frequencies (Grattafiori et al. 2024, section 3.2)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """The structure of one Transformer, and the tokens that generation needs to know."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_act: str = "gelu_new"
    norm_eps: float = 1e-5
    dropout: float = 0.0  # while training: on embeddings, attention weights, and what a block adds to its stream
    block: Literal["pre"] = "pre"
    causal: bool = True
    norm: Literal["layer", "rms"] = "layer"
    gated: bool = False  # the MLP computes act(gate(x)) * up(x)
    attention_bias: bool = True
    mlp_bias: bool = True
    positions: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    source: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # config.json as it was read

    def __post_init__(self) -> None:
        """Raise InputError for numbers that no network can have."""
        sizes = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "intermediate_size max_position_embeddings"
        )
        for name in sizes.split():
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        grouped = self.num_attention_heads % self.num_key_value_heads == 0
        require(grouped, "num_key_value_heads", self.num_key_value_heads, f"a divisor of {self.num_attention_heads}")
        require(self.positions != "rope" or self.head_dim % 2 == 0, "head_dim", self.head_dim, "even, to be rotated")
        require(self.hidden_act in HIDDEN_ACTS, "hidden_act", self.hidden_act, ", ".join(HIDDEN_ACTS))
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "0 or more, below 1")


def require(good: bool, name: str, found: object, expected: str) -> None:
    """Raise InputError unless `good`."""
    if not good:
        raise InputError(f"no network can have this {name}", found=str(found), expected=expected)
