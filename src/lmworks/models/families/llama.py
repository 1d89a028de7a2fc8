"""Llama 1 to 3 (and TinyLlama, SmolLM): pre-norm decoder, RMSNorm, RoPE, gated MLP, grouped key/value heads."""

from __future__ import annotations

from typing import Any

from lmworks.models.config import Config
from lmworks.models.rope_config import read_rope, rope_to_hf

A, M = "layers.{}.attention.", "layers.{}.mlp."
KEYS: dict[str, str | tuple[str, ...]] = {
    "embed_tokens": "embeddings.tokens",
    "layers.{}.input_layernorm": "layers.{}.attention_norm",
    **{f"layers.{{}}.self_attn.{name}": A + name for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    "layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
    **{f"layers.{{}}.mlp.{name}": M + name for name in ("gate_proj", "up_proj", "down_proj")},
    "norm": "final_norm",
}


def config(hf: dict[str, Any]) -> Config:
    """Read a published config of either generation (rope_theta, or rope_parameters since transformers 5)."""
    return new(
        **read_rope(hf, default_theta=10000.0),
        vocab_size=hf.get("vocab_size", 32000), hidden_size=hf.get("hidden_size", 4096),
        num_hidden_layers=hf.get("num_hidden_layers", 32), num_attention_heads=hf.get("num_attention_heads", 32),
        num_key_value_heads=hf.get("num_key_value_heads"), head_dim=hf.get("head_dim"),
        intermediate_size=hf.get("intermediate_size", 11008), hidden_act=hf.get("hidden_act", "silu"),
        max_position_embeddings=hf.get("max_position_embeddings", 2048), norm_eps=hf.get("rms_norm_eps", 1e-6),
        attention_bias=hf.get("attention_bias", False), mlp_bias=hf.get("mlp_bias", False),
        initializer_range=hf.get("initializer_range", 0.02), tie_word_embeddings=hf.get("tie_word_embeddings", False),
    )  # fmt: skip


def to_hf(c: Config) -> dict[str, Any]:
    """Write a config that transformers 4 and 5 and transformers.js read."""
    return {
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim, "intermediate_size": c.intermediate_size, "hidden_act": c.hidden_act,
        "max_position_embeddings": c.max_position_embeddings, "rms_norm_eps": c.norm_eps,
        "attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias, **rope_to_hf(c),
    }  # fmt: skip


def new(*, hidden_size: int, num_attention_heads: int, **rest: Any) -> Config:
    """Return a Llama of this size; the MLP is 8/3 as wide, rounded up to a multiple of 32, by default."""
    values = {name: value for name, value in rest.items() if value is not None}
    values.setdefault("num_key_value_heads", num_attention_heads)
    values.setdefault("head_dim", hidden_size // num_attention_heads)
    values.setdefault("intermediate_size", -(-hidden_size * 8 // 3 // 32) * 32)
    fixed: dict[str, Any] = {"norm": "rms", "gated": True, "positions": "rope", "hidden_act": "silu", "norm_eps": 1e-6}
    fixed.update(attention_bias=False, mlp_bias=False, hidden_size=hidden_size, num_attention_heads=num_attention_heads)
    return Config(model_type="llama", **{**fixed, **values})
