"""Phi-3, 3.5 and 4-mini: Llama with fused matrices; long contexts have rotary frequencies of their own (Abdin 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import Config, HeadSpec
from lmworks.models.families import llama
from lmworks.models.hf_config import Fields
from lmworks.models.hf_shared import decoder_heads, fill, read_decoder, read_window, shared, write_decoder

NAME, PREFIX = "Phi3", "model."
OURS = "layers.{}.attention"
KEYS: dict[str, str | tuple[str, ...]] = {
    "embed_tokens": "embeddings.tokens",
    "layers.{}.input_layernorm": "layers.{}.attention_norm",
    "layers.{}.self_attn.qkv_proj": (f"{OURS}.q_proj", f"{OURS}.k_proj", f"{OURS}.v_proj"),  # k and v may be smaller
    "layers.{}.self_attn.o_proj": f"{OURS}.o_proj",
    "layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
    "layers.{}.mlp.gate_up_proj": ("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"),
    "layers.{}.mlp.down_proj": "layers.{}.mlp.down_proj",
    "norm": "final_norm",
}
TRANSPOSED, IGNORED = llama.TRANSPOSED, llama.IGNORED


def heads(c: Config) -> Mapping[str, HeadSpec]:
    """The heads of a decoder, but for questions."""
    found = {"Model": HeadSpec(outputs="none"), **decoder_heads()}
    del found["QuestionAnswering"]
    return found


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config; every layer has the window where it states one."""
    f = Fields(fill(hf, original_max_position_embeddings=4096))
    f.must_be("attention_bias", False)
    fields = read_decoder(f.hf, norm="rms_norm_eps", positions=4096, partial=1.0)
    fields |= {"dropout": f.number("resid_pdrop", 0.0), "norm_eps": f.number("rms_norm_eps", 1e-5)}
    window = read_window({}, fields["num_hidden_layers"], hf.get("sliding_window"), 0)  # layer_types say nothing
    return Config(model_type="phi3", norm="rms", gated=True, attention_bias=False, mlp_bias=False, **window, **fields,
                  **shared(hf, tie=False, bos=1, eos=32000, pad=32000))  # fmt: skip


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads."""
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop"), c.dropout)
    return {**write_decoder(c, norm="rms_norm_eps"), **drops, "sliding_window": c.window}
