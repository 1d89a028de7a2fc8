"""GPT-2: pre-norm decoder, learned positions, fused q/k/v, matrices stored transposed (TensorFlow's Conv1D)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import Config, HeadSpec, require
from lmworks.models.hf_config import Fields
from lmworks.models.hf_shared import decoder_heads, read_aliases, shared, write_aliases

NAME, PREFIX = "GPT2", "transformer."
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
IGNORED = frozenset({  # old files hold the causal mask as well, and some a second head
    "h.{}.attn.bias", "h.{}.attn.masked_bias", "multiple_choice_head.summary"})  # fmt: skip

ALIASES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
           "max_position_embeddings": "n_positions"}  # fmt: skip


def heads(c: Config) -> Mapping[str, HeadSpec]:
    """The heads of a decoder."""
    return {"Model": HeadSpec(outputs="none"), **decoder_heads(token_key="classifier")}


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config."""
    f = Fields(read_aliases(hf, ALIASES))
    f.must_look_back()
    f.must_be("scale_attn_weights", True)
    f.must_be("scale_attn_by_inverse_layer_idx", False)
    f.must_be("add_cross_attention", False)
    return new(
        vocab_size=f.integer("vocab_size"), hidden_size=f.integer("n_embd"), num_hidden_layers=f.integer("n_layer"),
        num_attention_heads=f.integer("n_head"), max_position_embeddings=f.integer("n_positions"),
        intermediate_size=f.integer("n_inner", 4 * f.integer("n_embd")), dropout=f.number("resid_pdrop", 0.1),
        hidden_act=f.text("activation_function", "gelu_new"), norm_eps=f.number("layer_norm_epsilon", 1e-5),
        **shared(hf, tie=True, bos=50256, eos=50256))  # fmt: skip


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads; transformers.js wants max_position_embeddings too."""
    ours = {
        "n_embd": c.hidden_size, "n_layer": c.num_hidden_layers, "n_head": c.num_attention_heads,
        "n_positions": c.max_position_embeddings, "max_position_embeddings": c.max_position_embeddings,
        "n_inner": c.intermediate_size, "activation_function": c.hidden_act, "layer_norm_epsilon": c.norm_eps,
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout}  # fmt: skip
    return write_aliases(c, ours, ALIASES)


def new(*, hidden_size: int, num_attention_heads: int, **rest: Any) -> Config:
    """Return a GPT-2 of this size; the MLP is four times as wide by default."""
    heads = max(num_attention_heads, 1)
    require(hidden_size % heads == 0, "hidden_size", hidden_size, f"a multiple of {heads} heads")
    defaults = {"num_key_value_heads": heads, "head_dim": hidden_size // heads, "intermediate_size": 4 * hidden_size}
    return Config(model_type="gpt2", hidden_size=hidden_size, num_attention_heads=num_attention_heads,
                  **{**defaults, **rest})  # fmt: skip
