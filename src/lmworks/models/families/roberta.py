"""RoBERTa: BERT whose positions start after the padding id, with heads of its own (Liu et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import Config, HeadSpec
from lmworks.models.families import bert
from lmworks.models.hf_shared import encoder_heads, read_encoder, shared, write_encoder

NAME, PREFIX = "Roberta", "roberta."
KEYS, TRANSPOSED, IGNORED = bert.KEYS, bert.TRANSPOSED, bert.IGNORED


def heads(c: Config) -> Mapping[str, HeadSpec]:
    """A sentence's head has a dense layer in place of the pooler, which only the bare model and choices keep."""
    pooled = {"roberta.pooler.dense": "dense"}
    words = {"lm_head.dense": "dense", "lm_head.layer_norm": "norm", "lm_head.bias": "project.bias",
             "lm_head.decoder": "project"}  # fmt: skip
    sentence = {"classifier.dense": "dense", "classifier.out_proj": "project"}
    return {
        "Model": HeadSpec(outputs="none", pool="first", dense=True, act="tanh", keys=pooled, optional=True),
        **encoder_heads(HeadSpec(outputs="vocab", dense=True, norm="layer", keys=words)),
        "SequenceClassification": HeadSpec(pool="first", dense=True, act="tanh", keys=sentence),
        "MultipleChoice": HeadSpec(outputs="one", pool="first", dense=True, act="tanh",
                                   keys={**pooled, "classifier": "project"}),
    }  # fmt: skip


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config; positions are counted from the padding id, which has the one before the first."""
    ids = shared(hf, tie=True, bos=0, eos=2, pad=1)
    offset = (1 if ids["pad_token_id"] is None else ids["pad_token_id"]) + 1
    return Config(model_type="roberta", position_offset=offset, **read_encoder(hf), **ids)


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads."""
    return write_encoder(c)
