"""Llama 1 to 3 (and TinyLlama, SmolLM): pre-norm decoder, RMSNorm, RoPE, gated MLP, grouped key/value heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import Config, HeadSpec
from lmworks.models.hf_config import Fields
from lmworks.models.hf_shared import decoder_heads, read_decoder, shared, write_decoder

NAME, PREFIX = "Llama", "model."
KEYS: dict[str, str | tuple[str, ...]] = {
    "embed_tokens": "embeddings.tokens",
    "layers.{}.input_layernorm": "layers.{}.attention_norm",
    **{f"layers.{{}}.self_attn.{name}_proj": f"layers.{{}}.attention.{name}_proj" for name in "qkvo"},
    "layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
    **{f"layers.{{}}.mlp.{name}_proj": f"layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")},
    "norm": "final_norm",
}
TRANSPOSED: frozenset[str] = frozenset()
IGNORED = frozenset({"layers.{}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"})  # old files hold a constant


def heads(c: Config) -> Mapping[str, HeadSpec]:
    """The heads of a decoder."""
    return {"Model": HeadSpec(outputs="none"), **decoder_heads(qa_prefix="transformer.")}


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config of either generation."""
    f = Fields(hf)
    return new(attention_bias=f.flag("attention_bias", False), mlp_bias=f.flag("mlp_bias", False),
               **read_decoder(hf, norm="rms_norm_eps"), **shared(hf, tie=False, bos=1, eos=2))  # fmt: skip


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads."""
    biases = {"attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias}
    return {**write_decoder(c, norm="rms_norm_eps"), **biases}


def new(*, hidden_size: int, num_attention_heads: int, **rest: Any) -> Config:
    """Return a Llama of this size; the MLP is 8/3 as wide, rounded up to a multiple of 32, by default."""
    fixed = {"norm": "rms", "gated": True, "positions": "rope", "hidden_act": "silu", "norm_eps": 1e-6,
             "attention_bias": False, "mlp_bias": False, "num_key_value_heads": num_attention_heads,
             "head_dim": hidden_size // max(num_attention_heads, 1),
             "intermediate_size": -(-hidden_size * 8 // 3 // 32) * 32}  # fmt: skip
    return Config(model_type="llama", hidden_size=hidden_size, num_attention_heads=num_attention_heads,
                  **{**fixed, **rest})  # fmt: skip
