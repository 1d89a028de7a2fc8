"""Phi 1, 1.5 and 2: one norm feeds attention and MLP in parallel; part of each head is rotated (Li et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import Config, HeadSpec
from lmworks.models.hf_config import Fields
from lmworks.models.hf_shared import decoder_heads, read_decoder, shared, write_decoder

NAME, PREFIX = "Phi", "model."
KEYS: dict[str, str | tuple[str, ...]] = {
    "embed_tokens": "embeddings.tokens",
    "layers.{}.input_layernorm": "layers.{}.attention_norm",
    **{f"layers.{{}}.self_attn.{name}_proj": f"layers.{{}}.attention.{name}_proj" for name in "qkv"},
    "layers.{}.self_attn.dense": "layers.{}.attention.o_proj",
    "layers.{}.mlp.fc1": "layers.{}.mlp.up_proj",
    "layers.{}.mlp.fc2": "layers.{}.mlp.down_proj",
    "final_layernorm": "final_norm",
}
TRANSPOSED: frozenset[str] = frozenset()
IGNORED = frozenset({"layers.{}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"})  # old files hold a constant


def heads(c: Config) -> Mapping[str, HeadSpec]:
    """The heads of a decoder, but for questions; the language model's has a bias."""
    found = {"Model": HeadSpec(outputs="none"), **decoder_heads(bias=True)}
    del found["QuestionAnswering"]
    return found


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config of either generation."""
    Fields(hf).must_be("qk_layernorm", False)
    fields = read_decoder(hf, norm="layer_norm_eps", act="gelu_new", partial=0.5)
    fields["norm_eps"] = Fields(hf).number("layer_norm_eps", 1e-5)
    return Config(model_type="phi", block="parallel", **fields, **shared(hf, tie=False, bos=1, eos=2))


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads."""
    return write_decoder(c, norm="layer_norm_eps") | {"resid_pdrop": c.dropout, "embd_pdrop": c.dropout}
