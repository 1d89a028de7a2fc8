"""ModernBERT: pre-norm encoder, RoPE, gated MLP, two local layers to each global one (Warner et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import HEAD_ACTS, Config, HeadSpec, Rotary
from lmworks.models.hf_config import Fields, plain_rope
from lmworks.models.hf_shared import fill, read_window, shared

NAME, PREFIX = "ModernBert", "model."
OURS = "layers.{}.attention"
KEYS: dict[str, str | tuple[str, ...]] = {
    "embeddings.tok_embeddings": "embeddings.tokens",
    "embeddings.norm": "embeddings.norm",
    "layers.{}.attn_norm": "layers.{}.attention_norm",
    "layers.{}.attn.Wqkv": (f"{OURS}.q_proj", f"{OURS}.k_proj", f"{OURS}.v_proj"),
    "layers.{}.attn.Wo": f"{OURS}.o_proj",
    "layers.{}.mlp_norm": "layers.{}.mlp_norm",
    "layers.{}.mlp.Wi": ("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"),
    "layers.{}.mlp.Wo": "layers.{}.mlp.down_proj",
    "final_norm": "final_norm",
}
TRANSPOSED = IGNORED = frozenset[str]()


def heads(c: Config) -> Mapping[str, HeadSpec]:
    """Every head reads through one dense layer and norm."""
    f, keys = Fields(c.source), {"head.dense": "dense", "head.norm": "norm", "classifier": "project"}
    same: dict[str, Any] = {"dense": True, "dense_bias": f.flag("classifier_bias", False), "norm": c.norm,
                            "act": f.choice("classifier_activation", "gelu", HEAD_ACTS)}  # fmt: skip
    pool: Any = {"cls": "first", "mean": "mean"}[f.choice("classifier_pooling", "cls", ("cls", "mean"))]
    words = {"head.dense": "dense", "head.norm": "norm", "decoder": "project"}
    return {
        "Model": HeadSpec(outputs="none"),
        "MaskedLM": HeadSpec(outputs="vocab", bias=f.flag("decoder_bias", True), keys=words, **same),
        "SequenceClassification": HeadSpec(pool=pool, keys=keys, **same),
        "TokenClassification": HeadSpec(keys=keys, **same),
        "QuestionAnswering": HeadSpec(outputs="span", keys=keys, **same),
        "MultipleChoice": HeadSpec(outputs="one", pool=pool, keys=keys, **same),
    }


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config of either generation."""
    f = Fields(hf)
    heads, size, layers = f.integer("num_attention_heads"), f.integer("hidden_size"), f.integer("num_hidden_layers")
    every, half = f.integer("global_attn_every_n_layers", 3), f.integer("local_attention", 128) // 2
    types = [("sliding" if i % every else "full") + "_attention" for i in range(layers)]
    theta, local = (plain_rope(hf, kind) for kind in ("full_attention", "sliding_attention"))
    return Config(
        model_type="modernbert", causal=False, norm="layer" if f.flag("norm_bias", False) else "layer_nobias",
        positions="rope", gated=True, embedding_norm=True, first_norm=False, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=size // max(heads, 1), hidden_size=size, num_hidden_layers=layers,
        vocab_size=f.integer("vocab_size"), intermediate_size=f.integer("intermediate_size"),
        attention_bias=f.flag("attention_bias", False), mlp_bias=f.flag("mlp_bias", False),
        max_position_embeddings=f.integer("max_position_embeddings", 8192), norm_eps=f.number("norm_eps", 1e-5),
        hidden_act=f.text("hidden_activation", "gelu"), dropout=f.number("mlp_dropout", 0.0),
        rotary=Rotary(theta=theta.number("rope_theta", f.number("global_rope_theta", 160_000.0)),
                      local_theta=local.number("rope_theta", f.number("local_rope_theta", 10_000.0))),
        **read_window(fill(hf, layer_types=types), layers, f.integer("sliding_window", half), 0),
        **shared(hf, tie=True, bos=50281, eos=50282, pad=50283))  # fmt: skip


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads, for both generations."""
    same = "hidden_size num_hidden_layers num_attention_heads intermediate_size attention_bias mlp_bias norm_eps"
    kinds = ["sliding_attention" if i in c.local_layers else "full_attention" for i in range(c.num_hidden_layers)]
    rope = {"full_attention": c.rotary.theta, "sliding_attention": c.rotary.local_theta}
    return {**{name: getattr(c, name) for name in [*same.split(), "max_position_embeddings"]}, "layer_types": kinds,
            "norm_bias": c.norm == "layer", "hidden_activation": c.hidden_act, "local_attention": 2 * (c.window or 0),
            "mlp_dropout": c.dropout, "global_rope_theta": c.rotary.theta, "local_rope_theta": c.rotary.local_theta,
            "rope_parameters": {k: {"rope_type": "default", "rope_theta": v} for k, v in rope.items()}}  # fmt: skip


def new(*, hidden_size: int, **rest: Any) -> Config:
    """Return a ModernBERT of this size; the MLP is 3/2 as wide, rounded up to a multiple of 32, by default."""
    return config({"hidden_size": hidden_size, "intermediate_size": -(-hidden_size * 3 // 2 // 32) * 32,
                   "mlp_dropout": rest.pop("dropout", 0.0), **rest})  # fmt: skip
