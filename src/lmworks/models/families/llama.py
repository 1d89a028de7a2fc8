"""Llama 1 to 3 (and TinyLlama, SmolLM): pre-norm decoder, RMSNorm, RoPE, gated MLP, grouped key/value heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import Config
from lmworks.models.hf_config import Fields, read_rope, write_rope

ARCHITECTURE, PREFIX = "LlamaForCausalLM", "model."
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


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config of either generation."""
    f = Fields(hf)
    heads, size = f.integer("num_attention_heads"), f.integer("hidden_size")
    return new(
        vocab_size=f.integer("vocab_size"), hidden_size=size, num_hidden_layers=f.integer("num_hidden_layers"),
        num_attention_heads=heads, num_key_value_heads=f.integer("num_key_value_heads", heads),
        head_dim=f.integer("head_dim", size // max(heads, 1)), intermediate_size=f.integer("intermediate_size"),
        max_position_embeddings=f.integer("max_position_embeddings", 2048), hidden_act=f.text("hidden_act", "silu"),
        norm_eps=f.number("rms_norm_eps", 1e-6), attention_bias=f.flag("attention_bias", False),
        mlp_bias=f.flag("mlp_bias", False), dropout=f.number("attention_dropout", 0.0), **read_rope(hf),
        initializer_range=f.number("initializer_range", 0.02), tie_word_embeddings=f.flag("tie_word_embeddings", False),
        bos_token_id=f.token("bos_token_id", 1), eos_token_id=f.tokens("eos_token_id", 2),
        pad_token_id=f.token("pad_token_id"), source=hf)  # fmt: skip


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads; transformers knows no other dropout in a Llama than attention's."""
    same = ("hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
            "hidden_act max_position_embeddings attention_bias mlp_bias")  # fmt: skip
    names = {name: getattr(c, name) for name in same.split()}
    return {**names, "rms_norm_eps": c.norm_eps, "attention_dropout": c.dropout, **write_rope(c)}


def new(*, hidden_size: int, num_attention_heads: int, **rest: Any) -> Config:
    """Return a Llama of this size; the MLP is 8/3 as wide, rounded up to a multiple of 32, by default."""
    fixed = {"norm": "rms", "gated": True, "positions": "rope", "hidden_act": "silu", "norm_eps": 1e-6,
             "attention_bias": False, "mlp_bias": False, "num_key_value_heads": num_attention_heads,
             "head_dim": hidden_size // max(num_attention_heads, 1),
             "intermediate_size": -(-hidden_size * 8 // 3 // 32) * 32}  # fmt: skip
    return Config(model_type="llama", hidden_size=hidden_size, num_attention_heads=num_attention_heads,
                  **{**fixed, **rest})  # fmt: skip
