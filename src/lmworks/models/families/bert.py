"""BERT: post-norm encoder with learned positions and segments (Devlin et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import Config, HeadSpec
from lmworks.models.hf_shared import encoder_heads, read_encoder, shared, write_encoder

NAME, PREFIX = "Bert", "bert."
LAYER, OURS = "encoder.layer.{}", "layers.{}"
KEYS: dict[str, str | tuple[str, ...]] = {
    "embeddings.word_embeddings": "embeddings.tokens",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.token_type_embeddings": "embeddings.types",
    "embeddings.LayerNorm": "embeddings.norm",
    f"{LAYER}.attention.self.query": f"{OURS}.attention.q_proj",
    f"{LAYER}.attention.self.key": f"{OURS}.attention.k_proj",
    f"{LAYER}.attention.self.value": f"{OURS}.attention.v_proj",
    f"{LAYER}.attention.output.dense": f"{OURS}.attention.o_proj",
    f"{LAYER}.attention.output.LayerNorm": f"{OURS}.attention_norm",
    f"{LAYER}.intermediate.dense": f"{OURS}.mlp.up_proj",
    f"{LAYER}.output.dense": f"{OURS}.mlp.down_proj",
    f"{LAYER}.output.LayerNorm": f"{OURS}.mlp_norm",
}
TRANSPOSED: frozenset[str] = frozenset()
IGNORED = frozenset({"embeddings.position_ids"})  # old files hold a constant


def heads(c: Config) -> Mapping[str, HeadSpec]:
    """Sentences are judged by the first token, through the pooler; the masked LM has a transform of its own."""
    words = {"cls.predictions.transform.dense": "dense", "cls.predictions.transform.LayerNorm": "norm",
             "cls.predictions.bias": "project.bias", "cls.predictions.decoder": "project"}  # fmt: skip
    pooled = {"bert.pooler.dense": "dense"}

    def sentence(key: str, outputs: Any) -> HeadSpec:
        return HeadSpec(outputs=outputs, pool="first", dense=True, act="tanh", keys={**pooled, key: "project"})

    return {
        "Model": HeadSpec(outputs="none", pool="first", dense=True, act="tanh", keys=pooled, optional=True),
        **encoder_heads(HeadSpec(outputs="vocab", dense=True, act=c.hidden_act, norm="layer", keys=words)),
        "SequenceClassification": sentence("classifier", "labels"),
        "MultipleChoice": sentence("classifier", "one"),
        "NextSentencePrediction": sentence("cls.seq_relationship", "two"),
    }


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config."""
    return Config(model_type="bert", **read_encoder(hf), **shared(hf, tie=True, pad=0))


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads."""
    return write_encoder(c)


def new(*, hidden_size: int, num_attention_heads: int, **rest: Any) -> Config:
    """Return a BERT of this size; the MLP is four times as wide by default."""
    wide = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "initializer_range": hidden_size**-0.5}
    return config({**wide, "num_attention_heads": num_attention_heads, "hidden_dropout_prob": rest.pop("dropout", 0.1),
                   **rest})  # fmt: skip
