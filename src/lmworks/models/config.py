"""What a network looks like: one frozen record that every family fills in. Torch-free.

Names follow config.json on the Hub where one exists. A knob enters with the first family that needs it; it picks a
class or a number when the network is made and never branches inside a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of the slow rotary frequencies (Grattafiori et al. 2024, section 3.2)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """The structure of one Transformer."""

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
    dropout: float = 0.0
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
