"""GPT-2: pre-norm decoder, learned positions, fused q/k/v, matrices stored transposed (TensorFlow's Conv1D)."""

from __future__ import annotations

from typing import Any

from lmworks.models.config import Config

KEYS: dict[str, str | tuple[str, ...]] = {
    "wte": "embeddings.tokens",
    "wpe": "embeddings.positions",
    "h.{}.ln_1": "layers.{}.attention_norm",
    "h.{}.attn.c_attn": ("layers.{}.attention.q_proj", "layers.{}.attention.k_proj", "layers.{}.attention.v_proj"),
    "h.{}.attn.c_proj": "layers.{}.attention.o_proj",
    "h.{}.ln_2": "layers.{}.mlp_norm",
    "h.{}.mlp.c_fc": "layers.{}.mlp.up_proj",
    "h.{}.mlp.c_proj": "layers.{}.mlp.down_proj",
    "ln_f": "final_norm",
}
TRANSPOSED = frozenset({"h.{}.attn.c_attn", "h.{}.attn.c_proj", "h.{}.mlp.c_fc", "h.{}.mlp.c_proj"})


def config(hf: dict[str, Any]) -> Config:
    """Read a published config."""
    return new(
        vocab_size=hf.get("vocab_size", 50257), hidden_size=hf.get("n_embd", 768),
        num_hidden_layers=hf.get("n_layer", 12), num_attention_heads=hf.get("n_head", 12),
        intermediate_size=hf.get("n_inner"), max_position_embeddings=hf.get("n_positions", 1024),
        hidden_act=hf.get("activation_function", "gelu_new"), norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        initializer_range=hf.get("initializer_range", 0.02), tie_word_embeddings=hf.get("tie_word_embeddings", True),
        dropout=hf.get("resid_pdrop", 0.1),
    )  # fmt: skip


def to_hf(c: Config) -> dict[str, Any]:
    """Write a config that transformers and transformers.js read; the latter wants max_position_embeddings too."""
    return {
        "vocab_size": c.vocab_size, "n_embd": c.hidden_size, "n_layer": c.num_hidden_layers,
        "n_head": c.num_attention_heads, "n_positions": c.max_position_embeddings, "n_inner": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings, "activation_function": c.hidden_act,
        "layer_norm_epsilon": c.norm_eps, "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
    }  # fmt: skip


def new(*, hidden_size: int, num_attention_heads: int, intermediate_size: int | None = None, **rest: Any) -> Config:
    """Return a GPT-2 of this size; the MLP is four times as wide by default."""
    return Config(
        model_type="gpt2", hidden_size=hidden_size, num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads, head_dim=hidden_size // num_attention_heads,
        intermediate_size=intermediate_size or 4 * hidden_size, **rest,
    )  # fmt: skip
