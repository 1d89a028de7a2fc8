"""DistilBERT: half of BERT's layers, no segments, key names of its own (Sanh et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import Config, HeadSpec
from lmworks.models.hf_config import Fields
from lmworks.models.hf_shared import encoder_heads, read_aliases, shared, write_aliases

NAME, PREFIX = "DistilBert", "distilbert."
LAYER, OURS = "transformer.layer.{}", "layers.{}"
KEYS: dict[str, str | tuple[str, ...]] = {
    "embeddings.word_embeddings": "embeddings.tokens",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.LayerNorm": "embeddings.norm",
    **{f"{LAYER}.attention.{name}_lin": f"{OURS}.attention.{name}_proj" for name in "qkv"},
    f"{LAYER}.attention.out_lin": f"{OURS}.attention.o_proj",
    f"{LAYER}.sa_layer_norm": f"{OURS}.attention_norm",
    f"{LAYER}.ffn.lin1": f"{OURS}.mlp.up_proj",
    f"{LAYER}.ffn.lin2": f"{OURS}.mlp.down_proj",
    f"{LAYER}.output_layer_norm": f"{OURS}.mlp_norm",
}
TRANSPOSED: frozenset[str] = frozenset()
IGNORED = frozenset({"embeddings.position_ids"})
ALIASES = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}


def heads(c: Config) -> Mapping[str, HeadSpec]:
    """A sentence's dense layer ends in ReLU, where BERT's pooler ends in tanh."""
    words = {"vocab_transform": "dense", "vocab_layer_norm": "norm", "vocab_projector": "project"}
    sentence = {"pre_classifier": "dense", "classifier": "project"}
    return {
        "Model": HeadSpec(outputs="none"),
        **encoder_heads(
            HeadSpec(outputs="vocab", dense=True, act=c.hidden_act, norm="layer", keys=words), causal=False
        ),
        "SequenceClassification": HeadSpec(pool="first", dense=True, act="relu", keys=sentence),
        "MultipleChoice": HeadSpec(outputs="one", pool="first", dense=True, act="relu", keys=sentence),
    }


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config; the norms' epsilon is not stated, it is always 1e-12."""
    f = Fields(read_aliases(hf, ALIASES))
    heads, size = f.integer("n_heads", 12), f.integer("dim", 768)
    return Config(
        model_type="distilbert", block="post", causal=False, final_norm=False, embedding_norm=True, norm_eps=1e-12,
        vocab_size=f.integer("vocab_size"), hidden_size=size, num_hidden_layers=f.integer("n_layers", 6),
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=size // max(heads, 1),
        intermediate_size=f.integer("hidden_dim", 3072), hidden_act=f.text("activation", "gelu"),
        max_position_embeddings=f.integer("max_position_embeddings", 512), dropout=f.number("dropout", 0.1),
        **shared(hf, tie=True, pad=0))  # fmt: skip


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads."""
    ours = {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "n_heads": c.num_attention_heads,
            "hidden_dim": c.intermediate_size, "activation": c.hidden_act, "dropout": c.dropout,
            "attention_dropout": c.dropout, "max_position_embeddings": c.max_position_embeddings}  # fmt: skip
    return write_aliases(c, ours, ALIASES)
