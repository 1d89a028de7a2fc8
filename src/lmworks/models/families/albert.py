"""ALBERT: BERT with small embeddings and one layer that runs again and again (Lan et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import Config, HeadSpec
from lmworks.models.hf_config import Fields
from lmworks.models.hf_shared import encoder_heads, fill, read_encoder, shared, write_encoder

NAME, PREFIX = "Albert", "albert."
LAYER, OURS = "encoder.albert_layer_groups.{}.albert_layers.0", "layers.{}"
KEYS: dict[str, str | tuple[str, ...]] = {
    "embeddings.word_embeddings": "embeddings.tokens",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.token_type_embeddings": "embeddings.types",
    "embeddings.LayerNorm": "embeddings.norm",
    "encoder.embedding_hidden_mapping_in": "embeddings.project",
    f"{LAYER}.attention.query": f"{OURS}.attention.q_proj",
    f"{LAYER}.attention.key": f"{OURS}.attention.k_proj",
    f"{LAYER}.attention.value": f"{OURS}.attention.v_proj",
    f"{LAYER}.attention.dense": f"{OURS}.attention.o_proj",
    f"{LAYER}.attention.LayerNorm": f"{OURS}.attention_norm",
    f"{LAYER}.ffn": f"{OURS}.mlp.up_proj",
    f"{LAYER}.ffn_output": f"{OURS}.mlp.down_proj",
    f"{LAYER}.full_layer_layer_norm": f"{OURS}.mlp_norm",
}
TRANSPOSED: frozenset[str] = frozenset()
IGNORED = frozenset({"embeddings.position_ids", "sop_classifier.classifier"})  # the order of two sentences


def heads(c: Config) -> Mapping[str, HeadSpec]:
    """BERT's heads; the masked LM's is as small as the embeddings."""
    words = {"predictions.dense": "dense", "predictions.LayerNorm": "norm", "predictions.bias": "project.bias",
             "predictions.decoder": "project"}  # fmt: skip
    pooled = {"albert.pooler": "dense"}
    sentence: dict[str, Any] = {"pool": "first", "dense": True, "act": "tanh"}
    keys = {**pooled, "classifier": "project"}
    return {
        "Model": HeadSpec(outputs="none", keys=pooled, optional=True, **sentence),
        **encoder_heads(
            HeadSpec(outputs="vocab", dense=True, act=c.hidden_act, norm="layer", keys=words), causal=False
        ),
        "SequenceClassification": HeadSpec(keys=keys, **sentence),
        "MultipleChoice": HeadSpec(outputs="one", keys=keys, **sentence),
    }


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config; a group of several layers has never been published."""
    f = Fields(hf)
    f.must_be("inner_group_num", 1)
    f.must_be("is_decoder", False)
    usual = {"hidden_size": 4096, "num_attention_heads": 64, "intermediate_size": 16384, "hidden_act": "gelu_new",
             "hidden_dropout_prob": 0.0}  # fmt: skip
    return Config(model_type="albert", embedding_size=f.integer("embedding_size", 128),
                  layer_groups=f.integer("num_hidden_groups", 1), **read_encoder(fill(hf, **usual)),
                  **shared(hf, tie=True, bos=2, eos=3, pad=0))  # fmt: skip


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads."""
    return {**write_encoder(c), "embedding_size": c.embedding_size, "num_hidden_groups": c.layer_groups,
            "inner_group_num": 1}  # fmt: skip
