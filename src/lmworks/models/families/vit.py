"""ViT: a pre-norm encoder over the patches of an image (Dosovitskiy et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import Config, HeadSpec, Vision
from lmworks.models.hf_config import Fields
from lmworks.models.hf_shared import shared

NAME, PREFIX = "ViT", "vit."
LAYER, OURS = "encoder.layer.{}", "layers.{}"
KEYS: dict[str, str | tuple[str, ...]] = {
    "embeddings.cls_token": "embeddings.cls_token",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.patch_embeddings.projection": "embeddings.patches",
    f"{LAYER}.layernorm_before": f"{OURS}.attention_norm",
    f"{LAYER}.attention.attention.query": f"{OURS}.attention.q_proj",
    f"{LAYER}.attention.attention.key": f"{OURS}.attention.k_proj",
    f"{LAYER}.attention.attention.value": f"{OURS}.attention.v_proj",
    f"{LAYER}.attention.output.dense": f"{OURS}.attention.o_proj",
    f"{LAYER}.layernorm_after": f"{OURS}.mlp_norm",
    f"{LAYER}.intermediate.dense": f"{OURS}.mlp.up_proj",
    f"{LAYER}.output.dense": f"{OURS}.mlp.down_proj",
    "layernorm": "final_norm",
}
TRANSPOSED: frozenset[str] = frozenset()
IGNORED = frozenset({"embeddings.mask_token"})  # of pre-training on hidden patches


def heads(c: Config) -> Mapping[str, HeadSpec]:
    """Images are judged by the class token."""
    pooled = HeadSpec(outputs="none", pool="first", dense=True, act="tanh", keys={"vit.pooler.dense": "dense"},
                      optional=True)  # fmt: skip
    return {"Model": pooled, "ImageClassification": HeadSpec(pool="first", keys={"classifier": "project"})}


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config."""
    f = Fields(hf)
    f.must_be("pooler_act", "tanh")
    f.must_be("pooler_output_size", f.integer("hidden_size", 768))
    heads, size = f.integer("num_attention_heads", 12), f.integer("hidden_size", 768)
    eye = Vision(image_size=f.integer("image_size", 224), patch_size=f.integer("patch_size", 16),
                 num_channels=f.integer("num_channels", 3))  # fmt: skip
    return Config(
        model_type="vit", vocab_size=0, vision=eye, positions="none", causal=False, hidden_size=size,
        num_hidden_layers=f.integer("num_hidden_layers", 12), num_attention_heads=heads, num_key_value_heads=heads,
        head_dim=size // max(heads, 1), intermediate_size=f.integer("intermediate_size", 3072), output_bias=True,
        max_position_embeddings=(eye.image_size // eye.patch_size) ** 2 + 1, hidden_act=f.text("hidden_act", "gelu"),
        norm_eps=f.number("layer_norm_eps", 1e-12), attention_bias=f.flag("qkv_bias", True),
        dropout=f.number("hidden_dropout_prob", 0.0), **shared(hf, tie=False))  # fmt: skip


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads."""
    same = "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act"
    return {**{name: getattr(c, name) for name in same.split()}, **(vars(c.vision) if c.vision else {}),
            "layer_norm_eps": c.norm_eps, "qkv_bias": c.attention_bias, "hidden_dropout_prob": c.dropout}  # fmt: skip
