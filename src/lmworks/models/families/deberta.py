"""DeBERTa v2 and v3: BERT whose attention scores what a token is and how far it is apart (He et al. 2021, 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import HEAD_ACTS, Config, HeadSpec, Relative
from lmworks.models.families import bert
from lmworks.models.hf_config import Fields
from lmworks.models.hf_shared import encoder_heads, fill, read_encoder, shared, write_encoder

NAME, PREFIX = "DebertaV2", "deberta."
LAYER, OURS = "encoder.layer.{}", "layers.{}"
NAMES = {"query_proj": "q_proj", "key_proj": "k_proj", "value_proj": "v_proj", "pos_key_proj": "pos_k_proj",
         "pos_query_proj": "pos_q_proj"}  # fmt: skip
KEYS: dict[str, str | tuple[str, ...]] = {
    **{theirs: ours for theirs, ours in bert.KEYS.items() if ".self." not in theirs},
    **{f"{LAYER}.attention.self.{theirs}": f"{OURS}.attention.{ours}" for theirs, ours in NAMES.items()},
    "encoder.rel_embeddings": "relative.vectors",
    "encoder.LayerNorm": "relative.norm",
    "encoder.conv.conv": f"{OURS}.neighbours.conv",
    "encoder.conv.LayerNorm": f"{OURS}.neighbours_norm",
}
WORDS = {"dense": "dense", "LayerNorm": "norm", "bias": "project.bias"}
LEGACY = {f"cls.predictions.{'' if k == 'bias' else 'transform.'}{k}": v for k, v in WORDS.items()}
PUBLISHED = {f"lm_predictions.lm_head.{theirs}": ours for theirs, ours in WORDS.items()}
TRANSPOSED: frozenset[str] = frozenset()
IGNORED = frozenset({*LEGACY, "cls.predictions.decoder", *PUBLISHED, "embeddings.position_ids",
                     "embeddings.position_embeddings",  # of pre-training, where positions are not in the input
                     *(f"mask_predictions.{name}" for name in ("dense", "LayerNorm", "classifier"))})  # fmt: skip


def heads(c: Config) -> Mapping[str, HeadSpec]:
    """The masked LM has two sets of names: `legacy`, BERT's, and those that Microsoft's files hold."""
    f = Fields(c.source)
    legacy: dict[str, Any] = {"keys": {**LEGACY, "cls.predictions.decoder": "project"}, "otherwise": {"legacy": False}}
    own = legacy if f.flag("legacy", True) else {"keys": PUBLISHED}
    words = HeadSpec(outputs="vocab", dense=True, act=c.hidden_act, norm="layer", **own)
    sentence: dict[str, Any] = {"pool": "first", "dense": True, "act": f.choice("pooler_hidden_act", "gelu", HEAD_ACTS),
                                "keys": {"pooler.dense": "dense", "classifier": "project"}}  # fmt: skip
    return {
        "Model": HeadSpec(outputs="none"),
        **encoder_heads(words, causal=False),
        "SequenceClassification": HeadSpec(**sentence),
        "MultipleChoice": HeadSpec(outputs="one", **sentence),
    }


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config."""
    f, base = Fields(hf), read_encoder(fill(hf, type_vocab_size=0, layer_norm_eps=1e-7))
    for key, value in (("embedding_size", base["hidden_size"]), ("attention_head_size", base["head_dim"]),
                       ("pooler_hidden_size", base["hidden_size"]), ("is_decoder", False)):  # fmt: skip
        f.must_be(key, value)
    named = hf.get("pos_att_type") or []
    terms = [part.strip() for part in (named.lower().split("|") if isinstance(named, str) else named)]
    most, buckets = f.integer("max_relative_positions", -1), f.integer("position_buckets", -1)
    relative = Relative(
        positions=most if most > 0 else base["max_position_embeddings"], buckets=max(buckets, 0), terms=tuple(terms),
        shared_keys=f.flag("share_att_key", False), norm="layer_norm" in f.text("norm_rel_ebd", "none"),
        conv_kernel=max(f.integer("conv_kernel_size", 0), 0), conv_groups=f.integer("conv_groups", 1),
        conv_act=f.text("conv_act", "tanh"))  # fmt: skip
    Fields(fill(hf, relative_attention=False)).must_be("relative_attention", True)
    ids = shared(hf, tie=True, pad=0)
    ids["tie_word_embeddings"] |= not f.flag("legacy", True)  # such a head has no matrix of its own
    learned = f.flag("position_biased_input", True)
    return Config(model_type="deberta-v2", positions="learned" if learned else "none", relative=relative, **base, **ids)


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads."""
    r, f = c.relative or Relative(positions=1), Fields(c.source)
    conv = {"conv_kernel_size": r.conv_kernel, "conv_groups": r.conv_groups, "conv_act": r.conv_act}
    return {**write_encoder(c), "relative_attention": True, "max_relative_positions": r.positions,
            "position_buckets": r.buckets or -1, "pos_att_type": list(r.terms), "share_att_key": r.shared_keys,
            "norm_rel_ebd": "layer_norm" if r.norm else "none", "position_biased_input": c.positions == "learned",
            "legacy": f.flag("legacy", True), "pooler_hidden_act": f.text("pooler_hidden_act", "gelu"),
            "pooler_hidden_size": c.hidden_size, **(conv if r.conv_kernel else {})}  # fmt: skip
