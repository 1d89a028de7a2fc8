"""What several families state alike in a published config.json, and the heads that they share. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.base.errors import FormatError
from lmworks.models.config import Config, HeadSpec, require
from lmworks.models.hf_config import Fields, read_rope, write_rope

ENCODER = (  # ours and theirs
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings hidden_act"
).split()
DECODER = [*ENCODER, "num_key_value_heads", "head_dim"]
MOST_LABELS = 1_000_000  # beyond any published model
WINDOWS = ("sliding_attention", "full_attention")


def shared(
    hf: Mapping[str, Any], *, tie: bool, bos: int | None = None, eos: int | None = None, pad: int | None = None
) -> dict[str, Any]:
    """Return what every family states alike, for a Config; the defaults are the family's own."""
    f = Fields(hf)
    return {
        "initializer_range": f.number("initializer_range", 0.02),
        "tie_word_embeddings": f.flag("tie_word_embeddings", tie),
        "bos_token_id": f.token("bos_token_id", bos),
        "eos_token_id": f.tokens("eos_token_id", eos),
        "pad_token_id": f.token("pad_token_id", pad),
        "labels": read_labels(f),
        "problem_type": f.text("problem_type", "") or None,
        "source": hf,
    }


def read_labels(f: Fields) -> tuple[str, ...]:
    """Return the labels by id; where the file names none, as many LABEL_i as it counts (2 by default)."""
    named = f.table("id2label")
    count = len(named) or f.integer("num_labels", 2)
    require(count <= MOST_LABELS, "num_labels", count, f"at most {MOST_LABELS:,}")
    if not named:
        return tuple(f"LABEL_{i}" for i in range(count))
    expected = {str(i) for i in range(len(named))}
    if set(named) != expected:
        found = ", ".join(sorted(set(named) ^ expected)[:5])
        raise FormatError(f"{f.name}: the keys of id2label are not 0, 1, 2 …", found=found, expected="every id once")
    return tuple(str(named[str(i)]) for i in range(len(named)))


def fill(hf: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Return a config with a family's own defaults where it says nothing, or null."""
    return {**hf, **{key: value for key, value in defaults.items() if hf.get(key) is None}}


def read_aliases(hf: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return a config whose keys {alias: key} have their aliases' values, which transformers prefers."""
    return {**hf, **{key: hf[alias] for alias, key in aliases.items() if hf.get(alias) is not None}}


def write_aliases(c: Config, ours: dict[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return what was written, with the aliases that the config's file has."""
    return {**ours, **{alias: ours[key] for alias, key in aliases.items() if alias in c.source}}


def decoder_heads(*, token_key: str = "score", bias: bool = False, qa_prefix: str | None = None) -> dict[str, HeadSpec]:
    """Return the heads of a decoder: `token_key` names token-classification's, `qa_prefix` its body under QA's."""
    project = {"score": "project"}
    return {
        "CausalLM": HeadSpec(outputs="vocab", bias=bias, keys={"lm_head": "project"}),
        "SequenceClassification": HeadSpec(pool="last", bias=False, keys=project),
        "TokenClassification": HeadSpec(keys={token_key: "project"}),
        "QuestionAnswering": HeadSpec(outputs="span", keys={"qa_outputs": "project"}, prefix=qa_prefix),
    }


def encoder_heads(words: HeadSpec, *, causal: bool = True) -> dict[str, HeadSpec]:
    """Return the heads that encoders share; the masked LM's, `words`, is also the head of a BERT that decodes."""
    return {
        "MaskedLM": words,
        **({"CausalLM": words} if causal else {}),
        "TokenClassification": HeadSpec(keys={"classifier": "project"}),
        "QuestionAnswering": HeadSpec(outputs="span", keys={"qa_outputs": "project"}),
    }


def read_encoder(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that BERT and its relatives state; transformers trains them with one dropout."""
    f = Fields(hf)
    f.must_be("position_embedding_type", "absolute")
    f.must_be("add_cross_attention", False)
    if f.flag("is_decoder", False):
        f.must_look_back()
    heads, size = f.integer("num_attention_heads", 12), f.integer("hidden_size", 768)
    return {
        "block": "post", "final_norm": False, "embedding_norm": True, "causal": f.flag("is_decoder", False),
        "vocab_size": f.integer("vocab_size"), "hidden_size": size, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": size // max(heads, 1),
        "num_hidden_layers": f.integer("num_hidden_layers", 12), "hidden_act": f.text("hidden_act", "gelu"),
        "intermediate_size": f.integer("intermediate_size", 3072), "norm_eps": f.number("layer_norm_eps", 1e-12),
        "max_position_embeddings": f.integer("max_position_embeddings", 512),
        "type_vocab_size": f.integer("type_vocab_size", 2), "dropout": f.number("hidden_dropout_prob", 0.1),
    }  # fmt: skip


def write_encoder(c: Config) -> dict[str, Any]:
    """Write what `read_encoder` reads."""
    return {
        **{name: getattr(c, name) for name in ENCODER}, "is_decoder": c.causal, "layer_norm_eps": c.norm_eps,
        "type_vocab_size": c.type_vocab_size, "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.dropout, "position_embedding_type": "absolute",
    }  # fmt: skip


def read_decoder(
    hf: Mapping[str, Any], *, norm: str, act: str = "silu", positions: int = 2048, partial: float | None = None
) -> dict[str, Any]:
    """Return the fields that Llama and its relatives state; `norm` is the key of the norm's epsilon.

    `partial`: the family may rotate a part of each head, this one where the file says nothing.
    """
    f = Fields(hf)
    f.must_look_back()
    heads, size = f.integer("num_attention_heads"), f.integer("hidden_size")
    head_dim = f.integer("head_dim", size // max(heads, 1))
    return {
        "vocab_size": f.integer("vocab_size"), "hidden_size": size, "num_attention_heads": heads,
        "num_key_value_heads": f.integer("num_key_value_heads", heads),
        "head_dim": head_dim, "hidden_act": f.text("hidden_act", act),
        "num_hidden_layers": f.integer("num_hidden_layers"), "intermediate_size": f.integer("intermediate_size"),
        "max_position_embeddings": f.integer("max_position_embeddings", positions), "positions": "rope",
        "norm_eps": f.number(norm, 1e-6), "dropout": f.number("attention_dropout", 0.0),
        "rotary": read_rope(hf, head_dim, partial),
    }  # fmt: skip


def write_decoder(c: Config, *, norm: str) -> dict[str, Any]:
    """Write what `read_decoder` reads; transformers knows no other dropout in these than attention's."""
    names = {name: getattr(c, name) for name in DECODER}
    return {**names, norm: c.norm_eps, "attention_dropout": c.dropout, **write_rope(c)}


def read_window(hf: Mapping[str, Any], layers: int, window: int | None, first_local: int) -> dict[str, Any]:
    """Return `window` and `local_layers`: those that `layer_types` names, else those from `first_local` on."""
    types = hf.get("layer_types")
    if types is None:
        local = tuple(range(first_local, layers))
    else:
        whole = isinstance(types, list) and len(types) == layers and all(kind in WINDOWS for kind in types)
        require(whole, "layer_types", str(types)[:200], f"{layers} of {' or '.join(WINDOWS)}")
        local = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    return {"window": window, "local_layers": local} if window is not None and local else {}
